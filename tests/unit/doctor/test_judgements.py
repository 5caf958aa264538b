"""Judgements on written facts: no file is read."""

import dataclasses
from typing import Any

import pytest

from rotator.config import GIB, FleetConfig
from rotator.doctor.facts import (
    DriverFacts,
    Facts,
    GpuFacts,
    GpuState,
    HostFacts,
    Launch,
    LaunchFacts,
    LedgerFacts,
    NodeFacts,
    NomadFacts,
    NomadNode,
    PciGpu,
    Port,
    PortFacts,
    Process,
    ProcessFacts,
    ShmSegment,
)
from rotator.doctor.findings import Finding, RepairKind, Severity
from rotator.doctor.layers import LAYERS, judge
from rotator.doctor.walk import examine
from rotator.ports import GpuInfo

FLEET = FleetConfig.model_validate(
    {
        "engines": [
            {"name": "glm", "gpus": [0, 1], "command": ["vllm"], "footprint": {"awake_gib": 80, "host_gib": 250}},
            {"name": "small", "gpus": [0], "command": ["vllm"]},
        ]
    }
)
GPU = GpuInfo("GPU-0", 0, "H200", 140 * GIB, (9, 0))
HOST = HostFacts(512 * GIB, 500 * GIB, free_bytes=400 * GIB, now_wall_s=1000.0, files_max=65536)


def found(layer: str, **parts: Any) -> dict[str, Finding]:
    """By code, of one layer."""
    [one] = [la for la in LAYERS if la.name == layer]
    return {f.code: f for f in judge(one, Facts(FLEET, **parts))}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"memlock_bytes": 8 << 20}, "host.memlock"),
        ({"huge_reserved_bytes": 64 * GIB, "huge_free_bytes": 64 * GIB}, "host.huge-pages"),
        ({"thp": "never"}, "host.thp"),
        ({"files_max": 1024}, "host.files"),
        ({"clock_synchronized": False}, "host.clock"),
        ({"rtc_wall_s": 9000.0}, "host.rtc"),
    ],
)
def test_what_is_wrong_with_a_host_is_told_and_nothing_else(changes: dict[str, Any], code: str):
    assert set(found("host", host=HOST)) == set()
    assert set(found("host", host=dataclasses.replace(HOST, **changes))) == {code}


def test_a_clock_that_was_set_back_is_seen_by_the_ledger_s_newest_entry():
    ledger = LedgerFacts("x", newest_wall_s=4600.0)
    assert "3600 s in the future" in found("host", host=HOST, ledger=ledger)["host.clock-back"].what


def test_page_cache_matters_on_unified_memory_alone():
    host = dataclasses.replace(HOST, total_bytes=120 * GIB, free_bytes=5 * GIB, cached_bytes=90 * GIB)
    assert found("host", host=host, gpus=GpuFacts((GpuState(GPU),))) == {}
    unified = GpuFacts((GpuState(dataclasses.replace(GPU, unified_memory=True)),))
    assert "drop_caches" in found("host", host=host, gpus=unified)["host.page-cache"].fix


def test_bytes_whose_owners_cannot_be_seen_are_not_called_nobody_s():
    held = GpuFacts((GpuState(GPU, 100 * GIB, {}),))
    assert "leftovers.vram" in found("leftovers", gpus=held, processes=ProcessFacts())
    assert found("leftovers", gpus=held, processes=ProcessFacts(sees_all=False)) == {}
    unknown = GpuFacts((GpuState(GPU, 100 * GIB, None),))
    assert found("leftovers", gpus=unknown, processes=ProcessFacts()) == {}


def test_our_own_engines_bytes_are_no_leftovers_and_another_service_s_are_foreign():
    gpus = GpuFacts((GpuState(GPU, 80 * GIB, {7: 80 * GIB}),))
    ours = Process(7, "python3", "S", 1, engine="glm", service="s1", command="vllm serve")
    assert found("leftovers", gpus=gpus, processes=ProcessFacts((ours,), service_id="s1")) == {}
    theirs = dataclasses.replace(ours, service="s2", ppid=5)
    assert set(found("leftovers", gpus=gpus, processes=ProcessFacts((theirs,), service_id="s1"))) == {
        "leftovers.foreign"
    }


def test_an_engine_that_the_fleet_file_no_longer_has_is_told_with_its_processes():
    left = Process(7, "python3", "S", 1, engine="old", service="s1")
    what = found("leftovers", processes=ProcessFacts((left,), service_id="s1"))["leftovers.engine"]
    assert what.fix.startswith("`kill 7`")


@pytest.mark.parametrize(
    ("changes", "removed"),
    [
        ({}, True),
        ({"held_by": (4,)}, False),
        ({"age_s": 10.0}, False),
        ({"name": "pulse-shm"}, False),
        ({"uid": 1001}, None),
    ],
)
def test_only_old_unheld_segments_of_our_own_are_offered_for_removal(changes: dict[str, Any], removed: bool | None):
    segment = dataclasses.replace(ShmSegment("psm_1", 4096, 1000, 3600.0), **changes)
    told = found("leftovers", processes=ProcessFacts(shm=(segment,), own_uid=1000)).get("leftovers.shm")
    assert (told is not None) == (removed is not False)
    assert (told is not None and told.repair is not None) == bool(removed)


