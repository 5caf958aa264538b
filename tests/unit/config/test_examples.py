"""The examples are fleets that could run: on their machine, with their models, nothing is wrong with them."""

from pathlib import Path

import pytest

from rotator import config
from rotator.check import check_fleet
from tests.unit.check.fakes import FakeDevices, FakeMachine

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize(("name", "gpus"), [("fleet.yaml", 4), ("single-gpu.yaml", 1), ("calendar.yaml", 2)])
async def test_an_example_brings_no_error_on_the_machine_it_is_for(name: str, gpus: int):
    machine = FakeMachine()
    machine.memory_gib = 768
    found = await check_fleet(config.load(EXAMPLES / name), FakeDevices(gpus), machine)
    assert [f.line for f in found if f.is_error] == []


def test_the_large_example_is_the_box_it_says_it_is():
    fleet = config.load(EXAMPLES / "fleet.yaml")
    assert [e.name for e in fleet.engines if e.tp == 4] == ["dsv4-flash", "glm-5.1", "mimo-v2.5-flash"]
    assert [e.gpus for e in fleet.engines if e.tp is None] == [(3,), (3,)]
    masters = sum(e.footprint.host_gib or 0 for e in fleet.engines if e.footprint)
    assert fleet.host_memory_gib is not None
    assert masters <= fleet.host_memory_gib
