"""The transition journal: intent before, outcome after."""

import asyncio

import pytest

from rotator.adapters.ledger import SqlLedger
from rotator.core.values import State
from rotator.ports import LedgerError
from tests.unit.ledger.values import Clock, intent, outcome


async def test_an_intent_without_outcome_is_recovered_as_it_was_written(ledger: SqlLedger) -> None:
    written = intent(plan={"evict": [{"engine": "dsv4"}], "gpus": frozenset({"1", "0"})}, at_wall_s=12.5)
    first = await ledger.open_transition(written)
    found = (await ledger.recover()).open_transitions
    assert [t.id for t in found] == [first]
    assert found[0].intent.plan == {"evict": [{"engine": "dsv4"}], "gpus": ["0", "1"]}
    assert (found[0].intent.from_state, found[0].intent.to_state) == (State.ASLEEP, State.AWAKE)
    assert (found[0].intent.swap_id, found[0].intent.at_wall_s) == ("s1", 12.5)


async def test_an_outcome_closes_its_intent_with_bytes_phases_and_duration(ledger: SqlLedger, clock: Clock) -> None:
    opened = await ledger.open_transition(intent())
    clock.now_s += 1.5
    await ledger.close_transition(
        opened, outcome(phases_s={"wake": 1.2}, bytes_before={"g0": 5}, bytes_after={"g0": 7 << 40})
    )
    assert (await ledger.recover()).open_transitions == ()
    row = (await ledger.query("transitions", filters={})).rows[0]
    assert (row["result"], row["state"], row["error"]) == ("ok", "awake", None)
    assert (row["phases_s"], row["bytes_before"], row["bytes_after"]) == ({"wake": 1.2}, {"g0": 5}, {"g0": 7 << 40})
    assert row["duration_s"] == pytest.approx(1.5)


async def test_open_transitions_come_in_the_order_they_were_begun(ledger: SqlLedger) -> None:
    ids = [await ledger.open_transition(intent(engine)) for engine in ("c", "a", "b")]
    assert [t.id for t in (await ledger.recover()).open_transitions] == ids


async def test_the_same_outcome_may_be_told_twice_but_not_another(ledger: SqlLedger) -> None:
    opened = await ledger.open_transition(intent())
    await ledger.close_transition(opened, outcome())
    await ledger.close_transition(opened, outcome())
    with pytest.raises(LedgerError, match="closed already, as 'ok'"):
        await ledger.close_transition(opened, outcome("failed"))
    assert ledger.healthy


async def test_an_outcome_of_an_unknown_transition_is_refused(ledger: SqlLedger) -> None:
    with pytest.raises(LedgerError, match="transition 99 is not in the journal"):
        await ledger.close_transition(99, outcome())


async def test_a_plan_that_is_no_json_is_refused_and_the_ledger_stays_healthy(ledger: SqlLedger) -> None:
    with pytest.raises(LedgerError, match="not JSON serializable"):
        await ledger.open_transition(intent(plan={"what": object()}))
    assert ledger.healthy
    assert await ledger.open_transition(intent()) > 0


async def test_an_intent_whose_caller_was_cancelled_is_never_left_open(ledger: SqlLedger) -> None:
    for turns in range(4):
        write = asyncio.create_task(ledger.open_transition(intent()))
        for _ in range(turns):
            await asyncio.sleep(0)
        write.cancel()
        await asyncio.wait({write})
    assert await ledger.probe()  # everything before it has been written
    assert (await ledger.recover()).open_transitions == ()


async def test_a_closed_ledger_refuses_at_once(ledger: SqlLedger) -> None:
    await ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        await ledger.open_transition(intent())
    with pytest.raises(LedgerError, match="closed"):
        await ledger.query("engines", filters={})
