"""A kept connection: whole answers, broken ones, and never one request's business in another's."""

import asyncio

import pytest

from rotator.service import channel as module
from rotator.service.channel import Channel, EngineAnswer, Lost

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Transport:
    """Records what is done to it."""

    def __init__(self) -> None:
        self.sent = b""
        self.aborted = False
        self.closed = False
        self.reading = True

    def write(self, data: bytes) -> None:
        self.sent += data

    def writelines(self, pieces: tuple[bytes, ...]) -> None:
        self.sent += b"".join(pieces)

    def is_closing(self) -> bool:
        return self.aborted or self.closed

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def connected() -> tuple[Channel, Transport, list[Channel]]:
    idle: list[Channel] = []
    channel, transport = Channel(idle.append), Transport()
    channel.connection_made(transport)  # type: ignore[arg-type] # the part of a transport in use
    return channel, transport, idle


async def asked(channel: Channel) -> "asyncio.Task[EngineAnswer]":
    task = asyncio.create_task(channel.ask(b"GET / HTTP/1.1\r\n\r\n", b""))
    await asyncio.sleep(0)
    return task


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "wire",
    [
        OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1;x=y\r\nk\r\n0\r\nTrailer: t\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    ],
)
async def test_an_answer_is_whole_however_it_was_cut_and_framed(wire: bytes, size: int) -> None:
    channel, _, idle = connected()
    asking = await asked(channel)
    for at in range(0, len(wire), size):
        channel.data_received(wire[at : at + size])
    answer = await asking
    assert (answer.status, await answer.read()) == (200, b"ok")
    assert idle == [channel]


async def test_a_connection_carries_the_next_request_before_the_last_ones_reader_has_run() -> None:
    channel, transport, idle = connected()
    first = await asked(channel)
    channel.data_received(OK)
    assert idle == [channel]
    second = await asked(channel)  # runs while the first has not been resumed to see its answer
    channel.data_received(OK.replace(b"ok", b"no"))
    assert await (await first).read() == b"ok"
    assert await (await second).read() == b"no"
    assert not transport.aborted


async def test_a_request_cancelled_after_its_answer_came_does_not_break_the_next_ones_connection() -> None:
    channel, transport, _ = connected()
    loop = asyncio.get_running_loop()
    first = await asked(channel)
    loop.call_soon(first.cancel)
    channel.data_received(OK)
    second = asyncio.create_task(channel.ask(b"", b""))
    await asyncio.gather(first, return_exceptions=True)
    assert not transport.aborted
    channel.data_received(OK)
    assert await (await second).read() == b"ok"


async def test_cancelling_a_request_without_an_answer_closes_the_connection() -> None:
    channel, transport, idle = connected()
    asking = await asked(channel)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert transport.aborted
    channel.data_received(OK)
    assert idle == []


async def test_a_connection_that_closes_before_an_answer_is_lost() -> None:
    channel, _, _ = connected()
    asking = await asked(channel)
    channel.connection_lost(None)
    with pytest.raises(Lost, match="without an answer"):
        await asking


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
    ],
)
async def test_an_answer_that_breaks_off_gives_what_came_and_then_is_lost(wire: bytes) -> None:
    channel, _, idle = connected()
    asking = await asked(channel)
    channel.data_received(wire)
    answer = await asking
    channel.connection_lost(None)
    assert await answer.readany() == b"ok"
    with pytest.raises(Lost, match="in the middle"):
        await answer.readany()
    assert idle == []


async def test_an_answer_without_any_framing_ends_with_its_connection_and_breaks_with_an_error() -> None:
    for error, ends in ((None, True), (ConnectionResetError(), False)):
        channel, _, idle = connected()
        asking = await asked(channel)
        channel.data_received(b"HTTP/1.1 200 OK\r\n\r\nok")
        answer = await asking
        channel.connection_lost(error)
        if ends:
            assert await answer.read() == b"ok"
        else:
            with pytest.raises(Lost):
                await answer.read()
        assert idle == []


async def test_a_connection_that_the_engine_will_close_is_not_kept() -> None:
    channel, transport, idle = connected()
    asking = await asked(channel)
    channel.data_received(OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    assert await (await asking).read() == b"ok"
    assert idle == []
    assert transport.closed


@pytest.mark.parametrize("wire", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"])
async def test_what_is_no_http_is_lost_and_the_connection_dropped(wire: bytes) -> None:
    channel, transport, _ = connected()
    asking = await asked(channel)
    channel.data_received(wire)
    with pytest.raises(Lost, match="no HTTP"):
        await asking
    assert transport.aborted


async def test_headers_without_bound_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEADER_BYTES_MAX", 100)
    channel, transport, _ = connected()
    asking = await asked(channel)
    channel.data_received(b"HTTP/1.1 200 OK\r\n" + b"x-h: 0123456789\r\n" * 20)
    with pytest.raises(Lost):
        await asking
    assert transport.aborted


async def test_an_engine_that_is_ahead_of_its_reader_is_not_read_from_until_the_reader_catches_up() -> None:
    channel, transport, _ = connected()
    asking = await asked(channel)
    channel.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 400000\r\n\r\n" + b"x" * 200_000)
    answer = await asking
    assert not transport.reading
    assert len(await answer.readany()) == 200_000
    assert transport.reading
    channel.data_received(b"x" * 200_000)
    assert transport.reading  # the answer is whole: the connection reads for the next one
    assert len(await answer.read()) == 200_000


async def test_giving_up_an_answer_closes_its_connection_only_while_it_is_its_own() -> None:
    channel, transport, _ = connected()
    asking = await asked(channel)
    channel.data_received(OK)
    answer = await asking
    answer.close()
    assert not transport.aborted
    asking = await asked(channel)
    channel.data_received(OK[:-1])
    (await asking).close()
    assert transport.aborted


async def test_a_large_body_is_sent_without_being_copied_together() -> None:
    channel, transport, _ = connected()
    asking = asyncio.create_task(channel.ask(b"HEAD", b"b" * 200_000))
    await asyncio.sleep(0)
    assert transport.sent == b"HEAD" + b"b" * 200_000
    asking.cancel()


async def test_reading_can_be_cancelled_and_begun_again_without_losing_a_byte() -> None:
    channel, _, _ = connected()
    asking = await asked(channel)
    channel.data_received(OK[:-2])
    answer = await asking
    reading = asyncio.create_task(answer.readany())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(reading.cancel)
    channel.data_received(b"ok")
    await asyncio.gather(reading, return_exceptions=True)
    if reading.cancelled():
        assert await answer.readany() == b"ok"
    else:
        assert reading.result() == b"ok"


async def test_an_engine_that_speaks_unasked_loses_its_connection() -> None:
    channel, transport, idle = connected()
    asking = await asked(channel)
    channel.data_received(OK)
    await asking
    channel.data_received(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
    assert transport.aborted
    assert not idle[0].usable
