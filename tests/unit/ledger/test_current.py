"""What is true now: engines, residencies, leases, GPUs, cordons."""

import dataclasses

from rotator.adapters.ledger import SqlLedger
from rotator.core.values import Depth, Level, State
from rotator.ports import EngineRecord, GpuInfo, Lease, Residency
from tests.unit.ledger.values import Clock

FULL = EngineRecord(
    engine="glm",
    state=State.ASLEEP,
    depth=Depth.HOST,
    level=Level.HOST,
    launcher="process",
    url="http://127.0.0.1:9001",
    ref={"pid": 7, "started": 1.5},
    spec_hash="abc",
    version="0.26.0",
    canary={"greedy": {"token_ids": [1, 2]}},
    failures=2,
    reason="made room for dsv4",
    wake_s=1.25,
    sleep_s=0.5,
    start_s=91.0,
)


async def test_a_fresh_ledger_recovers_nothing(ledger: SqlLedger) -> None:
    found = await ledger.recover()
    assert (found.engines, found.residencies, found.leases) == ({}, (), ())
    assert (found.open_transitions, found.cordons) == ((), frozenset())


async def test_an_engine_is_recovered_exactly_as_it_was_put_last(ledger: SqlLedger) -> None:
    await ledger.put_engine(EngineRecord("glm", State.STARTING))
    await ledger.put_engine(FULL)
    bare = EngineRecord("dsv4", State.STOPPED)
    await ledger.put_engine(bare)
    assert (await ledger.recover()).engines == {"glm": FULL, "dsv4": bare}


async def test_what_an_engine_no_longer_has_is_forgotten(ledger: SqlLedger) -> None:
    await ledger.put_engine(FULL)
    stopped = dataclasses.replace(FULL, state=State.STOPPED, depth=None, level=None, canary=None, ref={})
    await ledger.put_engine(stopped)
    assert (await ledger.recover()).engines["glm"] == stopped


async def test_residencies_need_no_order_of_writing_and_hold_large_bytes(ledger: SqlLedger) -> None:
    rows = [
        Residency("glm", "GPU-0", planned_awake_bytes=80 << 30, held_bytes=3),
        Residency("glm", "GPU-1", awake_bytes=96 << 30, residue_bytes=2 << 30, held_bytes=1 << 50),
    ]
    await ledger.put_residencies(rows)
    await ledger.put_residencies(rows[:1])
    assert sorted((await ledger.recover()).residencies, key=lambda r: r.gpu) == rows


async def test_expired_leases_are_dropped_and_others_recovered(ledger: SqlLedger, clock: Clock) -> None:
    forever = Lease("GPU-0", "glm", 5)
    later = Lease("GPU-0", "ops", 6, expires_wall_s=clock.now_s + 10)
    sooner = Lease("GPU-1", "ops", 7, expires_wall_s=clock.now_s + 5)
    for lease in (forever, later, sooner):
        await ledger.put_lease(lease)
    clock.now_s += 6
    assert set((await ledger.recover()).leases) == {forever, later}
    assert len((await ledger.query("leases", filters={})).rows) == 2


async def test_a_lease_is_replaced_by_the_same_holders_and_dropped_by_name(ledger: SqlLedger) -> None:
    await ledger.put_lease(Lease("GPU-0", "glm", 5))
    await ledger.put_lease(Lease("GPU-0", "glm", 9))
    await ledger.put_lease(Lease("GPU-0", "ops", 1))
    await ledger.drop_lease("GPU-0", "ops")
    await ledger.drop_lease("GPU-0", "nobody")
    assert (await ledger.recover()).leases == (Lease("GPU-0", "glm", 9),)


async def test_a_cordon_survives_a_new_inventory_and_is_lifted(ledger: SqlLedger) -> None:
    await ledger.put_cordon("GPU-0", True, "fan is broken")
    await ledger.put_gpus([GpuInfo("GPU-0", 0, "RTX PRO 6000", 96 << 30, (12, 0), "0000:01:00.0", False)])
    assert (await ledger.recover()).cordons == {"GPU-0"}
    row = (await ledger.query("gpus", filters={})).rows[0]
    assert (row["name"], row["total_bytes"], row["compute_capability"]) == ("RTX PRO 6000", 96 << 30, "12.0")
    assert (row["cordoned"], row["cordon_reason"]) == (True, "fan is broken")
    await ledger.put_cordon("GPU-0", False, "")
    assert (await ledger.recover()).cordons == frozenset()
