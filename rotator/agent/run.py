"""The agent's composition root: its parts, its front door, its life."""

import asyncio
import contextlib
import hmac
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from rotator.adapters.devices import NvmlDevices
from rotator.adapters.gpu_reports import NvmlReports
from rotator.adapters.machine import Machine
from rotator.adapters.notify import tell_systemd
from rotator.agent.api import create_api
from rotator.agent.engines import Engines
from rotator.agent.relay import PREFIX, Receive, Relay, Scope, Send, refuse
from rotator.agent.settings import AgentConfig, load, read_token
from rotator.config import ConfigError
from rotator.ports import Devices
from rotator.ports_nodes import TOKEN_HEADER
from rotator.ports_watchdog import GpuReports

API_BYTES_MAX = 64 << 10
API_DEADLINE_S = 150.0  # the longest is a kill: its grace and what the kernel takes
KEEPALIVE_S = 15  # longer than the gateway keeps a connection: no request meets a closing one
WIND_DOWN_S = 5.0
_RIGHTS = 1 << 19 | 1 << 5  # CAP_SYS_PTRACE, CAP_KILL

_log = logging.getLogger("rotator.agent")


class Front:
    """ASGI: lets in who knows the word, and hands on. Whoever has no certificate never came as far as this."""

    def __init__(self, api: Any, relay: Relay, token: str) -> None:
        self._api = api
        self._relay = relay
        self._word = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_socket = scope["type"] == "websocket"
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(TOKEN_HEADER.encode(), b""), self._word):
            await refuse(send, 401, "the token is not the one of this agent", "unsent", is_socket=is_socket)
        elif scope["raw_path"].startswith(PREFIX):
            await self._relay.serve(scope, receive, send)
        elif is_socket:
            await refuse(send, 404, "there is no such socket here", None, is_socket=True)
        elif not _is_small(headers.get(b"content-length", b"0")) or b"transfer-encoding" in headers:
            await refuse(send, 413, f"a request here has at most {API_BYTES_MAX} bytes, told by Content-Length", None)
        else:
            try:
                async with asyncio.timeout(API_DEADLINE_S):
                    await self._api(scope, receive, send)
            except TimeoutError:
                _log.error("%s %s took longer than %g s", scope["method"], scope["path"][:200], API_DEADLINE_S)


def _is_small(length: bytes) -> bool:
    return length.isdigit() and len(length) < 12 and int(length) <= API_BYTES_MAX


class _Server(uvicorn.Server):
    """Signals are handled by us, and readiness is told once the socket is served."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            tell_systemd("READY=1")


def serve(path: Path) -> int:
    """Run the agent until SIGTERM or SIGINT. Raises ConfigError if it cannot start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").addFilter(lambda r: "without completing response" not in r.getMessage())
    config = load(path)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(config, read_token(config.token_file)))
    return 0


async def run(config: AgentConfig, token: str) -> None:
    """Serve until told to end. Raises ConfigError where it cannot listen."""
    listener = listen(config.host, config.port)
    port = listener.getsockname()[1]
    server, relay = assemble(config, token, NvmlDevices(), NvmlReports(), port)
    if not sees_other_users():
        _log.warning("no right to look into other users' processes: engines of theirs are not found, nor ended")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _end, server)
    _log.info("node %s: listening on %s:%d%s", config.node, config.host, port, "" if config.is_tls else " without TLS")
    try:
        await server.serve([listener])
    finally:
        await relay.close()


def assemble(
    config: AgentConfig, token: str, devices: Devices, reports: GpuReports, port: int
) -> tuple[uvicorn.Server, Relay]:
    """The agent's parts, put together. Raises ConfigError where its certificates cannot be used."""
    engines = Engines(config.engines, port)
    relay = Relay(
        engines,
        bytes_max=int(config.body_max_mib * (1 << 20)),
        requests_max=config.requests_max,
        connect_s=config.connect_s,
    )
    api = create_api(config, devices, reports, engines, Machine())
    return _Server(_uvicorn_config(Front(api, relay, token), config)), relay


def sees_other_users(status: Path = Path("/proc/self/status")) -> bool:
    """Whether this process may read other users' environments and end their processes: as root, or by capabilities."""
    lines = status.read_text().splitlines() if status.exists() else []
    told = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return int(told, 16) & _RIGHTS == _RIGHTS


def _end(server: uvicorn.Server) -> None:
    tell_systemd("STOPPING=1")
    server.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named TCP: else what is accepted waits for acknowledgements before it sends on, 40 ms a request.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as e:
        listener.close()
        raise ConfigError([f"host, port: cannot listen on {host}:{port}: {e.strerror}: choose another"]) from None
    return listener


def _uvicorn_config(app: Any, config: AgentConfig) -> uvicorn.Config:
    made = uvicorn.Config(
        app,
        ws="websockets-sansio",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEPALIVE_S,
        timeout_graceful_shutdown=int(WIND_DOWN_S),
        ssl_certfile=config.cert,
        ssl_keyfile=config.key,
        ssl_ca_certs=None if config.ca is None else str(config.ca),
        ssl_cert_reqs=ssl.CERT_REQUIRED,
    )
    try:
        made.load()
    except (OSError, ssl.SSLError) as e:
        raise ConfigError([f"ca, cert, key: cannot be used ({e}): `rotator agent certs` makes them"]) from None
    if made.ssl is not None:
        made.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return made
