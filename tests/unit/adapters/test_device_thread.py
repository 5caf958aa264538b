import asyncio
import threading

import pytest

from rotator.adapters.device_thread import WAITING_MAX, DeviceThread
from rotator.ports import DeviceTimeout


async def test_calls_are_made_one_after_another_in_one_daemon_thread():
    thread = DeviceThread("GPU 0")
    seen = await asyncio.gather(*(thread.call(threading.current_thread, deadline_s=5) for _ in range(8)))
    assert len(set(seen)) == 1
    assert seen[0].daemon


async def test_what_the_work_raises_is_raised():
    def fail() -> None:
        raise ValueError("as it was")

    with pytest.raises(ValueError, match="as it was"):
        await DeviceThread("GPU 0").call(fail, deadline_s=5)


async def test_a_call_that_waits_behind_a_slow_one_is_served_in_its_turn():
    thread, gate = DeviceThread("GPU 0"), threading.Event()
    slow = asyncio.ensure_future(thread.call(gate.wait, deadline_s=5))
    behind = asyncio.ensure_future(thread.call(lambda: "served", deadline_s=5))
    await asyncio.sleep(0)
    gate.set()
    assert await behind == "served"
    assert await slow is True


async def test_calls_that_waited_behind_a_hang_are_dropped_when_it_ends():
    thread, gate, made = DeviceThread("GPU 0"), threading.Event(), []
    slow = asyncio.ensure_future(thread.call(gate.wait, deadline_s=0.05))
    behind = asyncio.ensure_future(thread.call(lambda: made.append("late"), deadline_s=0.05))
    for call in (slow, behind):
        with pytest.raises(DeviceTimeout):
            await call
    gate.set()
    async with asyncio.timeout(5):
        assert await _when_free(thread) == "next"
    assert made == []


async def test_no_more_than_a_bounded_number_of_calls_waits():
    thread, gate = DeviceThread("GPU 0"), threading.Event()
    waiting = [asyncio.ensure_future(thread.call(gate.wait, deadline_s=5)) for _ in range(WAITING_MAX + 2)]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    gate.set()
    errors = [e for e in await asyncio.gather(*waiting, return_exceptions=True) if isinstance(e, Exception)]
    assert errors
    assert len(errors) <= 2
    assert all(isinstance(e, DeviceTimeout) and "already wait" in str(e) for e in errors)
    assert len(done) == len(errors)


async def _when_free(thread: DeviceThread) -> str:
    while True:
        try:
            return await thread.call(lambda: "next", deadline_s=5)
        except DeviceTimeout:
            await asyncio.sleep(0)
