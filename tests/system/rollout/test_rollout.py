"""A new version through a fleet of three real processes: the third forgets, the service dies, the command dies."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.nomad_double import NomadDouble
from tests.system.rollout.stage import NAMES, QUICK, Command, in_file, stage, target, versions
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


async def test_a_service_that_is_killed_in_the_middle_is_waited_for_and_no_version_is_doubled(
    both: tuple[Rig, NomadDouble],
) -> None:
    rig, nomad = both
    before = versions(rig)
    command = Command(rig, "--to", str(target(rig, nomad, "3", ["c"])), *QUICK)
    await command.until_said("c: switch")
    await rig.restart()
    assert await command.end() == 0, command.said
    assert versions(rig) == in_file(rig) == {**before, "c": "3"}
    await rig.check()


async def test_a_command_that_is_killed_goes_on_where_it_was_and_waits_while_nomad_is_away(
    both: tuple[Rig, NomadDouble],
) -> None:
    rig, nomad = both
    before = versions(rig)
    killed = Command(rig, "--to", str(target(rig, nomad, "4", ["c"])), *QUICK)
    await killed.until_said("c: stop")
    await killed.kill()
    another = Command(rig, "--to", str(rig.folder / "target.yaml"), *QUICK)
    assert await another.end() == 4
    assert "is under way: --resume it, or --abort it" in another.said
    await nomad.stop()
    resumed = Command(rig, "--resume")
    await resumed.until_said("waits: ")
    assert "cannot be reached" in resumed.said
    shown = Command(rig, "--status")
    assert await shown.end() == 0
    assert "it waits: " in shown.said
    await nomad.start()
    assert await resumed.end() == 0
    assert versions(rig) == in_file(rig) == {**before, "c": "4"}
    await rig.check()


async def test_an_operators_abort_takes_the_engine_back(both: tuple[Rig, NomadDouble]) -> None:
    rig, nomad = both
    before = versions(rig)
    killed = Command(rig, "--to", str(target(rig, nomad, "5", ["c", "b"])), *QUICK)
    await killed.until_said("b: start")
    await killed.kill()
    aborted = Command(rig, "--abort")
    assert await aborted.end() == 5
    assert "b was aborted" in aborted.said
    assert versions(rig) == in_file(rig) == before
