"""A simulated box: GPUs that exist as a directory, shared by every process whose environment names it.

Bytes given here, and everything that NVML shows, are *shown* bytes. The box truly holds shown bytes over `scale`, and
all arithmetic between the two is exact as long as sizes are multiples of the granularity that `SimulatedBox` reports.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from allocator._native import library_path

_PAGE_BYTES = 4096
_DEVICES_MAX = 16
_NVML_NAME = "libnvidia-ml.so.1"


def driver_path() -> Path:
    """The simulated driver's library. Raises LibraryMissing."""
    return library_path("librotator_simdriver.so")


@dataclass(frozen=True, slots=True)
class SimulatedBox:
    """A directory that the simulated driver reads. Bytes that a process holds go when it dies, however it dies."""

    path: Path
    devices: int
    name: str
    memory_bytes: int
    scale: int
    copy_gib_s: float
    context_bytes: int
    uuids: tuple[str, ...]
    device_gib_s: float = 0.0
    clear_gib_s: float = 0.0
    integrated: bool = False

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        devices: int = 4,
        name: str = "NVIDIA RTX PRO 6000 Blackwell (simulated)",
        memory_bytes: int = 96 << 30,
        scale: int = 4096,
        copy_gib_s: float = 50.0,
        context_bytes: int = 0,
        device_gib_s: float = 0.0,
        clear_gib_s: float = 0.0,
        integrated: bool = False,
    ) -> SimulatedBox:
        """Make a box in the (new or empty) directory `path`.

        memory_bytes: shown, of each device; rounded down to whole granules. copy_gib_s: shown GiB/s of one direction
        of one device's link in one process, 0 for as fast as the host copies. context_bytes: shown, what each process
        that opens a device takes there before it allocates anything. device_gib_s: shown GiB/s of copies within a
        device, 0 for as fast as the host copies. clear_gib_s: shown GiB/s at which the engine that copies to the device
        first clears what was given back, 0 for at once. integrated: unified memory, where pinned host memory comes out
        of the same `memory_bytes` as device memory.
        """
        if not 0 < devices <= _DEVICES_MAX or scale < 1 or memory_bytes < scale * _PAGE_BYTES:
            raise ValueError(f"a box has 1 to {_DEVICES_MAX} devices of at least one granule ({scale * _PAGE_BYTES})")
        folder = Path(path).absolute()
        (folder / "control").mkdir(parents=True, exist_ok=True)
        (folder / "lib").mkdir(exist_ok=True)
        memory = memory_bytes // (scale * _PAGE_BYTES) * (scale * _PAGE_BYTES)
        uuids = tuple(f"GPU-{uuid.uuid4()}" for _ in range(devices))
        box = cls(
            folder,
            devices,
            name,
            memory,
            scale,
            copy_gib_s,
            context_bytes,
            uuids,
            device_gib_s,
            clear_gib_s,
            integrated,
        )
        box._write()
        return box

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SimulatedBox:
        """Describe the box that `create` made at `path`. Raises FileNotFoundError."""
        folder = Path(path).absolute()
        fields = dict(line.split("=", 1) for line in (folder / "box.conf").read_text().splitlines())
        devices = int(fields["devices"])
        return cls(
            path=folder,
            devices=devices,
            name=fields["name"],
            memory_bytes=int(fields["memory_bytes"]),
            scale=int(fields["scale"]),
            copy_gib_s=float(fields["copy_gib_s"]),
            context_bytes=int(fields["context_bytes"]),
            uuids=tuple(fields[f"uuid.{i}"] for i in range(devices)),
            device_gib_s=float(fields.get("device_gib_s", 0)),
            clear_gib_s=float(fields.get("clear_gib_s", 0)),
            integrated=fields.get("integrated") == "1",
        )

    def _write(self) -> None:
        lines = [
            f"devices={self.devices}",
            f"name={self.name}",
            f"memory_bytes={self.memory_bytes}",
            f"scale={self.scale}",
            f"copy_gib_s={self.copy_gib_s}",
            f"device_gib_s={self.device_gib_s}",
            f"clear_gib_s={self.clear_gib_s}",
            f"integrated={int(self.integrated)}",
            f"context_bytes={self.context_bytes}",
            *(f"uuid.{i}={name}" for i, name in enumerate(self.uuids)),
        ]
        _replace(self.path / "box.conf", "\n".join(lines) + "\n")
        link = self.path / "lib" / _NVML_NAME
        link.unlink(missing_ok=True)
        link.symlink_to(driver_path())

    @property
    def granularity_bytes(self) -> int:
        """Shown bytes of the smallest piece of device memory."""
        pages = -(-(2 << 20) // self.scale // _PAGE_BYTES)
        return max(1, pages) * _PAGE_BYTES * self.scale

    def env(self) -> dict[str, str]:
        """For a process that uses the devices: an engine."""
        return {"ROTATOR_CUDA_DRIVER": str(driver_path()), "ROTATOR_SIM_BOX": str(self.path)}

    def nvml_env(self) -> dict[str, str]:
        """For a process that watches the devices with pynvml: the service. Must be set before the process starts."""
        inherited = os.environ.get("LD_LIBRARY_PATH")
        folders = [str(self.path / "lib"), *([inherited] if inherited else [])]
        return {"ROTATOR_SIM_BOX": str(self.path), "LD_LIBRARY_PATH": ":".join(folders)}

    def raise_xid(self, device: int, xid: int) -> None:
        """NVML's event sets that listen to this device are given this Xid."""
        path = self.path / "control" / f"gpu{device}.xids"
        before = path.read_text().strip() if path.exists() else ""
        _replace(path, f"{before} {xid}".strip() + "\n")

    def count_ecc(self, device: int, uncorrected: int) -> None:
        """NVML counts so many uncorrectable memory errors on this device from now on."""
        _replace(self.path / "control" / f"gpu{device}.ecc", f"{uncorrected}\n")

    def hang_nvml(self, device: int) -> None:
        """NVML queries of this device hang from now on, until `heal_nvml`."""
        _replace(self.path / "control" / f"gpu{device}.nvml", "hang\n")

    def fail_nvml(self, device: int, code: int = 15) -> None:
        """NVML queries of this device answer `code` (15: the GPU is lost), until `heal_nvml`."""
        _replace(self.path / "control" / f"gpu{device}.nvml", f"fail {code}\n")

    def heal_nvml(self, device: int) -> None:
        (self.path / "control" / f"gpu{device}.nvml").unlink(missing_ok=True)

    def set_foreign_bytes(self, device: int, nbytes: int) -> None:
        """Shown bytes of this device that belong to no process anyone can see. 0 takes them away."""
        _replace(self.path / "control" / f"gpu{device}.foreign", f"{nbytes}\n")

    def set_faults(self, rules: str, pid: int | None = None) -> None:
        """Fault rules (see sim/faults.h) for one process, or for all that have none of their own."""
        _replace(self._faults_path(pid), rules + "\n")

    def clear_faults(self, pid: int | None = None) -> None:
        self._faults_path(pid).unlink(missing_ok=True)

    @contextmanager
    def hanging_nvml(self, device: int) -> Iterator[None]:
        self.hang_nvml(device)
        try:
            yield
        finally:
            self.heal_nvml(device)

    def _faults_path(self, pid: int | None) -> Path:
        return self.path / "control" / ("faults" if pid is None else f"faults.{pid}")


def _replace(path: Path, text: str) -> None:
    # Readers look at any moment: they must see the old text or the new one.
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)
