"""Interruptions: ours are told from those of others, and a stall is nudged without losing its place."""

import asyncio

import pytest

from rotator.service.traffic import Limits, Traffic
from rotator.service.watch import Stall, Watch


class Client:
    """An ASGI ``receive`` whose client leaves when told to."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def __call__(self) -> dict[str, object]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def interrupted(watch_made: "asyncio.Future[Watch]", client: Client) -> str:
    watch = Watch(client)
    watch_made.set_result(watch)
    try:
        watch.listen()
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if not watch.absorb():
            raise
        return "left" if watch.left else f"cut: {watch.reason}"
    finally:
        watch.stop()
    return "?"


async def test_a_client_that_leaves_interrupts_its_request() -> None:
    client = Client()
    task = asyncio.create_task(interrupted(asyncio.get_running_loop().create_future(), client))
    await asyncio.sleep(0)
    client.gone.set()
    assert await task == "left"


async def test_a_cut_interrupts_its_request_with_the_reason() -> None:
    made: asyncio.Future[Watch] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(interrupted(made, Client()))
    (await made).cut("forced")
    assert await task == "cut: forced"


async def test_a_cancel_by_somebody_else_is_not_absorbed_even_when_ours_came_first() -> None:
    made: asyncio.Future[Watch] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(interrupted(made, Client()))
    (await made).cut("forced")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_watch_that_stopped_interrupts_nothing() -> None:
    watch = Watch(Client())
    watch.listen()
    watch.stop()
    watch.cut("late")
    await asyncio.sleep(0)
    assert watch.left is False


def held_ticket(held: bool) -> tuple[Traffic, object]:
    traffic = Traffic(queue_total_max=1, on_demand=lambda _: None, on_request_end=lambda *_: None, eta=lambda _: None)
    traffic.configure({"a": Limits(1, 1, 1)})
    traffic.open("a")
    ticket = traffic.try_enter("a", "a")
    if held:
        traffic.hold("a")
    return traffic, ticket


async def test_a_stream_that_stands_still_is_nudged_and_waits_on() -> None:
    _, ticket = held_ticket(held=True)
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    with Stall(ticket, 0.001) as stall:  # type: ignore[arg-type] # a ticket
        assert await stall.wait(queue.get) is None
        assert await stall.wait(queue.get) is None
        queue.put_nowait(b"x")
        assert await stall.wait(queue.get) == b"x"


async def test_a_stream_that_flows_is_left_alone() -> None:
    _, ticket = held_ticket(held=False)
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    asyncio.get_running_loop().call_later(0.02, queue.put_nowait, b"x")
    with Stall(ticket, 0.001) as stall:  # type: ignore[arg-type] # a ticket
        assert await stall.wait(queue.get) == b"x"
