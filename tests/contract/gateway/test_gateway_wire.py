"""The server's side of a connection: fewer, larger writes, and nothing lost or late for it."""

import asyncio
import json

from rotator.service.wire import Corked
from tests.contract.gateway.rig import Script, chat, raw_client, rig_up


class Transport:
    """Records what is done to it."""

    def __init__(self) -> None:
        self.done: list[object] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.done.append(data)

    def close(self) -> None:
        self.done.append("close")

    def abort(self) -> None:
        self.done.append("abort")

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str) -> str:
        return f"the real {name}"


def corked() -> tuple[Transport, Corked]:
    real = Transport()
    return real, Corked(real, asyncio.get_running_loop())  # type: ignore[arg-type] # the part of a transport in use


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


async def test_an_answers_head_goes_with_the_body_that_follows_in_the_same_turn() -> None:
    real, transport = corked()
    transport.write(HEAD)
    assert real.done == []
    transport.write(b"body")
    assert real.done == [HEAD + b"body"]
    await asyncio.sleep(0)
    assert real.done == [HEAD + b"body"]


async def test_a_head_that_nothing_follows_is_sent_at_the_turns_end_and_events_at_once() -> None:
    real, transport = corked()
    transport.write(HEAD)
    await asyncio.sleep(0)
    assert real.done == [HEAD]
    transport.write(b"event")
    assert real.done == [HEAD, b"event"]


async def test_closing_sends_what_was_written_first() -> None:
    real, transport = corked()
    transport.write(HEAD)
    transport.close()
    await asyncio.sleep(0)
    assert real.done == [HEAD, "close"]


async def test_aborting_and_a_client_that_left_send_nothing() -> None:
    real, transport = corked()
    transport.write(HEAD)
    transport.abort()
    await asyncio.sleep(0)
    assert real.done == ["abort"]
    real.closing = True
    transport.write(HEAD)
    await asyncio.sleep(0)
    assert real.done == ["abort"]


async def test_all_else_is_the_real_transports() -> None:
    _, transport = corked()
    assert transport.get_extra_info("socket") == "the real socket"


async def test_requests_on_one_kept_connection_are_answered_in_order() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        for n in range(3):  # pipelined: all sent before the first answer
            body = json.dumps({"model": "a", "n": n}).encode()
            await client.request("POST", "/v1/completions", body)
        for n in range(3):
            assert (await client.until(b"}")).endswith(b'"n": %d}' % n)


async def test_a_stream_after_a_plain_answer_on_the_same_connection_flows_event_by_event() -> None:
    async with rig_up() as rig, raw_client(rig) as client:
        await client.request("POST", "/v1/completions", b'{"model":"a"}')
        await client.until(b'{"model":"a"}')
        script = rig.engines["a"].answer = Script()
        await client.request("POST", "/v1/completions", json.dumps(chat(stream=True)).encode())
        script.say(b"data: 1\n\n")
        await client.until(b"data: 1\n\n\r\n")
        script.say(b"data: 2\n\n")
        script.end()
        assert (await client.until(b"0\r\n\r\n")).startswith(b"9\r\ndata: 2\n\n")
