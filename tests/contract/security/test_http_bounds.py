"""What one connection may take: each bound is reached by raw bytes over a real socket."""

import asyncio
import contextlib
import socket

from rotator.config import HttpConfig
from tests.contract.gateway.rig import Script, until
from tests.contract.security.front import GET, HOST, front, statuses

SMALL = HttpConfig(
    head_bytes_max=2048,
    line_bytes_max=1024,
    headers_max=12,
    head_deadline_s=0.2,
    body_deadline_s=0.2,
    body_bytes_per_s_min=1_000_000,
    connections_per_address_max=4,
    write_stall_s=0.2,
)
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"content-type: application/json\r\n"


TOO_LARGE = [
    (b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    (b"GET / HTTP/1.1\r\n" + HOST + b"x: " + b"a" * 1100 + b"\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\n" + HOST + b"".join(b"x%d: 1\r\n" % i for i in range(12)) + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\n" + HOST + (b"x: " + b"a" * 700 + b"\r\n") * 3 + b"\r\n", 431),
]


async def test_a_head_that_is_too_large_is_refused():
    async with front(SMALL) as door:
        assert [statuses(await door.say(sent)) for sent, _ in TOO_LARGE] == [[status] for _, status in TOO_LARGE]


async def test_a_header_that_never_ends_is_refused_before_it_fills_memory():
    async with front(SMALL) as door:
        said = await door.say(b"GET / HTTP/1.1\r\nx: ", *[b"a" * 1024] * 64, ends=False)
        assert statuses(said) == [431]


async def test_a_head_that_does_not_come_in_time_ends_the_connection():
    beginnings = (b"", b"\r\n", b"G", b"GET / HTTP/1.1\r\nho")
    async with front(SMALL) as door:
        async with asyncio.timeout(4):
            said = await asyncio.gather(*(door.say(sent, ends=False) for sent in beginnings))
        assert [statuses(one) for one in said] == [[], [], [408], [408]]


async def test_a_body_that_does_not_come_in_time_is_told_so():
    async with front(SMALL) as door:
        async with asyncio.timeout(3):
            said = await door.say(POST + b"content-length: 100\r\n\r\n{", ends=False)
        assert statuses(said) == [408]
        assert door.rig.engines["a"].seen == []


async def test_a_hundred_slow_clients_hold_nobody_up():
    async with front() as door, contextlib.AsyncExitStack() as stack:
        for _ in range(100):
            _, writer = await stack.enter_async_context(door.connection())
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nx")
        assert await door.is_well()


async def test_an_address_has_so_many_connections_and_gets_its_place_back():
    async with front(SMALL) as door:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(door.connection())
            refused = await door.say(GET)
            assert statuses(refused) == [503]
            assert b"retry-after" in refused
        async with asyncio.timeout(3):
            while not await door.is_well():  # noqa: ASYNC110 # a place is free a moment after its connection closed
                await asyncio.sleep(0.01)


async def test_a_websocket_gives_its_place_back():
    upgrade = b"GET /v1/realtime?model=a HTTP/1.1\r\n" + HOST + b"connection: upgrade\r\nupgrade: websocket\r\n"
    upgrade += b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    async with front(SMALL) as door:
        for _ in range(6):
            said = await door.say(upgrade)
            assert said.startswith(b"HTTP/1.1 101")


async def test_a_client_that_reads_nothing_of_its_answer_is_let_go():
    script = Script()
    async with front(SMALL) as door:
        door.rig.engines["a"].answer = script
        body = b'{"model": "a", "stream": true}'
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.setblocking(False)
        await asyncio.get_running_loop().sock_connect(stalled, ("127.0.0.1", door.port))
        await asyncio.get_running_loop().sock_sendall(stalled, POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        await script.begun.wait()
        for _ in range(600):
            script.say(b"data: " + b"x" * 16384 + b"\n\n")
        await until(lambda: door.rig.traffic.in_flight("a") == 0)
        assert door.rig.ends[-1] == ("a", "client_left")
        stalled.close()


TWO_WAYS = [
    b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
    b"content-length: 4\r\ncontent-length: 5\r\n\r\n{}  ",
    b"content-length: 4\r\ncontent-length: 4\r\n\r\n{}  ",
    b"content-length: 4, 4\r\n\r\n{}  ",
    b"content-length: +4\r\n\r\n{}  ",
    b"content-length: -4\r\n\r\n{}  ",
    b"content-length: 0x4\r\n\r\n{}  ",
    b"content-length : 4\r\n\r\n{}  ",
    b"content-length: 99999999999999999999999\r\n\r\n{}  ",
    b"transfer-encoding: identity\r\n\r\n{}  ",
    b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    b"x: 1\r\n content-length: 4\r\n\r\n{}  ",
    b"transfer-encoding: chunked\r\n\r\nZ\r\n\r\n",
    b"transfer-encoding: chunked\r\n\r\n-1\r\n\r\n",
    b"transfer-encoding: chunked\r\n\r\n2\r\n{}XX\r\n0\r\n\r\n",
    b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n\r\n",
    b"host: other\r\ncontent-length: 0\r\n\r\n",
]


async def test_what_two_readers_would_cut_differently_is_refused_with_all_that_follows():
    async with front() as door:
        for rest in TWO_WAYS:
            said = statuses(await door.say(POST + rest + GET))
            assert said in ([400], [501]), rest
        assert door.rig.engines["a"].seen == []


NO_HTTP = [
    (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    (b"GET /healthz\r\n\r\n", 505),
    (b"GET /healthz HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    (b"POST /v1/chat/completions HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    (b"GET / HTTP/1.1\n" + HOST + b"\n", 400),
    (b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n", 400),
]


async def test_what_is_no_plain_http_is_refused():
    async with front() as door:
        assert [statuses(await door.say(sent)) for sent, _ in NO_HTTP] == [[status] for _, status in NO_HTTP]


async def test_requests_in_one_piece_are_answered_in_their_order():
    async with front() as door:
        said = await door.say(GET * 20 + b"GET /nothing HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n", ends=False)
        assert statuses(said) == [200] * 20 + [404]


async def test_nonsense_behind_a_request_puts_nothing_into_its_answer():
    script = Script()
    async with front() as door:
        door.rig.engines["a"].answer = script
        body = b'{"model": "a", "stream": true}'
        async with door.connection() as (reader, writer):
            writer.write(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
            await script.begun.wait()
            script.say(b"data: 1\n\n")
            said = await reader.readuntil(b"data: 1\n\n\r\n")
            writer.write(b"nonsense\r\n\r\n")
            said += await reader.read()
        assert said.count(b"HTTP/1.1") == 1
        assert not said.endswith(b"0\r\n\r\n")


async def test_a_body_that_is_too_large_is_told_so_while_it_still_comes():
    async with front() as door:
        said = await door.say(POST + b"content-length: 999999999\r\n\r\n", *[b" " * 65536] * 40)
        assert statuses(said) == [413]
        assert await door.is_well()


async def test_large_bodies_together_hold_only_so_much():
    async with front(HttpConfig(bodies_max_mib=1)) as door:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                _, writer = await stack.enter_async_context(door.connection())
                writer.write(POST + b"content-length: 900000\r\n\r\n" + b" " * 400_000)
            said = await door.say(POST + b"content-length: 900000\r\n\r\n", b" " * 899_998, b"{}")
            assert statuses(said) == [503]
            assert b"retry-after" in said.lower()
        await until(lambda: door.rig.gateway._bodies._held_bytes == 0)
