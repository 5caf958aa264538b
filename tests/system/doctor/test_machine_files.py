"""Files of models and overlays, links and environments, as the doctor reads them."""

import hashlib
import json
from pathlib import Path

import pytest

from rotator.doctor import Severity
from rotator.doctor.probe_kernel import next_kernel, parse_menu, version_key
from rotator.doctor.probe_processes import read_processes
from tests.system.doctor.machine import FLEET, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def test_a_shard_that_the_index_names_and_that_is_not_there(machine: Machine):
    (machine.root / "models/qwen/model-00002-of-00002.safetensors").unlink()
    found = await machine.finding("files.model-incomplete")
    assert found.stops_launch
    assert found.what == "engine 'qwen': 1 of 2 files of its weights are missing or cut off"
    assert "model-00002-of-00002.safetensors is missing" in found.evidence


async def test_a_shard_that_was_cut_off_is_seen_by_its_own_header(machine: Machine):
    shard = machine.root / "models/qwen/model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    size = shard.stat().st_size
    found = await machine.finding("files.model-incomplete")
    assert f"model-00001-of-00002.safetensors has 0.0 GiB ({size} bytes) of {size + 10} bytes" in found.evidence


async def test_a_pointer_of_git_lfs_is_no_shard(machine: Machine):
    machine.write("/models/qwen/model-00001-of-00002.safetensors", "version https://git-lfs.github.com/spec/v1\n")
    assert (
        "is no safetensors file (a pointer of git LFS?)" in (await machine.finding("files.model-incomplete")).evidence
    )


async def test_a_shard_without_what_the_index_promises(machine: Machine):
    machine.shard("/models/qwen/model-00001-of-00002.safetensors", "another.weight")
    assert "lacks 1 tensors that the index promises" in (await machine.finding("files.model-incomplete")).evidence


@pytest.mark.parametrize("text", ["{", '{"weight_map": 3}', "[]", '{"weight_map": {"a": "../../etc/passwd"}}'])
async def test_an_index_that_makes_no_sense_is_told(machine: Machine, text: str):
    machine.write("/models/qwen/model.safetensors.index.json", text)
    assert (await machine.finding("files.model-index")).stops_launch


async def test_a_build_of_torch_without_cuda_is_told(machine: Machine):
    machine.vllm("0.19.2", torch="2.9.0+cpu", cuda=None)
    found = await machine.finding("software.torch-cpu")
    assert "torch 2.9.0+cpu is a build without CUDA" in found.what
    assert "--index-strategy unsafe-best-match" in found.fix


async def test_a_torch_for_a_newer_cuda_than_the_driver_runs_is_told(machine: Machine):
    machine.vllm("0.19.2", cuda="14.1")
    assert "built for CUDA 14.1, the driver runs up to 13.0" in (await machine.finding("software.driver-too-old")).what


async def test_a_sparse_attention_model_needs_deep_gemm(machine: Machine):
    machine.write("/models/qwen/config.json", json.dumps({"model_type": "deepseek_v4"}))
    assert "needs DeepGEMM" in (await machine.finding("software.deep-gemm")).what
    machine.write("/opt/vllm/lib/python3.12/site-packages/deep_gemm/__init__.py")
    assert (await machine.examined()).is_well


async def test_an_overlay_is_compared_with_its_manifest(machine: Machine):
    text = "patched = True\n"
    machine.write("/overlays/x/files/vllm/cumem.py", text)
    files = [{"path": "vllm/cumem.py", "sha256": hashlib.sha256(text.encode()).hexdigest()}]
    machine.write("/overlays/x/manifest.json", json.dumps({"format": 1, "files": files}))
    fleet = f"{FLEET}    overlay_manifest: /overlays/x/manifest.json\n"
    assert (await machine.examined(fleet=fleet)).is_well
    machine.write("/overlays/x/files/vllm/cumem.py", text + "# by hand\n")
    found = await machine.finding("files.overlay", fleet=fleet)
    assert "vllm/cumem.py of its overlay has sha256" in found.what
    assert found.stops_launch
    for wrong in ("{}", "[", '{"format": 2}', '{"format": 1, "files": [{"path": "/etc/passwd", "sha256": ""}]}'):
        machine.write("/overlays/x/manifest.json", wrong)
        assert (await machine.finding("files.manifest", fleet=fleet)).severity is Severity.BROKEN


async def test_a_link_of_half_its_lanes_is_a_risk_and_a_slow_one_a_note(machine: Machine):
    machine.pci("0000:01:00.0", width=(4, 16), port_width=16, speed="2.5 GT/s PCIe")
    found = {f.code: f for f in (await machine.examined()).findings}
    assert found["pcie.width"].severity is Severity.RISK
    assert "4 of 16 lanes: wakes take 4 times as long" in found["pcie.width"].what
    assert found["pcie.speed"].severity is Severity.NOTE
    assert "an idle GPU slows its link down" in found["pcie.speed"].what


