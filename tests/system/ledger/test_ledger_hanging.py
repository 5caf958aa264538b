"""A disk that hangs or refuses, and the background task that goes on by itself."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError

from rotator.adapters.ledger import SqlLedger
from rotator.ports import LedgerError
from tests.unit.ledger.values import Clock, intent, until


@contextmanager
def hanging_disk() -> Iterator[threading.Event]:
    """Every statement stands still until the event is set."""
    goes_on = threading.Event()

    def hang(*_: Any) -> None:
        goes_on.wait(30)

    event.listen(Engine, "before_cursor_execute", hang)
    try:
        yield goes_on
    finally:
        goes_on.set()
        event.remove(Engine, "before_cursor_execute", hang)


async def quick_ledger() -> SqlLedger:
    return await SqlLedger.open("sqlite://", deadline_s=0.2, sample_retention_h=1)


async def test_a_hanging_disk_is_an_error_within_the_deadline_and_the_loop_goes_on() -> None:
    ledger = await quick_ledger()
    with hanging_disk():
        loop = asyncio.get_running_loop()
        began_s, ticks = loop.time(), 0
        write = asyncio.create_task(ledger.open_transition(intent()))
        while not write.done():
            await asyncio.sleep(0.01)
            ticks += 1
        with pytest.raises(LedgerError, match=r"has not answered within 0\.2 s"):
            await write
        assert loop.time() - began_s < 2
        assert ticks > 5
        assert not ledger.healthy
    await ledger.close()


async def test_a_hanging_disk_is_not_piled_upon() -> None:
    ledger = await quick_ledger()
    with hanging_disk():
        with pytest.raises(LedgerError):
            await ledger.open_transition(intent())
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for _ in range(1000):
            with pytest.raises(LedgerError):
                await ledger.open_transition(intent())
        assert await ledger.probe() is False
        assert loop.time() - began_s < 1  # refused at once: not one of them waited
    await ledger.close()


async def test_an_intent_written_too_late_is_closed_as_abandoned_and_health_comes_back() -> None:
    ledger = await quick_ledger()
    with hanging_disk() as goes_on:
        with pytest.raises(LedgerError):
            await ledger.open_transition(intent())
        goes_on.set()
        await until(lambda: ledger.healthy)
    assert await ledger.probe()
    assert (await ledger.recover()).open_transitions == ()
    rows = (await ledger.query("transitions", filters={})).rows
    assert [row["result"] for row in rows] == ["abandoned"]
    await ledger.close()


async def test_closing_is_bounded_when_the_disk_hangs() -> None:
    ledger = await quick_ledger()
    with hanging_disk():
        ledger.count_request("glm", waited_s=1, outcome="ok")
        async with asyncio.timeout(5):
            await ledger.close()
    assert not ledger.healthy


async def samples(ledger: SqlLedger) -> list[int]:
    return [row["used_bytes"] for row in (await ledger.query("vram_samples", filters={}, limit=1000)).rows]


async def samples_left(ledger: SqlLedger, count: int) -> list[int]:
    """Wait until only ``count`` samples are left. Raises TimeoutError."""
    async with asyncio.timeout(20):
        while len(left := await samples(ledger)) != count:  # noqa: ASYNC110  # a deletion sets no event
            await asyncio.sleep(0.05)
    return left


async def test_old_samples_go_and_young_ones_stay() -> None:
    clock = Clock()
    ledger = await SqlLedger.open("sqlite://", deadline_s=5, sample_retention_h=1, wall=clock)
    for age_s in (0, 3599, *[3601] * 1200):  # the old ones are more than two batches
        ledger.sample_vram(clock.now_s - age_s, "g0", age_s, {})
    assert sorted(await samples_left(ledger, 2)) == [0, 3599]
    await ledger.close()


async def test_a_refusing_disk_is_tried_again_without_anybody_asking(tmp_path: Path) -> None:
    ledger = await SqlLedger.open(f"sqlite:///{tmp_path / 'ledger.db'}", deadline_s=5, sample_retention_h=1)
    ledger.sample_vram(0.0, "g0", 1, {})
    await ledger.flush()
    await samples_left(ledger, 0)  # from here on the background has nothing else to write

    def refuse(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        raise OperationalError(statement, {}, Exception("readonly"))

    event.listen(Engine, "before_cursor_execute", refuse)
    try:
        assert await ledger.probe() is False
    finally:
        event.remove(Engine, "before_cursor_execute", refuse)
    assert not ledger.healthy
    await until(lambda: ledger.healthy)
    await ledger.close()
