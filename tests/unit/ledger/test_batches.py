"""What the data plane counts: in memory, bounded, written in batches."""

from typing import Any

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError

from rotator.adapters.ledger import SqlLedger
from rotator.adapters.ledger_buffers import BATCH_MAX, REQUEST_KEYS_MAX, SAMPLES_MAX, Buffers
from rotator.ports import LedgerError
from tests.unit.ledger.values import Clock


async def test_requests_are_summed_by_model_and_minute(ledger: SqlLedger, clock: Clock) -> None:
    clock.now_s = 1_700_000_040.0
    for waited_s, outcome in ((1.0, "ok"), (3.0, "failed"), (2.0, "client_left")):
        ledger.count_request("glm", waited_s=waited_s, outcome=outcome)
    await ledger.flush()
    ledger.count_request("glm", waited_s=0.5, outcome="expired")
    clock.now_s += 60
    ledger.count_request("glm", waited_s=9.0, outcome="ok")
    ledger.count_request("dsv4", waited_s=0.0, outcome="ok")
    await ledger.flush()
    row = (await ledger.query("requests", filters={"model": "glm", "until": "1700000041"})).rows[0]
    assert row == {
        "model": "glm", "minute_wall_s": 1_700_000_040, "requests": 4, "failed": 2, "client_left": 1,
        "waited_s_sum": 6.5, "waited_s_max": 3.0,
    }  # fmt: skip
    totals = await ledger.totals()
    assert totals["glm"] == {
        "requests": 5, "failed": 2, "client_left": 1, "waited_s_sum": 15.5, "waited_s_max": 9.0,
    }  # fmt: skip
    assert totals["dsv4"]["requests"] == 1


async def test_totals_include_what_was_counted_a_moment_ago(ledger: SqlLedger) -> None:
    ledger.count_request("glm", waited_s=0, outcome="ok")
    assert (await ledger.totals())["glm"]["requests"] == 1


async def test_a_full_batch_is_written_by_itself_without_waiting_for_the_clock(ledger: SqlLedger) -> None:
    for i in range(BATCH_MAX):
        ledger.sample_vram(float(i), "g0", i, {"glm": i})
    written: list[int] = []

    async def rows() -> int:
        return len((await ledger.query("vram_samples", filters={}, limit=1000)).rows)

    for _ in range(200):
        written.append(await rows())
        if written[-1] == BATCH_MAX:
            break
    assert written[-1] == BATCH_MAX


async def test_what_no_database_could_take_is_made_fit(ledger: SqlLedger) -> None:
    ledger.count_request("m\udcff\0" + "x" * 500, waited_s=float("nan"), outcome="ok")
    ledger.sample_vram(float("inf"), "g0", 1 << 80, {"\ud800": 1 << 90})
    await ledger.flush()
    assert (await ledger.query("vram_samples", filters={})).rows[0]["used_bytes"] == (1 << 63) - 1
    assert (await ledger.query("requests", filters={})).rows[0]["requests"] == 1
    assert ledger.dropped == 0


async def test_nothing_is_lost_or_counted_twice_while_the_disk_refuses(ledger: SqlLedger) -> None:
    def refuse(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        raise OperationalError(statement, {}, Exception("database or disk is full"))

    event.listen(Engine, "before_cursor_execute", refuse)
    try:
        for i in range(BATCH_MAX + 5):
            ledger.sample_vram(float(i), "g0", i, {})
            ledger.count_request("glm", waited_s=1, outcome="ok")
        with pytest.raises(LedgerError, match="full"):
            await ledger.flush()
        assert not ledger.healthy
    finally:
        event.remove(Engine, "before_cursor_execute", refuse)
    assert await ledger.probe()
    assert ledger.healthy
    assert (await ledger.totals())["glm"]["requests"] == BATCH_MAX + 5
    rows = (await ledger.query("vram_samples", filters={}, limit=1000)).rows
    assert [row["used_bytes"] for row in rows] == list(range(BATCH_MAX + 5))[::-1]


def test_a_buffer_drops_its_oldest_samples_when_full() -> None:
    buffers = Buffers()
    for i in range(SAMPLES_MAX + 3):
        buffers.add_sample(float(i), "g0", i, {})
    assert len(buffers) == SAMPLES_MAX
    assert buffers.dropped == 3
    assert buffers.take().samples[0].used_bytes == 3


def test_a_batch_put_back_is_the_oldest_again() -> None:
    buffers = Buffers()
    for i in range(3):
        buffers.add_sample(float(i), "g0", i, {})
    batch = buffers.take()
    buffers.add_sample(3.0, "g0", 3, {})
    buffers.put_back(batch)
    assert [sample.used_bytes for sample in buffers.take().samples] == [0, 1, 2, 3]


def test_beyond_its_bound_a_models_requests_go_into_an_older_minute_and_are_not_lost() -> None:
    buffers = Buffers()
    for minute in range(REQUEST_KEYS_MAX + 100):
        buffers.add_request(minute * 60.0, "glm", 1.0, "ok")
    buffers.add_request(0.0, "never seen", 1.0, "ok")
    assert len(buffers) == REQUEST_KEYS_MAX
    counted = 0
    while batch := buffers.take():
        counted += sum(total.requests for total in batch.requests.values())
    assert counted == REQUEST_KEYS_MAX + 100
    assert buffers.dropped == 1


def test_every_outcome_but_ok_and_client_left_is_a_failure() -> None:
    buffers = Buffers()
    for outcome in ("ok", "client_left", "failed", "aborted", "refused", "expired"):
        buffers.add_request(0.0, "glm", 0.0, outcome)
    total = buffers.take().requests["glm", 0]
    assert (total.requests, total.failed, total.client_left) == (6, 4, 1)
