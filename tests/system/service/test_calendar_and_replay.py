"""A reservation on real processes, over a kill of the service; and the journal of it all, planned again."""

import asyncio
import json
from pathlib import Path

import pytest

from rotator.cli.main import run
from tests.system.service.rig import engine, rig_up


async def test_a_reservation_holds_over_a_kill_and_the_journal_replays_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with rig_up(tmp_path, [engine("a"), engine("b")]) as rig:
        await rig.say("a")
        await rig.say("b")
        made = await rig.post("/reservations", engines=["a"], duration_s=7200, note="evaluation")
        await rig.until_state("a", "awake")
        status, refused = await rig.call("POST", "/reservations", json={"engines": ["b"], "duration_s": 5})
        assert (status, refused["type"]) == (409, "urn:rotator:problem:conflict")
        assert "a is kept awake by reservation" in refused["detail"]
        assert "GPU 0" in refused["detail"]
        await rig.restart()
        await rig.events.wait("calendar.begun")
        assert (await rig.view("a"))["held_by"] == f"reservation {made['id']} (evaluation)"
        answer = await rig.chat("b").end()
        assert answer.status == 503
        assert "a is kept awake by reservation" in (answer.error or "") + answer.text
        status, _ = await rig.call("DELETE", f"/reservations/{made['id']}")
        assert status == 200
        await rig.say("b")
        assert await rig.get("/reservations") == []
        assert await rig.terminate() == 0
        fleet = str(rig.folder / "fleet.yaml")
        assert await asyncio.to_thread(run, ["replay", "-c", fleet, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decisions"] >= 4
    assert found["same"] == found["decisions"], found
    assert any("reservation" in swap["why_was"] for swap in found["swaps"])
