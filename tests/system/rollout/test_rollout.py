"""A new version through a fleet of three real processes: the third forgets, the service dies, the command dies."""

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.nomad_double import NomadDouble
from tests.system.rollout.stage import NAMES, QUICK, Command, Killable, in_file, stage, target, versions
from tests.system.service.rig import Rig

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Rig, NomadDouble]]:
    async with stage(tmp_path_factory.mktemp("rollout")) as both:
        yield both


async def test_the_third_that_forgets_under_concurrency_goes_back_and_two_stay_new(
    both: tuple[Rig, NomadDouble],
) -> None:
    rig, nomad = both
    command = Command(rig, "--to", str(target(rig, nomad, "2", NAMES, forgetful=["c"])), *QUICK)
    await command.until_said("c: baseline")
    assert await rig.say("a")
    assert await rig.say("b"), "the others go on"
    assert await command.end() == 5, command.said
    assert "c failed at recall: " in command.said
    assert "of 8 concurrent needles did not come back (the version before missed 0)" in command.said
    assert "c runs its former version again" in command.said
    assert "a, b run the new version" in command.said
    assert versions(rig) == in_file(rig) == {"a": "2", "b": "2", "c": "1"}
    await rig.check()
    rows = (await rig.get("/ledger?table=baselines"))["rows"]
    assert sorted(row["engine"] for row in rows) == ["a", "a", "b", "b", "c"]


async def test_command_nomad_and_service_go_away_in_turn_and_one_version_comes_out(
    both: tuple[Rig, NomadDouble],
) -> None:
    rig, nomad = both
    before = versions(rig)
    await Killable(rig, "--to", str(target(rig, nomad, "3", ["c"])), *QUICK).killed_after("c: stop")
    another = Command(rig, "--to", str(rig.folder / "target.yaml"), *QUICK)
    assert await another.end() == 4
    assert "is under way: --resume it, or --abort it" in another.said
    await nomad.stop()
    resumed = Command(rig, "--resume")
    await resumed.until_said("waits: ")
    assert "cannot be reached" in resumed.said
    shown = json.loads((rig.folder / "state" / "rollout" / "rollout.json").read_text())
    assert "cannot be reached" in shown["waiting"]
    await nomad.start()
    await resumed.until_said("c: start")
    await rig.restart()
    assert await resumed.end() == 0, resumed.said
    assert "c: baseline" not in resumed.said, "what was done is not done again"
    assert versions(rig) == in_file(rig) == {**before, "c": "3"}
    await rig.check()
