"""A whole machine written down as files: healthy unless a test breaks it.

Two RTX 5060 Ti (SM120) at TP=2 on kernel 6.17.0-22, driver 580.126.09, vLLM 0.19.2 in /opt/vllm, a model of two shards.
"""

import json
import struct
from pathlib import Path
from typing import Any

from rotator.config import GIB, FleetConfig, parse
from rotator.doctor import Examination, Finding, examine
from rotator.doctor.machine import MachineProbes

DRIVER = "580.126.09"
OLD, NEW = "6.17.0-22-generic", "6.17.0-23-generic"
FLEET = """
engines:
  - name: qwen
    gpus: [0, 1]
    model_path: /models/qwen
    command: [/opt/vllm/bin/vllm, serve, /models/qwen, --tensor-parallel-size=2, --enable-sleep-mode]
    env: {VLLM_SERVER_DEV_MODE: "1"}
"""


class Machine:
    def __init__(self, root: Path) -> None:
        self.root = root
        self._kernel()
        self._driver()
        self._proc()
        self.vllm("0.19.2rc1")
        self._model()
        self.gpus: list[dict[str, Any]] = [self._gpu(i) for i in range(2)]
        self.no_peer: list[list[Any]] = []

    # -- what it consists of -----------------------------------------------------------------------------------------

    def write(self, path: str, content: str | bytes = "", mode: int = 0o644) -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        file.chmod(mode)
        return file

    def _kernel(self) -> None:
        self.write("/proc/sys/kernel/osrelease", f"{OLD}\n")
        self.install_kernel(OLD, DRIVER)
        self.write("/etc/default/grub", "GRUB_DEFAULT=0\nGRUB_TIMEOUT=5\n")
        self.write("/sys/module/nvidia/version", f"{DRIVER}\n")

    def install_kernel(self, release: str, module: str | None) -> None:
        """``module``: the version of its NVIDIA module, None where it has none."""
        self.write(f"/boot/vmlinuz-{release}")
        self.write(f"/lib/modules/{release}/modules.dep", "kernel/drivers/video/nvidiafb.ko:\n")
        if module is not None:
            name = "updates/dkms/nvidia.ko"
            self.write(f"/lib/modules/{release}/modules.dep", f"{name}: kernel/drivers/video.ko\n")
            self.write(f"/lib/modules/{release}/{name}", b"\x7fELF\0license=MIT\0version=" + module.encode() + b"\0")

    def run_kernel(self, release: str, *, loaded: bool) -> None:
        self.write("/proc/sys/kernel/osrelease", f"{release}\n")
        if not loaded:
            (self.root / "sys/module/nvidia/version").unlink()
            (self.root / "proc/driver/nvidia/version").unlink()

    def _driver(self) -> None:
        said = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {DRIVER}  Release Build  (root)\n"
        self.write("/proc/driver/nvidia/version", said)
        self.libraries(DRIVER)
        self.write(f"/lib/firmware/nvidia/{DRIVER}/gsp_ga10x.bin")
        for node in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
            self.write(f"/dev/{node}")
        for i, bus in enumerate(("0000:01:00.0", "0000:05:00.0")):
            self.pci(bus, width=(8, 8), port_width=16 if i == 0 else 8)

    def libraries(self, version: str) -> None:
        folder = self.root / "usr/lib/x86_64-linux-gnu"
        for old in folder.glob("libnvidia-ml*"):
            old.unlink()
        self.write(f"/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{version}")
        (folder / "libnvidia-ml.so.1").symlink_to(f"libnvidia-ml.so.{version}")

    def pci(self, bus: str, *, width: tuple[int, int], port_width: int, speed: str = "32.0 GT/s PCIe") -> None:
        base = f"/sys/bus/pci/devices/{bus}"
        files = {
            "class": "0x030000",
            "vendor": "0x10de",
            "current_link_speed": speed,
            "max_link_speed": "32.0 GT/s PCIe",
        }
        widths = {"current_link_width": str(width[0]), "max_link_width": str(width[1])}
        port = {"port/max_link_width": str(port_width), "port/max_link_speed": "32.0 GT/s PCIe"}
        for name, value in {**files, **widths, **port, "iommu_group/type": "identity"}.items():
            self.write(f"{base}/{name}", f"{value}\n")

    def _proc(self) -> None:
        self.write("/proc/meminfo", f"MemTotal: {64 << 20} kB\nMemFree: {50 << 20} kB\nMemAvailable: {58 << 20} kB\n")
        self.write("/proc/self/limits", "Max locked memory         unlimited            unlimited            bytes\n")
        (self.root / "dev/shm").mkdir(parents=True, exist_ok=True)

    def process(
        self, pid: int, name: str, *, state: str = "S", ppid: int = 1, command: str = "", gpus: str = ""
    ) -> None:
        tail = " ".join([state, str(ppid), str(pid), str(pid), *["0"] * 13, "1", "0", "5000", *["0"] * 10])
        self.write(f"/proc/{pid}/stat", f"{pid} ({name}) {tail}\n")
        self.write(f"/proc/{pid}/cmdline", command.replace(" ", "\0"))
        self.write(f"/proc/{pid}/environ", "HOME=/root\0")
        folder = self.root / f"proc/{pid}/fd"
        folder.mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(gpus.split(",") if gpus else ()):
            (folder / str(number + 3)).symlink_to(f"/dev/nvidia{index}")

    def vllm(self, version: str, torch: str = "2.9.0", cuda: str | None = "12.8") -> None:
        """The environment in /opt/vllm, with its entry point."""
        site = "/opt/vllm/lib/python3.12/site-packages"
        for old in (self.root / site.lstrip("/")).glob("*-*.dist-info"):
            (old / "METADATA").unlink()
            old.rmdir()
        self.write("/opt/vllm/bin/python", b"\x7fELF", 0o755)
        self.write(f"{site}/vllm/__init__.py")
        self.write(f"{site}/vllm-{version}.dist-info/METADATA")
        self.write(f"{site}/torch-{torch}.dist-info/METADATA")
        self.write(f"{site}/torch/version.py", f"__version__ = '{torch}'\ncuda: Optional[str] = {cuda!r}\n")
        self.entry_point()

    def entry_point(self, first_line: str = "#!/opt/vllm/bin/python") -> None:
        body = "import sys\nfrom vllm.entrypoints.cli.main import main\nsys.exit(main())\n"
        self.write("/opt/vllm/bin/vllm", f"{first_line}\n{body}", 0o755)

    def _model(self) -> None:
        weights = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
        self.write("/models/qwen/config.json", json.dumps({"model_type": "qwen3"}))
        self.write("/models/qwen/tokenizer.json", "{}")
        self.write("/models/qwen/model.safetensors.index.json", json.dumps({"weight_map": weights}))
        for tensor, name in weights.items():
            self.shard(f"/models/qwen/{name}", tensor)

    def shard(self, path: str, tensor: str, size: int = 64) -> None:
        header = json.dumps({tensor: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        self.write(path, struct.pack("<Q", len(header)) + header + bytes(size))

    @staticmethod
    def _gpu(index: int) -> dict[str, Any]:
        return {
            "name": "NVIDIA GeForce RTX 5060 Ti",
            "total_bytes": 16 * GIB,
            "used_bytes": 0,
            "by_pid": {},
            "compute_capability": [12, 0],
            "pci_bus_id": f"00000000:0{1 + 4 * index}:00.0",
        }

    # -- examined ----------------------------------------------------------------------------------------------------

    def fleet(self, text: str = FLEET) -> FleetConfig:
        return parse(text, base=self.root)

    async def examined(self, *, go_on: bool = True, fleet: str = FLEET) -> Examination:
        said = {"gpus": self.gpus, "cuda_driver": [13, 0], "no_peer": self.no_peer}
        if not (self.root / "nvml.json").exists():
            self.write("/nvml.json", json.dumps(said))
        config = self.fleet(fleet)
        found = await examine(MachineProbes(config, self.root, environ={}), config, go_on=go_on)
        (self.root / "nvml.json").unlink()
        return found

    async def finding(self, code: str, **more: Any) -> Finding:
        """The one finding of that kind."""
        found = await self.examined(**more)
        [one] = [f for f in found.findings if f.code == code]
        return one
