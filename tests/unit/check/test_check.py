"""``rotator check``: what cannot work here, each in one line with its fix."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rotator import config
from rotator.check import Finding, check_fleet
from rotator.ports import DeviceError, DeviceTimeout
from tests.unit.check.fakes import FakeDevices, FakeMachine

VLLM = [
    "/opt/vllm/bin/vllm",
    "serve",
    "/models/small",
    "--served-model-name",
    "{name}",
    "--host",
    "127.0.0.1",
    "--port",
    "{port}",
    "--enable-sleep-mode",
]


def engine(name: str = "small", *gpus: int, **more: Any) -> dict[str, Any]:
    """A vLLM engine with which nothing is wrong."""
    return {
        "name": name,
        "gpus": list(gpus or (0,)),
        "command": VLLM,
        "env": {"VLLM_SERVER_DEV_MODE": "1"},
        "footprint": {"awake_gib": 40, "residue_gib": 2, "host_gib": 30},
        **more,
    }


def fleet(*engines: dict[str, Any], **more: Any) -> config.FleetConfig:
    return config.parse(yaml.safe_dump({"engines": list(engines) or [engine()], **more}), base=Path("/etc/rotator"))


async def check(
    *engines: dict[str, Any], machine: FakeMachine | None = None, devices: FakeDevices | None = None, **more: Any
) -> list[Finding]:
    found = await check_fleet(fleet(*engines, **more), devices or FakeDevices(), machine or FakeMachine())
    for finding in found:
        assert "\n" not in finding.line
        assert ": " in finding.line, "what is wrong, then the fix"
    return list(found)


async def only(*engines: dict[str, Any], is_error: bool = True, **more: Any) -> str:
    """The one finding."""
    [finding] = await check(*engines, **more)
    assert finding.is_error is is_error
    return finding.line


async def test_a_good_fleet_brings_no_findings():
    assert await check(engine("a"), engine("b", 1)) == []


# -- the service -----------------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_told_with_its_holder():
    machine = FakeMachine()
    machine.held = {8400: "process 77 (nginx)"}
    assert "8400 is held by process 77 (nginx)" in await only(machine=machine)


async def test_a_port_that_the_fleets_own_service_holds_is_only_noted():
    machine = FakeMachine()
    machine.held, machine.service = {8400: "process 77 (rotator)"}, 77
    [found] = await check(machine=machine)
    assert found.level == "note"
    assert "own service (process 77)" in found.line


async def test_a_state_folder_that_cannot_be_written_is_told():
    machine = FakeMachine()
    machine.readonly = {Path("/etc/rotator/state"): "permission denied"}
    assert (await only(machine=machine)).startswith("state_dir: /etc/rotator/state cannot be written")


async def test_a_ledger_that_does_not_open_is_told():
    machine = FakeMachine()
    machine.ledger = "connection refused"
    assert "connection refused" in await only(machine=machine, ledger={"url": "postgresql://db/rotator"})


async def test_keys_without_an_administrator_are_worth_a_warning():
    keys = [{"name": "ci", "sha256": "0" * 64, "scopes": ["operate"]}]
    assert "none has scope admin" in await only(keys=keys, is_error=False)


async def test_a_key_that_is_the_digest_of_nothing_is_refused():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    keys = [{"name": "ci", "sha256": empty, "scopes": ["admin"]}]
    assert (await only(keys=keys)).startswith("key 'ci': is the digest of nothing")


# -- engines ---------------------------------------------------------------------------------------------------------


async def test_a_program_that_cannot_be_run_is_told():
    machine = FakeMachine()
    machine.broken_programs = {VLLM[0]: "no such file"}
    assert "cannot be run (no such file)" in await only(machine=machine)


async def test_a_model_folder_that_does_not_exist_is_told():
    machine = FakeMachine()
    machine.missing = {Path("/models/small")}
    assert "model /models/small does not exist" in await only(machine=machine)


async def test_a_model_path_is_looked_for_beside_the_file():
    machine = FakeMachine()
    machine.missing = {Path("/etc/rotator/models/a")}
    assert "/etc/rotator/models/a does not exist" in await only(engine(model_path="models/a"), machine=machine)


async def test_an_engines_port_in_use_may_be_the_engine_itself():
    machine = FakeMachine()
    machine.held = {8411: "process 78 (vllm)"}
    assert "8411 is held by process 78" in await only(engine(port=8411), machine=machine, is_error=False)


async def test_an_engines_port_that_the_engine_itself_holds_is_no_finding():
    machine = FakeMachine()
    machine.held, machine.engines = {8411: "process 78 (vllm)"}, {8411: "small"}
    assert await check(engine(port=8411), machine=machine) == []


async def test_an_outside_fallback_without_its_key_in_the_environment_is_told():
    away = {"url": "https://api.example", "api_key_env": "AWAY_KEY"}
    assert "AWAY_KEY is not set" in await only(engine(fallback=away))


def without(*words: str) -> list[str]:
    return [w for w in VLLM if w not in words]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"command": without("--enable-sleep-mode")}, "--enable-sleep-mode is missing"),
        ({"env": {}}, "VLLM_SERVER_DEV_MODE is not 1"),
        ({"env": {"VLLM_SERVER_DEV_MODE": "0"}}, "VLLM_SERVER_DEV_MODE is not 1"),
        ({"command": without("--host", "127.0.0.1")}, "--host is missing"),
        ({"command": [*without("--host", "127.0.0.1"), "--host=0.0.0.0"]}, "--host 0.0.0.0 is not loopback"),
        ({"command": without("--port", "{port}")}, "--port is missing"),
        ({"command": [*VLLM, "--port", "9000"]}, "--port 9000 is not where the service looks"),
        ({"command": [*VLLM, "-tp", 2]}, "need 2 GPUs and 'gpus' names 1"),
        ({"command": [*VLLM, "--tensor-parallel-size=x"]}, "a parallel size is no number"),
        ({"command": [*VLLM, "-tp=2"], "gpus": [0, 1], "tp": 1}, "is 1 and the command says 2"),
        ({"command": without("--served-model-name", "{name}")}, "it serves /models/small, not small"),
        ({"command": [*VLLM, "--kv-offloading-size", "64"]}, "native KV offloading together with sleep"),
        (
            {"command": [*VLLM, "--kv-transfer-config", '{"kv_connector":"OffloadingConnector"}']},
            "native KV offloading together with sleep",
        ),
        (
            {"env": {"VLLM_SERVER_DEV_MODE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}},
            "turns expandable segments on",
        ),
    ],
)
async def test_a_vllm_command_that_cannot_take_turns_is_told_with_the_fix(changes: dict[str, Any], says: str):
    assert says in await only(engine(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"command": [*VLLM, "--pipeline-parallel-size", "2"], "gpus": [0, 1]}, "pipeline parallel"),
        ({"command": [*VLLM, "--api-server-count", "2"]}, "more than one API server"),
        ({"command": [*VLLM, "--enable-lora"]}, "LoRA"),
        ({"env": {"VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": "0"}}, "CUDA_VISIBLE_DEVICES"),
    ],
)
async def test_a_vllm_command_that_is_risky_is_worth_a_warning(changes: dict[str, Any], says: str):
    assert says in await only(engine(**changes), is_error=False)


async def test_what_the_service_hands_down_counts_as_the_engines_environment():
    machine = FakeMachine()
    machine.env = {"VLLM_SERVER_DEV_MODE": "1"}
    assert await check(engine(env={}), machine=machine) == []


async def test_a_second_name_among_those_it_serves_will_do():
    words = [*without("--served-model-name", "{name}"), "--served-model-name", "big", "small", "--seed", 1]
    assert await check(engine(command=words)) == []


async def test_a_program_other_than_vllm_is_not_judged_as_vllm():
    assert await check(engine(command=["/opt/stub", "--port", "{port}"], env={})) == []


# -- host RAM --------------------------------------------------------------------------------------------------------


async def test_a_budget_larger_than_the_host_is_refused():
    machine = FakeMachine()
    machine.memory_gib = 64
    assert "128.0 GiB are more than this host's 64.0 GiB" in await only(machine=machine, host_memory_gib=128)


async def test_masters_that_do_not_all_fit_are_worth_a_warning():
    found = await only(engine("a"), engine("b", 1), host_memory_gib=50, is_error=False)
    assert "all masters together need 60.0 GiB of 50.0 GiB" in found


async def test_an_engine_whose_masters_never_fit_will_not_sleep_at_level_1():
    assert "raise host_memory_gib or drop level 1" in await only(host_memory_gib=20, is_error=False)


async def test_an_attached_engine_whose_masters_never_fit_can_never_yield():
    attached = engine(launcher="attach", url="http://127.0.0.1:8000", command=[])
    assert "can never yield" in await only(attached, host_memory_gib=20)


async def test_a_low_limit_on_locked_memory_is_worth_a_warning():
    machine = FakeMachine()
    machine.memlock = 8 * 1024 * 1024
    assert "LimitMEMLOCK=infinity" in await only(machine=machine, is_error=False)


# -- GPUs ------------------------------------------------------------------------------------------------------------


async def test_gpus_that_cannot_be_listed_are_one_finding():
    devices = FakeDevices()
    devices.inventory_error = DeviceError("no driver")
    assert "the GPUs cannot be listed (no driver)" in await only(devices=devices)


async def test_a_gpu_that_does_not_exist_is_told_with_those_that_do():
    line = await only(engine("a", 7), devices=FakeDevices(2))
    assert line == "engine 'a'.gpus: there is no GPU 7: name one of 0 (GPU-0), 1 (GPU-1)"


async def test_a_gpu_that_the_service_may_not_use_is_told():
    found = await check_fleet(fleet(engine("a", 1), devices={"gpus": [0, "GPU-2"]}), FakeDevices(), FakeMachine())
    assert [f.line for f in found] == ["engine 'a'.gpus: GPU 1 is not in devices.gpus: add it there, or name another"]


async def test_a_gpu_that_the_service_may_use_but_that_is_not_there_is_told():
    found = await check_fleet(fleet(devices={"gpus": [0, 9]}), FakeDevices(1), FakeMachine())
    assert [f.line for f in found] == ["devices.gpus: there is no GPU 9: name one of 0 (GPU-0)"]


async def test_a_gpu_whose_memory_cannot_be_read_is_told():
    devices = FakeDevices(1)
    devices.read_error = DeviceTimeout("no answer in 2 s")
    assert "its memory cannot be read (no answer in 2 s)" in await only(devices=devices)


async def test_bytes_that_are_in_use_already_are_worth_a_warning():
    devices = FakeDevices()
    devices.used_gib = {"GPU-2": 9}
    line = await only(devices=devices, is_error=False)
    assert line.startswith("GPU 2: 9.0 GiB are in use now (processes: 99)")


async def test_bytes_of_the_fleets_own_engines_are_not_in_anybodys_way():
    machine, devices = FakeMachine(), FakeDevices()
    devices.used_gib, machine.engines = {"GPU-0": 40}, {99: "small"}
    assert await check(machine=machine, devices=devices) == []


async def test_a_footprint_that_can_never_fit_is_told():
    line = await only(engine(footprint={"awake_gib": 120}))
    assert "needs 120.0 GiB" in line
    assert "can never have more than 95.0 GiB" in line


async def test_without_a_footprint_the_commands_own_share_is_judged():
    greedy = engine(command=[*VLLM, "--gpu-memory-utilization", 0.995])
    del greedy["footprint"]
    assert "can never have more than 95.0 GiB" in await only(greedy)


async def test_pinned_engines_that_cannot_be_awake_together_are_told():
    big = {"awake_gib": 60, "residue_gib": 1, "host_gib": 1}
    assert "unpin one" in await only(engine("a", pin=True, footprint=big), engine("b", pin=True, footprint=big))


async def test_an_engine_that_fits_only_without_what_sleepers_keep_is_worth_a_warning():
    big = {"awake_gib": 94, "residue_gib": 3, "host_gib": 1}
    found = await check(engine("a", footprint=big), engine("b"))
    assert [f.line.split(":")[0] for f in found] == ["engine 'a'"]
    assert "94.0 GiB do not fit on GPU-0 beside 2.0 GiB that 1 sleepers keep" in found[0].line
    assert not found[0].is_error