async def test_a_gpu_that_fell_off_is_missed(machine: Machine):
    del machine.gpus[1]
    codes = {f.code for f in (await machine.examined()).findings}
    assert {"gpus.lost", "gpus.absent"} <= codes


async def test_a_machine_nobody_wrote_nvml_down_for_says_so(machine: Machine):
    machine.write("/nvml.json", '{"gpus": 3}')
    found = await machine.finding("gpus.probe")
    assert "nvml.json" in found.evidence


MENU = """
menuentry 'Ubuntu' --class ubuntu $menuentry_id_option 'gnulinux-simple' {
\tlinux\t/boot/vmlinuz-6.17.0-23-generic root=UUID=1 ro
}
submenu 'Advanced options for Ubuntu' $menuentry_id_option 'gnulinux-advanced' {
\tmenuentry 'Ubuntu, with Linux 6.17.0-23-generic' --class gnu $menuentry_id_option 'new-id' {
\t\tlinux\t/boot/vmlinuz-6.17.0-23-generic root=UUID=1 ro
\t}
\tmenuentry 'Ubuntu, with Linux 6.17.0-22-generic' --class gnu $menuentry_id_option 'old-id' {
\t\tlinux\t/boot/vmlinuz-6.17.0-22-generic root=UUID=1 ro
\t}
}
"""
RELEASES = ["6.17.0-22-generic", "6.17.0-23-generic"]


@pytest.mark.parametrize(
    ("default", "env", "kernel"),
    [
        ("0", "", "6.17.0-23-generic"),
        ("1>1", "", "6.17.0-22-generic"),
        ("Advanced options for Ubuntu>Ubuntu, with Linux 6.17.0-22-generic", "", "6.17.0-22-generic"),
        ("gnulinux-advanced>old-id", "", "6.17.0-22-generic"),
        ("saved", "saved_entry=gnulinux-advanced>old-id\n", "6.17.0-22-generic"),
        ("0", "next_entry=1>1\n", "6.17.0-22-generic"),
        ("nonsense", "", "6.17.0-23-generic"),
    ],
)
def test_the_next_kernel_is_what_grub_would_start(tmp_path: Path, default: str, env: str, kernel: str):
    machine = Machine(tmp_path)
    machine.write("/etc/default/grub", f'GRUB_DEFAULT="{default}"\n')
    machine.write("/boot/grub/grubenv", env)
    assert next_kernel(tmp_path, parse_menu(MENU), RELEASES)[0] == kernel


def test_kernels_are_ordered_by_number():
    assert sorted(["6.8.0-9", "6.8.0-22", "6.17.0-1"], key=version_key) == ["6.8.0-9", "6.8.0-22", "6.17.0-1"]


async def test_a_program_of_another_kind_is_not_judged_by_what_vllm_needs(machine: Machine):
    machine.vllm("0.19.2", torch="2.9.0+cpu", cuda=None)
    fleet = FLEET.replace("/opt/vllm/bin/vllm, serve, /models/qwen", "/opt/vllm/bin/python, -m, my.server")
    assert (await machine.examined(fleet=fleet)).is_well


async def test_weights_that_are_made_up_are_not_looked_for(machine: Machine):
    for shard in (machine.root / "models/qwen").glob("model*"):
        shard.unlink()
    assert (await machine.finding("files.model-incomplete")).stops_launch
    assert (await machine.examined(fleet=FLEET.replace("--enable", "--load-format=dummy, --enable"))).is_well


async def test_a_package_that_python_is_shown_elsewhere_is_not_missed(machine: Machine):
    site = machine.root / "opt/vllm/lib/python3.12/site-packages"
    (site / "vllm/__init__.py").unlink()
    (site / "vllm").rmdir()
    shown = FLEET.replace('DEV_MODE: "1"', 'DEV_MODE: "1", PYTHONPATH: "/src/vllm"')
    assert (await machine.examined(fleet=shown)).is_well
    machine.write("/home/me/.local/lib/python3.12/site-packages/vllm/__init__.py")
    script = "#!/opt/vllm/bin/python\nfrom vllm.entrypoints.cli.main import main\n"
    machine.write("/home/me/.local/bin/vllm", script, 0o755)
    assert (await machine.examined(fleet=FLEET.replace("/opt/vllm/bin/vllm", "/home/me/.local/bin/vllm"))).is_well


def test_a_command_line_is_told_without_its_keys(machine: Machine):
    machine.process(4711, "vllm", command="vllm serve /models/qwen --api-key hunter2hunter2 --port 8000")
    (process,) = [p for p in read_processes(machine.root).processes if p.pid == 4711]
    assert "--port 8000" in process.command
    assert "hunter2hunter2" not in process.command
