"""Incidents in the ledger, and what of them a restart is told."""

from dataclasses import replace

from rotator.adapters import ledger as module
from rotator.adapters.ledger import SqlLedger
from rotator.core.values import State
from rotator.ports import EngineRecord, GpuInfo, Incident
from tests.unit.ledger.values import Clock

ONE = Incident("20261121T110000Z-glm", 1_000.0, "wedged", "serious", "nothing moved", "glm", None, "killed")


async def test_an_incident_is_written_as_it_is_now_and_found_after_a_restart(ledger: SqlLedger) -> None:
    closed = replace(ONE, closed_wall_s=1_060.0, outcome="back in service", bundle_bytes=7)
    await ledger.put_incident(ONE)
    await ledger.put_incident(closed)
    assert (await ledger.recover()).incidents == (closed,)


async def test_closed_incidents_go_with_the_journals_age_and_open_ones_stay(ledger: SqlLedger, clock: Clock) -> None:
    old_s = clock.now_s - 31 * 86400
    await ledger.put_incident(replace(ONE, id="open", opened_wall_s=old_s))
    await ledger.put_incident(replace(ONE, id="closed", opened_wall_s=old_s, closed_wall_s=old_s + 1))
    await ledger._round(module.RETENTION_EVERY_S + ledger._retain_at_s)
    assert [i.id for i in (await ledger.recover()).incidents] == ["open"]


async def test_a_cordon_keeps_its_reason_over_a_restart(ledger: SqlLedger) -> None:
    await ledger.put_gpus([GpuInfo("GPU-0", 0, "card", 1)])
    await ledger.put_cordon("GPU-0", True, "it fell off the bus: power-cycle the machine")
    found = await ledger.recover()
    assert found.cordon_reasons == {"GPU-0": "it fell off the bus: power-cycle the machine"}


async def test_an_engines_latest_faults_are_remembered_for_its_breaker(ledger: SqlLedger) -> None:
    await ledger.put_engine(EngineRecord("glm", State.FAILED, faults=(10.0, 20.5)))
    assert (await ledger.recover()).engines["glm"].faults == (10.0, 20.5)
