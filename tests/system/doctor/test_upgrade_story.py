"""An upgrade that went wrong at every turn, as the doctor tells it: a vLLM that this GPU cannot run with two ranks,
VRAM that its crash loop left, a rollback without the entry point, a reboot into a kernel without NVIDIA modules."""

import os
import time
from pathlib import Path

import pytest

from rotator.config import GIB
from rotator.doctor import Severity
from rotator.doctor.preflight import Preflight
from rotator.ports import GpuInfo, LaunchSpec
from tests.system.doctor.machine import DRIVER, NEW, OLD, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def test_a_machine_on_which_all_is_well_gives_nothing_to_do(machine: Machine):
    found = await machine.examined()
    assert [f for f in found.findings if f.severity is not Severity.NOTE] == []
    assert found.is_well


async def test_the_upgrade_is_caught_before_its_first_crash(machine: Machine):
    machine.vllm("0.20.2")
    found = await machine.finding("software.known-broken")
    assert found.severity is Severity.BROKEN
    assert found.stops_launch
    assert "vLLM 0.20.x fails on SM12x with more than one rank" in found.what
    assert "vllm 0.20.2" in found.evidence
    assert "0.19" in found.fix


async def test_the_launch_of_such_an_engine_is_refused_in_words_instead_of_a_crash_loop(machine: Machine):
    machine.vllm("0.20.2")
    gpus = tuple(GpuInfo(f"GPU-{i}", i, "RTX 5060 Ti", 16 * GIB, (12, 0)) for i in range(2))
    engine = machine.fleet().engines[0]
    spec = LaunchSpec("qwen", "process", engine.command, {}, "http://127.0.0.1:20001", "")
    look = Preflight(lambda _: gpus, machine.root, {})
    said = await look(engine, spec)
    assert said is not None
    assert said.startswith("not launched, it cannot start: engine 'qwen': vLLM 0.20.x fails on SM12x")
    machine.vllm("0.19.2rc1")
    assert await look(engine, spec) is None


async def test_bytes_that_the_crash_loop_left_are_named_by_process(machine: Machine):
    for pid, gpu in ((4101, 0), (4102, 1)):
        machine.process(pid, "VLLM::Worker_TP", command="VLLM::Worker_TP0", gpus=str(gpu))
        machine.gpus[gpu] |= {"used_bytes": 15 * GIB, "by_pid": {str(pid): 15 * GIB}}
    found = [f for f in (await machine.examined()).findings if f.code == "leftovers.worker"]
    assert [f.severity for f in found] == [Severity.BROKEN] * 2
    assert (
        "process 4101 (VLLM::Worker_TP) is what is left of an engine that died, and holds 15.0 GiB on GPU 0"
        in found[0].what
    )
    assert "`kill -9 4101`" in found[0].fix


async def test_bytes_that_no_process_holds_are_told_with_the_way_out_and_its_trap(machine: Machine):
    machine.gpus[1] |= {"used_bytes": 15 * GIB}
    found = await machine.finding("leftovers.vram")
    assert found.what == "15.0 GiB on GPU 1 are held by nobody: no engine can have them"
    assert "`sudo nvidia-smi --gpu-reset -i 1`" in found.fix
    assert "before a reboot see `rotator doctor --only kernel`" in found.fix


async def test_a_holder_that_nvml_does_not_list_is_found_by_what_it_has_open(machine: Machine):
    machine.gpus[0] |= {"used_bytes": 15 * GIB}
    machine.process(4103, "python3", state="S", gpus="0")
    found = await machine.finding("leftovers.vram")
    assert "4103 (python3, state S) have it open" in found.evidence
    assert found.fix.startswith("`kill -9 4103`")


async def test_a_process_that_hangs_in_the_kernel_is_not_told_to_be_killed(machine: Machine):
    machine.process(4104, "VLLM::Worker_TP", state="D", gpus="0,1")
    found = await machine.finding("leftovers.stuck")
    assert "nothing can end it" in found.what
    assert "holds /dev/nvidia0, /dev/nvidia1 open" in found.evidence


