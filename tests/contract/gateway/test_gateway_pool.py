"""Connections to engines: kept while they are used, closed before the engine does, never trusted blindly."""

import asyncio

import pytest

from rotator.service import pool as module
from rotator.service.channel import Lost
from rotator.service.pool import Pool, Unreachable


class Server:
    """Counts connections, answers every request, and can close after each."""

    def __init__(self, *, closes: bool = False) -> None:
        self.connections = 0
        self.open = 0
        self.requests: list[bytes] = []
        self.closes = closes
        self.server: asyncio.Server | None = None

    async def start(self) -> str:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]) if b"ength:" in head else 0
                self.requests.append(head + await reader.readexactly(length))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                if self.closes:
                    writer.close()
                    return
        except (asyncio.IncompleteReadError, ConnectionResetError):
            writer.close()
        finally:
            self.open -= 1


async def ask(pool: Pool, base: str, target: bytes = b"/x") -> bytes:
    answer = await pool.ask(b"POST", base, target, [(b"a", b"b")], b"body")
    return await answer.read()


async def test_a_connection_is_kept_for_the_next_request() -> None:
    server, pool = Server(), Pool(5)
    base = await server.start()
    assert [await ask(pool, base) for _ in range(5)] == [b"ok"] * 5
    assert server.connections == 1
    pool.close()


async def test_requests_at_once_have_connections_of_their_own() -> None:
    server, pool = Server(), Pool(5)
    base = await server.start()
    assert await asyncio.gather(*(ask(pool, base) for _ in range(8))) == [b"ok"] * 8
    assert server.connections == 8
    pool.close()


async def test_the_request_is_written_as_it_should_be() -> None:
    server, pool = Server(), Pool(5)
    base = await server.start()
    await ask(pool, base + "/prefix/", b"/v1/x?q=1")
    host = base.removeprefix("http://").encode()
    assert server.requests == [
        b"POST /prefix/v1/x?q=1 HTTP/1.1\r\nhost: " + host + b"\r\na: b\r\ncontent-length: 4\r\n\r\nbody"
    ]
    pool.close()


async def test_an_idle_connection_is_closed_before_the_engine_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEPALIVE_S", 0.04)
    server, pool = Server(), Pool(5)
    base = await server.start()
    await ask(pool, base)
    async with asyncio.timeout(5):
        while server.open:  # noqa: ASYNC110 # the server's own count, with no event to wait on
            await asyncio.sleep(0.005)
    assert await ask(pool, base) == b"ok"
    assert server.connections == 2
    pool.close()


async def test_a_connection_that_the_engine_closed_is_not_used_again() -> None:
    server, pool = Server(closes=True), Pool(5)
    base = await server.start()
    for _ in range(3):
        assert await ask(pool, base) == b"ok"
        async with asyncio.timeout(5):
            while any(c.usable for channels in pool._idle.values() for c in channels):  # noqa: ASYNC110 # as above
                await asyncio.sleep(0.005)
    assert server.connections == 3
    assert len(server.requests) == 3
    pool.close()


async def test_nobody_listening_is_unreachable_and_nothing_was_sent() -> None:
    with pytest.raises(Unreachable, match="no connection"):
        await ask(Pool(5), "http://127.0.0.1:9")


async def test_an_address_that_never_answers_is_unreachable_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", never)
    with pytest.raises(Unreachable, match=r"within 0\.02 s"):
        await ask(Pool(0.02), "http://127.0.0.1:9")


async def test_plain_http_where_tls_is_spoken_is_an_error_not_a_hang() -> None:
    server = Server()
    base = await server.start()
    with pytest.raises((Unreachable, Lost)):
        await ask(Pool(0.2), base.replace("http:", "https:"))