def test_a_container_never_removes_what_its_host_may_use():
    processes = ProcessFacts(shm=(ShmSegment("psm_1", 4096, 0, 3600.0),), sees_all=False)
    assert found("leftovers", processes=processes) == {}


def test_ranks_need_peers_a_clear_bus_and_shared_memory():
    gpus = GpuFacts(tuple(GpuState(dataclasses.replace(GPU, id=f"GPU-{i}", index=i)) for i in range(2)))
    driver = DriverFacts(pci=(PciGpu("0000:01:00.0", iommu="DMA-FQ"),))
    full = ProcessFacts(shm_total_bytes=64 << 20, shm_free_bytes=60 << 20)
    gpus = dataclasses.replace(gpus, no_peer=((0, 1, "topology"),))
    told = found("nccl", gpus=gpus, driver=driver, processes=full)
    assert set(told) == {"nccl.no-peer", "nccl.iommu", "nccl.shm"}
    assert told["nccl.shm"].severity is Severity.BROKEN


def test_arguments_that_drifted_are_shown_both_ways():
    launch = Launch(
        "glm", "/vllm", expected=("serve", "/m", "--tp=4"), running=("python", "/vllm", "serve", "/m", "--tp=2")
    )
    told = found("launch", launches=LaunchFacts((launch,)))["launch.drift"]
    assert "also says --tp=4" in told.evidence
    same = dataclasses.replace(launch, running=("/py", "/vllm", "serve", "/m", "--tp=4"))
    assert found("launch", launches=LaunchFacts((same,))) == {}


def test_a_port_is_anybody_s_but_its_own_engine_s():
    own = Port(9000, "glm", "process 1 (python)", holder_engine="glm")
    assert found("network", ports=PortFacts((own,))) == {}
    taken = dataclasses.replace(own, holder_engine="", kept=True)
    repair = found("network", ports=PortFacts((taken,)))["network.kept-port"].repair
    assert repair is not None
    assert repair.kind is RepairKind.FORGET_PORT
    assert "network.port" in found("network", ports=PortFacts((taken,), service_pid=7))


def test_the_service_s_own_port_may_be_held_by_the_service():
    bind = Port(8400, "bind", "process 7 (rotator)")
    assert found("network", ports=PortFacts((bind,), service_pid=7)) == {}
    assert found("network", ports=PortFacts((bind,)))["network.bind"].severity is Severity.BROKEN


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"docker": False}, "the docker driver is not healthy"),
        ({"volumes": False}, "docker may not mount host paths"),
        ({"runtimes": ("runc",)}, "docker has no runtime nvidia"),
        ({"host_networks": ()}, "no host network 'loopback'"),
        ({"max_kill_timeout_s": 30.0}, "engines may take 60 s to stop"),
        ({"eligible": False}, "not eligible for new work"),
    ],
)
def test_settings_of_nomad_s_clients_that_engines_need(changes: dict[str, Any], says: str):
    node = NomadNode("n1", "0123456789", volumes=True, runtimes=("nvidia",), host_networks=("loopback",))
    assert found("nomad", nomad=NomadFacts("http://n", nodes=(node,), stop_grace_s=60)) == {}
    told = found("nomad", nomad=NomadFacts("http://n", "", (dataclasses.replace(node, **changes),), 60))
    assert [says in f.what for f in told.values()] == [True]


def test_versions_that_ranks_share_must_be_equal_on_all_nodes():
    same = {"torch": "2.11", "nvidia-nccl-cu13": "2.27"}
    assert found("nodes", nodes=NodeFacts({"a": same, "b": dict(same)})) == {}
    told = found("nodes", nodes=NodeFacts({"a": same, "b": {**same, "nvidia-nccl-cu13": "2.28"}}, {"c": "refused"}))
    assert told["nodes.versions"].severity is Severity.BROKEN
    assert told["nodes.versions"].evidence == "a: 2.27, b: 2.28"
    assert "node c does not answer" in told["nodes.unreachable"].what


def test_a_ledger_without_room_is_broken_and_with_little_a_risk():
    tight, none = LedgerFacts("x", free_bytes=GIB // 2), LedgerFacts("x", free_bytes=1 << 20)
    assert found("ledger", ledger=tight)["ledger.space"].severity is Severity.RISK
    assert found("ledger", ledger=none)["ledger.space"].severity is Severity.BROKEN


class Hanging:
    """Probes of a machine whose driver does not come back."""

    async def gather(self, part: str, known: Facts) -> Any:
        import asyncio

        if part == "driver":
            await asyncio.Event().wait()
        if part == "gpus":
            raise ZeroDivisionError("a fault of the probe")
        return None


async def test_a_probe_that_hangs_or_fails_is_a_finding_and_the_walk_comes_back():
    told = await examine(Hanging(), FLEET, go_on=True, deadline_s=0.01)
    by_code = {f.code: f for f in told.findings}
    assert by_code["driver.probe"].evidence == "no answer within 0.01 s"
    assert "ZeroDivisionError" in by_code["gpus.probe"].evidence
    assert set(told.looked_at) == {layer.name for layer in LAYERS}
