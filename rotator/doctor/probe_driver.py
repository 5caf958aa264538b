"""The NVIDIA driver's versions and the GPUs on the bus, from files below a root. Blocking."""

import contextlib
import os
import re
from pathlib import Path

from rotator.doctor.facts import DriverFacts, PciGpu

_NVIDIA = "0x10de"
_LIBRARY = "libnvidia-ml.so"
_FOLDERS = (
    *("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "usr/lib/wsl/lib"),
    *("usr/local/nvidia/lib64", "lib/x86_64-linux-gnu", "opt/nvidia/lib64", "run/opengl-driver/lib"),
)
_VERSION = re.compile(r"\b(\d{3}\.\d+(?:\.\d+)?)\b")


def read_driver(root: Path) -> DriverFacts:
    proc = _text(root / "proc/driver/nvidia/version")
    libraries = _libraries(root)
    match = _VERSION.search(proc)
    return DriverFacts(
        proc_version=match[1] if match else None,
        library_version=_library_version(libraries),
        libraries=tuple(f"/{path.relative_to(root)}" for path in libraries),
        nodes=tuple(f"/dev/{name}" for name in sorted(_names(root / "dev")) if name.startswith("nvidia")),
        firmware=_firmware(root),
        open_module="Open Kernel Module" in proc,
        nouveau=(root / "sys/module/nouveau").is_dir(),
        pci=read_pci(root),
    )


def _libraries(root: Path) -> list[Path]:
    """What the loader would find: libnvidia-ml.so.1 itself, then the files that carry a version in their name."""
    found: dict[str, Path] = {}
    for folder in _FOLDERS:
        for name in sorted(_names(root / folder)):
            if name == f"{_LIBRARY}.1" or (name.startswith(f"{_LIBRARY}.") and _VERSION.search(name)):
                found.setdefault(name, root / folder / name)
    return list(found.values())


def _library_version(libraries: list[Path]) -> str | None:
    """Of the file that libnvidia-ml.so.1 leads to."""
    for path in sorted(libraries, key=lambda p: p.name != f"{_LIBRARY}.1"):
        target = os.readlink(path) if path.is_symlink() else path.name
        if match := _VERSION.search(target.rpartition("/")[2]):
            return match[1]
    return None


def _firmware(root: Path) -> tuple[str, ...]:
    folders = (root / "lib/firmware/nvidia", root / "usr/lib/firmware/nvidia")
    names = (n for folder in folders for n in _names(folder) if any("gsp" in f for f in _names(folder / n)))
    return tuple(sorted({n for n in names if _VERSION.fullmatch(n)}))


def read_pci(root: Path) -> tuple[PciGpu, ...]:
    base = root / "sys/bus/pci/devices"
    return tuple(_gpu(base / name) for name in sorted(_names(base)) if _is_gpu(base / name))


def _is_gpu(device: Path) -> bool:
    """A display or 3D controller of NVIDIA's, not its sound or USB."""
    is_display = _text(device / "class").startswith("0x03")
    return is_display and _text(device / "vendor").strip() == _NVIDIA


def _gpu(device: Path) -> PciGpu:
    above = device.resolve().parent if device.is_symlink() else device / "port"
    return PciGpu(
        bus_id=device.name,
        driver=_target(device / "driver"),
        speed=_number(device / "current_link_speed"),
        speed_max=_number(device / "max_link_speed"),
        width=_whole(device / "current_link_width"),
        width_max=_whole(device / "max_link_width"),
        port_speed_max=_number(above / "max_link_speed"),
        port_width_max=_whole(above / "max_link_width"),
        iommu=_text(device / "iommu_group/type").strip() or None,
    )


def _target(link: Path) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(link).rpartition("/")[2]
    return None


def _number(path: Path) -> float | None:
    """The first number in it: ``32.0 GT/s PCIe``. None for ``Unknown`` and 0, which mean that nobody knows."""
    match = re.match(r"\s*(\d+(?:\.\d+)?)", _text(path))
    return (float(match[1]) or None) if match else None


def _whole(path: Path) -> int | None:
    number = _number(path)
    return None if number is None or number > 64 else int(number)  # 255: the link is down, or nobody knows


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []
