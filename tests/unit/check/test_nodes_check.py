"""``rotator check`` of a fleet of several machines."""

from pathlib import Path
from typing import Any

import yaml

from rotator import config
from rotator.check import check_fleet
from rotator.ports import GpuInfo
from tests.unit.check.fakes import GIB, FakeDevices, FakeMachine


def fleet(*gpus: str, **more: Any) -> config.FleetConfig:
    engine = {
        "name": "glm",
        "launcher": "attach",
        "url": "http://127.0.0.1:8001",
        "gpus": list(gpus),
        "footprint": {"awake_gib": 80, "residue_gib": 2, "host_gib": 900},
        **more,
    }
    nodes = [{"name": "b", "agent": "http://127.0.0.1:8411", "token_file": "token", "pool": "big", "gpus": [0]}]
    return config.parse(yaml.safe_dump({"nodes": nodes, "engines": [engine]}), base=Path("/etc/rotator"))


def devices() -> FakeDevices:
    made = FakeDevices(1)
    made.infos += tuple(GpuInfo(f"b/GPU-{i}", i, "RTX PRO 6000", 96 * GIB, node="b") for i in range(2))
    return made


async def lines(made: config.FleetConfig, devices: FakeDevices) -> list[str]:
    return [f.line for f in await check_fleet(made, devices, FakeMachine()) if f.is_error]


async def test_gpus_of_nodes_are_found_by_index_and_uuid_and_pool() -> None:
    assert await lines(fleet("b/0"), devices()) == []
    assert await lines(fleet("b/GPU-0"), devices()) == []
    assert await lines(fleet("0", node="big"), devices()) == []


async def test_a_gpu_that_is_not_there_or_not_allowed_is_told_by_its_node() -> None:
    (line,) = await lines(fleet("b/7"), devices())
    assert "there is no GPU b/7" in line
    (line,) = await lines(fleet("b/1"), devices())
    assert "b/1" in line


async def test_a_node_without_an_answer_is_told_with_what_to_do() -> None:
    alone = FakeDevices(1)
    found = await lines(fleet("b/0"), alone)
    assert any("node 'b'" in line and "systemctl status rotator-agent" in line for line in found)


async def test_masters_of_another_node_need_no_ram_here() -> None:
    found = await check_fleet(fleet("b/0"), devices(), FakeMachine())
    assert not any("masters" in f.line for f in found)
