"""The whole front door on a real socket: gateway and REST over fakes, with bounds that a test can reach."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import httptools
import uvicorn

from rotator.app import uvicorn_config
from rotator.config import BindConfig, FleetConfig, HttpConfig, KeyConfig
from rotator.service.api import create_api
from rotator.service.front import Front
from rotator.service.keys import Keys
from rotator.service.quotas import Quotas
from tests.contract.gateway.rig import Rig, rig_up, until
from tests.unit.api.fakes import FakeOperations

HOST = b"host: 127.0.0.1\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class Door:
    rig: Rig
    port: int
    ops: FakeOperations
    tls: ssl.SSLContext | None = None

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def say(self, *pieces: bytes, within_s: float = 5.0, ends: bool = True) -> bytes:
        """All that comes back for these bytes until the server closes, or for a moment where it does not."""
        async with self.connection() as (reader, writer):
            for piece in pieces:
                writer.write(piece)
                with contextlib.suppress(OSError):
                    await writer.drain()
            if ends and writer.can_write_eof():
                with contextlib.suppress(OSError):
                    writer.write_eof()
            said = b""
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(within_s):
                    while chunk := await reader.read(65536):
                        said += chunk
            return said

    async def is_well(self) -> bool:
        """Whether somebody else is served at once."""
        said = await self.say(GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), within_s=2.0)
        return said.startswith(b"HTTP/1.1 200")


def statuses(said: bytes) -> list[int]:
    """Of every answer in these bytes, which must be whole answers and nothing else."""
    found: list[int] = []

    class Reader:
        def on_message_complete(self) -> None:
            found.append(parser.get_status_code())

    parser = httptools.HttpResponseParser(Reader())
    if said:
        parser.feed_data(said)
    return found


def key(name: str, secret_digest: str, **more: object) -> KeyConfig:
    return KeyConfig.model_validate({"name": name, "sha256": secret_digest, **more})


@contextlib.asynccontextmanager
async def front(
    http: HttpConfig | None = None,
    keys: Sequence[KeyConfig] = (),
    bind: BindConfig | None = None,
    tls: ssl.SSLContext | None = None,
    **options: object,
) -> AsyncIterator[Door]:
    http, bind = http or HttpConfig(), bind or BindConfig(port=0)
    known, quotas, ops = Keys(keys, bind), Quotas(keys), FakeOperations()
    async with rig_up(
        authorize=known.authorize,
        guard=known.guard,
        identify=known.client,
        quotas=quotas,
        bodies_bytes_max=int(http.bodies_max_mib * (1 << 20)),
        **options,  # type: ignore[arg-type] # the rig's own
    ) as rig:
        api = create_api(ops, rig.bus, authorize=known.authorize_operator, guard=known.guard)
        fleet = FleetConfig.model_construct(bind=bind, http=http)
        server = _Server(uvicorn_config(Front(rig.gateway, api), fleet, tls))
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield Door(rig, port, ops)
        finally:
            server.should_exit = server.force_exit = True
            await serving
