"""The thread that does the ledger's blocking work."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from rotator.adapters.ledger_worker import PENDING_MAX, Stuck, Worker
from rotator.ports import LedgerError
from tests.unit.ledger.values import until


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[Worker]:
    made = Worker("ledger's writer")
    yield made
    made.stop()


async def test_calls_are_made_in_order_on_one_thread(worker: Worker) -> None:
    seen: list[tuple[int, str]] = []

    def call(i: int) -> None:
        seen.append((i, threading.current_thread().name))

    await asyncio.gather(*(worker.run(lambda i=i: call(i), deadline_s=5) for i in range(20)))  # type: ignore[misc]
    assert seen == [(i, "ledger's writer") for i in range(20)]


async def test_what_a_call_raises_reaches_its_caller_and_the_thread_lives_on(worker: Worker) -> None:
    with pytest.raises(ZeroDivisionError):
        await worker.run(lambda: 1 // 0, deadline_s=5)
    assert await worker.run(lambda: 7, deadline_s=5) == 7


async def test_a_result_that_came_just_before_its_caller_was_cancelled_is_told_late(worker: Worker) -> None:
    told: list[int] = []
    after = threading.Event()
    first = asyncio.create_task(worker.run(lambda: 7, deadline_s=5, late=told.append))
    second = asyncio.create_task(worker.run(after.set, deadline_s=5))
    await asyncio.sleep(0)
    assert after.wait(5)  # the loop stands still: the first result is there and nobody has looked
    first.cancel()
    await asyncio.wait({first, second})
    assert first.cancelled()
    await worker.run(lambda: None, deadline_s=5)
    assert told == [7]


async def test_a_call_that_had_not_begun_by_its_deadline_never_runs(worker: Worker) -> None:
    goes_on = threading.Event()
    ran: list[int] = []
    hanging = asyncio.create_task(worker.run(lambda: goes_on.wait(30), deadline_s=0.05))
    queued = asyncio.create_task(worker.run(lambda: ran.append(1), deadline_s=0.05))
    for task in (hanging, queued):
        with pytest.raises(Stuck):
            await task
    goes_on.set()
    await until(lambda: not worker.is_stuck)
    await worker.run(lambda: ran.append(2), deadline_s=5)
    assert ran == [2]


async def test_a_patient_caller_learns_the_end_while_others_are_refused(worker: Worker) -> None:
    goes_on = threading.Event()
    patient = asyncio.create_task(worker.run(lambda: goes_on.wait(30), deadline_s=0.05, patient=True))
    await until(lambda: worker.is_stuck)
    with pytest.raises(Stuck):
        await worker.run(lambda: None, deadline_s=5)
    goes_on.set()
    assert await patient is True
    assert await worker.run(lambda: 3, deadline_s=5) == 3


async def test_the_queue_is_bounded(worker: Worker) -> None:
    goes_on = threading.Event()
    hanging = asyncio.create_task(worker.run(lambda: goes_on.wait(30), deadline_s=20))
    queued = [asyncio.create_task(worker.run(lambda: None, deadline_s=20)) for _ in range(PENDING_MAX + 10)]
    await until(lambda: any(task.done() for task in queued))
    refused = [task for task in queued if task.done()]
    assert 1 <= len(refused) <= 11
    assert all(isinstance(task.exception(), LedgerError) for task in refused)
    goes_on.set()
    await asyncio.gather(hanging, *(task for task in queued if task not in refused))


async def test_a_stopped_worker_refuses_at_once(worker: Worker) -> None:
    worker.stop()
    with pytest.raises(LedgerError, match="closed"):
        await worker.run(lambda: None, deadline_s=5)