async def test_a_rollback_without_the_entry_point_is_no_engine_crash(machine: Machine):
    (machine.root / "opt/vllm/bin/vllm").unlink()
    found = await machine.finding("launch.missing")
    assert found.what == "engine 'qwen': its program /opt/vllm/bin/vllm is gone, though vllm 0.19.2rc1 is installed"
    assert "exit 127: no engine crash" in found.evidence
    assert found.fix.startswith(
        "`printf '#!/opt/vllm/bin/python\\nimport sys\\nfrom vllm.entrypoints.cli.main import main"
    )
    assert "> /opt/vllm/bin/vllm && chmod +x /opt/vllm/bin/vllm`" in found.fix


async def test_the_command_that_writes_the_entry_point_again_mends_it(machine: Machine):
    (machine.root / "opt/vllm/bin/vllm").unlink()
    fix = (await machine.finding("launch.missing")).fix
    text = fix.partition("printf '")[2].partition("'")[0].replace("\\n", "\n")
    machine.write("/opt/vllm/bin/vllm", text, 0o755)
    assert (await machine.examined()).is_well


async def test_an_entry_point_of_an_environment_that_moved_is_told_apart(machine: Machine):
    machine.entry_point("#!/home/me/old/bin/python")
    found = await machine.finding("launch.interpreter-missing")
    assert "names an interpreter that is not there: /home/me/old/bin/python" in found.what


async def test_an_entry_point_whose_package_is_gone_is_told_apart(machine: Machine):
    site = machine.root / "opt/vllm/lib/python3.12/site-packages"
    (site / "vllm/__init__.py").unlink()
    (site / "vllm").rmdir()
    found = await machine.finding("launch.import-missing")
    assert "the package vllm that it starts is not" in found.what


async def test_a_staged_kernel_without_modules_is_told_before_the_reboot(machine: Machine):
    machine.install_kernel(NEW, None)
    found = await machine.finding("kernel.next-without-module")
    assert found.severity is Severity.RISK
    assert found.what == f"a reboot would bring up kernel {NEW}, which has no NVIDIA module: no GPU after it"
    assert f"NVIDIA modules are there for {OLD}, not for {NEW}" in found.evidence
    assert "GRUB_DEFAULT" in found.fix
    assert OLD in found.fix


async def test_a_pinned_kernel_is_believed(machine: Machine):
    machine.install_kernel(NEW, None)
    machine.write("/etc/default/grub", f'GRUB_DEFAULT="Advanced options for Ubuntu>Ubuntu, with Linux {OLD}"\n')
    assert (await machine.examined()).is_well


async def test_modules_of_another_version_than_the_libraries_are_told_before_the_reboot(machine: Machine):
    machine.install_kernel(NEW, "580.142")
    found = await machine.finding("kernel.next-mismatch")
    assert "would be 580.142 and its libraries 580.126.09" in found.what


async def test_after_the_reboot_the_walk_stops_at_the_kernel_and_says_why(machine: Machine):
    machine.install_kernel(NEW, None)
    machine.run_kernel(NEW, loaded=False)
    machine.write("/nvml.json", '{"error": "NVML: Driver Not Loaded"}')
    found = await machine.examined(go_on=False)
    assert found.stopped_at == "kernel"
    assert found.looked_at == ("kernel",)
    first = found.findings[0]
    assert first.code == "kernel.no-module"
    assert first.what == f"this kernel, {NEW}, has no NVIDIA module"
    assert f"keep kernel {OLD}" in first.fix


async def test_a_driver_that_was_updated_under_a_running_module_is_told(machine: Machine):
    machine.libraries("580.142")
    found = await machine.finding("driver.mismatch")
    assert found.what == f"the loaded NVIDIA module is {DRIVER}, its libraries are 580.142"


async def test_shared_memory_that_a_dead_engine_left_is_offered_for_removal(machine: Machine):
    hour_ago = time.time() - 3600
    for name in ("psm_1a2b3c4d", "nccl-Xy", "somebody-else"):
        os.utime(machine.write(f"/dev/shm/{name}", bytes(8192)), (hour_ago, hour_ago))
    machine.process(4105, "python3")
    (machine.root / "proc/4105/maps").write_text("7f00-7f10 rw-s 0 00:1a 5 /dev/shm/nccl-Xy\n")
    found = await machine.finding("leftovers.shm")
    assert found.repair is not None
    assert found.repair.target == "psm_1a2b3c4d"
