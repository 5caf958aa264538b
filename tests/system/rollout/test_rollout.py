"""A new version through a fleet of three real processes: the third forgets, the service dies, the command dies."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.system.rollout.stage import QUICK, Command, file_is_new, runs_new, stub, target_of
from tests.system.service.rig import Rig, rig_up

pytestmark = pytest.mark.asyncio(loop_scope="module")
ALL = ("a", "b", "c")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    folder = tmp_path_factory.mktemp("rollout")
    async with rig_up(folder, [stub(name, gpu) for gpu, name in enumerate(ALL)], gpus=3) as rig:
        await asyncio.gather(*(rig.say(name) for name in ALL))
        yield rig


async def test_the_third_that_forgets_under_concurrency_goes_back_and_two_stay_new(rig: Rig) -> None:
    target = target_of(rig, ALL, {"c": {"forget_at": 8}})
    long = await rig.chat("a", "story", 300).begun()
    command = Command(rig, "--to", str(target), *QUICK)
    assert await command.end() == 5, command.said
    answer = await long.end()
    assert answer.done
    assert answer.error is None
    assert "c failed at recall: " in command.said
    assert "of 8 concurrent needles did not come back (the version before missed 0)" in command.said
    assert "c runs its former version again" in command.said
    assert "a, b run the new version" in command.said
    assert await runs_new(rig) == file_is_new(rig) == {"a": True, "b": True, "c": False}
    assert (await rig.view("c"))["state"] == "awake"
    await rig.check()
    rows = (await rig.get("/ledger?table=baselines"))["rows"]
    assert sorted(row["engine"] for row in rows) == ["a", "a", "b", "b", "c"]
