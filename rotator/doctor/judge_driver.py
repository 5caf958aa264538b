"""Judgements of the lowest layers: the kernel, the driver, the GPUs and how they are connected. No I/O."""

from collections.abc import Iterator

from rotator.config import GIB
from rotator.core.placement import gib
from rotator.doctor.facts import DriverFacts, Facts, Kernel, KernelFacts, PciGpu, is_here
from rotator.doctor.findings import Finding, broken, note, risk

_RELOAD = (
    "stop everything on the GPUs, then `sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia && sudo modprobe nvidia`"
)
_GPU_CLASS_SLOW = 2.5  # GT/s: what an idle link falls back to


# -- kernel ------------------------------------------------------------------------------------------------------------


def judge_kernel(facts: Facts) -> Iterator[Finding]:
    """The NVIDIA module of this kernel, and of the one that a reboot would start."""
    kernel, driver = facts.kernel, facts.driver
    if kernel is None:
        return
    has_gpus = bool(driver and driver.pci)
    loaded = kernel.module_version is not None or bool(driver and driver.proc_version)
    if has_gpus and not loaded:
        yield _not_loaded(kernel)
    if kernel.boots_here and (loaded or has_gpus):
        yield from _next_kernel(kernel, driver)


def _not_loaded(kernel: KernelFacts) -> Finding:
    here = _installed(kernel, kernel.running)
    if here is not None and here.modules:
        return broken(
            "kernel.module-not-loaded",
            f"the NVIDIA module of kernel {kernel.running} is not loaded",
            f"{here.modules[0]} is there; /sys/module/nvidia is not",
            "`sudo modprobe nvidia`, and `sudo dmesg | grep -i nvrm` if that fails (Secure Boot refuses "
            "unsigned modules)",
            stops_launch=True,
        )
    return broken(
        "kernel.no-module",
        f"this kernel, {kernel.running}, has no NVIDIA module",
        _who_has(kernel),
        _another_kernel(kernel, kernel.running),
        stops_launch=True,
    )


def _next_kernel(kernel: KernelFacts, driver: DriverFacts | None) -> Iterator[Finding]:
    following = _installed(kernel, kernel.next_release) if kernel.next_release else None
    if kernel.next_release is None or (following is None and kernel.next_release == kernel.running):
        return
    because = f"a reboot starts {kernel.next_release}: {kernel.next_because}"
    if following is None or not following.modules:
        yield risk(
            "kernel.next-without-module",
            f"a reboot would bring up kernel {kernel.next_release}, which has no NVIDIA module: no GPU after it",
            f"{because}; {_who_has(kernel)}",
            _another_kernel(kernel, kernel.next_release),
        )
        return
    library = driver.library_version if driver else None
    if following.version and library and following.version != library:
        yield risk(
            "kernel.next-mismatch",
            f"after a reboot the NVIDIA module would be {following.version} and its libraries {library}",
            f"{because}; its module {following.modules[0]} is {following.version}",
            f"install the modules of {library} for that kernel (`sudo dkms autoinstall -k {kernel.next_release}`, "
            "or the distribution's linux-modules-nvidia package), or the libraries of the module's version",
        )


def _installed(kernel: KernelFacts, release: str | None) -> Kernel | None:
    return next((k for k in kernel.installed if k.release == release), None)


def _who_has(kernel: KernelFacts) -> str:
    have = [k.release for k in kernel.installed if k.modules]
    lack = [k.release for k in kernel.installed if not k.modules]
    words = f"NVIDIA modules are there for {', '.join(have) or 'no kernel'}"
    return f"{words}, not for {', '.join(lack)}" if lack else words


def _another_kernel(kernel: KernelFacts, release: str) -> str:
    """Bring the modules in, or boot a kernel that has them."""
    build = f"`sudo dkms autoinstall -k {release}` or install its linux-modules-nvidia package"
    good = [k for k in kernel.installed if k.modules and k.release != release]
    keep = next((k for k in good if k.release == kernel.running), good[-1] if good else None)
    if keep is None:
        return build
    entry = keep.menu_entry or f"Advanced options>Linux {keep.release}"
    pin = f"sudo sed -i 's/^GRUB_DEFAULT=.*/GRUB_DEFAULT=\"{entry}\"/' /etc/default/grub && sudo update-grub"
    return f"{build}; or keep kernel {keep.release}: `{pin}`"


# -- driver ------------------------------------------------------------------------------------------------------------


def judge_driver(facts: Facts) -> Iterator[Finding]:
    """Module and libraries of one version, device nodes, firmware; no other driver on the GPUs."""
    driver = facts.driver
    if driver is None:
        return
    module = driver.proc_version or (facts.kernel.module_version if facts.kernel else None)
    if driver.nouveau or any(gpu.driver == "nouveau" for gpu in driver.pci):
        yield broken(
            "driver.nouveau",
            "the nouveau driver has taken the GPUs",
            ", ".join(f"{gpu.bus_id} is driven by {gpu.driver}" for gpu in driver.pci)
            or "/sys/module/nouveau is there",
            "`printf 'blacklist nouveau\\noptions nouveau modeset=0\\n' | sudo tee /etc/modprobe.d/nouveau.conf && "
            "sudo update-initramfs -u`, then reboot",
            stops_launch=True,
        )
    if module and driver.library_version and module != driver.library_version:
        yield broken(
            "driver.mismatch",
            f"the loaded NVIDIA module is {module}, its libraries are {driver.library_version}",
            f"/proc/driver/nvidia/version says {module}; {', '.join(driver.libraries) or 'libnvidia-ml.so.1'}",
            f"the driver was updated while it was loaded: {_RELOAD}; or reboot, if `rotator doctor --only "
            "kernel` is content",
            stops_launch=True,
        )
    if module and not driver.library_version:
        yield broken(
            "driver.no-library",
            "the NVIDIA module is loaded, but its libraries are not installed here",
            "no libnvidia-ml.so.1 among the libraries",
            f"install the driver's libraries of version {module} (Ubuntu: "
            f"libnvidia-compute-{module.partition('.')[0]}), "
            "or start the container with its GPUs (--gpus all)",
            stops_launch=True,
        )
    if module:
        yield from _nodes_and_firmware(driver, module)


def _nodes_and_firmware(driver: DriverFacts, module: str) -> Iterator[Finding]:
    missing = [n for n in ("/dev/nvidiactl", "/dev/nvidia-uvm") if n not in driver.nodes]
    if missing:
        yield broken(
            "driver.device-nodes",
            f"{' and '.join(missing)} are missing, so no program reaches a GPU",
            f"there are {', '.join(driver.nodes) or 'none'}",
            "`sudo nvidia-modprobe -u -c0`, and enable nvidia-persistenced so that they stay",
            stops_launch=True,
        )
    if driver.open_module and driver.firmware and module not in driver.firmware:
        yield risk(
            "driver.firmware",
            f"the GSP firmware of driver {module} is not installed: the module cannot bring a GPU up again",
            f"/lib/firmware/nvidia has {', '.join(driver.firmware)}",
            f"install the driver's firmware package of {module} (Ubuntu: "
            f"nvidia-firmware-{module.partition('.')[0]}-{module})",
        )


# -- GPUs --------------------------------------------------------------------------------------------------------------


def judge_gpus(facts: Facts) -> Iterator[Finding]:
    """All that are on the bus answer, all that the fleet names are there, and those of one engine are alike."""
    gpus, driver = facts.gpus, facts.driver
    if gpus is None:
        return
    if gpus.error is not None:
        fix = "see the layers below with `rotator doctor --all`, and `sudo dmesg | grep -i -e nvrm -e xid`"
        yield broken("gpus.unreachable", "the GPUs cannot be listed", gpus.error, fix, stops_launch=True)
        return
    yield from _lost(facts)
    for state in gpus.gpus:
        if state.trouble:
            yield broken(
                "gpus.unreadable",
                f"GPU {state.info.index} ({state.info.name}) does not answer",
                state.trouble,
                "`sudo dmesg | grep -i xid`; a GPU that fell off the bus or hangs in its firmware needs a "
                "reboot or a power cycle",
            )
        if state.fabric in ("not started", "in progress"):
            yield broken(
                "gpus.fabric",
                f"the NVLink fabric of GPU {state.info.index} is {state.fabric}: CUDA says 'system not yet "
                "initialized'",
                f"NVML says {state.fabric}",
                "`sudo systemctl enable --now nvidia-fabricmanager` (of exactly the driver's version)",
                stops_launch=True,
            )
    if driver is not None and not driver.pci and not gpus.gpus:
        yield broken(
            "gpus.none", "there is no NVIDIA GPU here", "neither the bus nor NVML shows one", "run this where they are"
        )
    yield from _named(facts)


def _lost(facts: Facts) -> Iterator[Finding]:
    """On the bus, but not known to the driver."""
    listed = {_short(state.info.pci_bus_id) for state in (facts.gpus.gpus if facts.gpus else ())}
    for gpu in facts.driver.pci if facts.driver else ():
        if listed and _short(gpu.bus_id) not in listed and "" not in listed:
            yield broken(
                "gpus.lost",
                f"the GPU at {gpu.bus_id} is on the bus, but the driver does not list it",
                f"NVML lists {', '.join(sorted(listed))}",
                "`sudo dmesg | grep -i -e xid -e 'fallen off'`: reseat or power it, then power the machine off and on",
            )


def _named(facts: Facts) -> Iterator[Finding]:
    known = facts.gpus.gpus if facts.gpus else ()
    listed = ", ".join(f"{g.info.index} ({g.info.id})" for g in known) or "none"
    for engine in facts.engines:
        if not is_here(engine):
            continue
        absent = [str(n) for n in engine.gpus if not any(str(n) in (str(g.info.index), g.info.id) for g in known)]
        if absent:
            yield broken(
                "gpus.absent",
                f"engine '{engine.name}' names GPU {', '.join(absent)}, which is not there",
                f"there are {listed}",
                f"change 'gpus' of engine '{engine.name}' in the fleet file, or find out where that GPU went",
                engine=engine.name,
                stops_launch=True,
            )
        kinds = {info.compute_capability for info in facts.infos(engine)}
        if len(kinds) > 1:
            shown = ", ".join(f"{i.index}: {i.name} (SM{_sm(i.compute_capability)})" for i in facts.infos(engine))
            fix = f"give engine '{engine.name}' GPUs of one kind: the slowest sets its pace, and kernels may differ"
            yield risk(
                "gpus.mixed", f"engine '{engine.name}' spans GPUs of different kinds", shown, fix, engine=engine.name
            )


def _short(bus_id: str) -> str:
    """00000000:C1:00.0 and 0000:c1:00.0 are the same place."""
    return bus_id.lower()[-12:] if len(bus_id) > 12 else bus_id.lower()


def _sm(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"


# -- PCIe --------------------------------------------------------------------------------------------------------------


def judge_pcie(facts: Facts) -> Iterator[Finding]:
    """Width and speed of each GPU's link beside what GPU and slot can. A wake moves all weights over it."""
    for gpu in facts.driver.pci if facts.driver else ():
        yield from _width(gpu)
        yield from _speed(gpu)


def _width(gpu: PciGpu) -> Iterator[Finding]:
    can = _least(gpu.width_max, gpu.port_width_max)
    if gpu.width and can and gpu.width < can:
        yield risk(
            "pcie.width",
            f"the GPU at {gpu.bus_id} is linked with {gpu.width} of {can:g} lanes: wakes take "
            f"{can / gpu.width:g} times as long",
            f"current_link_width {gpu.width}, GPU {gpu.width_max}, slot {gpu.port_width_max or '?'}",
            "reseat card and riser, clean the contacts, look at the slot's bifurcation in the BIOS",
        )
    elif gpu.width_max and gpu.port_width_max and gpu.port_width_max < gpu.width_max:
        yield note(
            "pcie.slot",
            f"the slot of the GPU at {gpu.bus_id} has {gpu.port_width_max} lanes, the GPU could use {gpu.width_max}",
            f"max_link_width of slot and GPU: {gpu.port_width_max}, {gpu.width_max}",
            "put it into a wider slot if there is one",
        )


def _speed(gpu: PciGpu) -> Iterator[Finding]:
    can = _least(gpu.speed_max, gpu.port_speed_max)
    if not gpu.speed or not can or gpu.speed >= can:
        return
    evidence = f"current_link_speed {gpu.speed:g} GT/s, GPU {gpu.speed_max:g}, slot {gpu.port_speed_max or '?'} GT/s"
    yield note(
        "pcie.speed",
        f"the link of the GPU at {gpu.bus_id} runs at {gpu.speed:g} of {can:g} GT/s now; an idle GPU slows its "
        "link down",
        evidence,
        "look again while a model wakes: `nvidia-smi --query-gpu=pcie.link.gen.current,pcie.link.gen.max "
        "--format=csv -l 1`; "
        "if it stays low, set the slot's generation in the BIOS, or replace the riser",
    )


def _least(*values: float | None) -> float | None:
    return min((v for v in values if v), default=None)


# -- between GPUs ------------------------------------------------------------------------------------------------------


def judge_nccl(facts: Facts) -> Iterator[Finding]:
    """What NCCL needs between the GPUs of one engine: peer access, no translation in the way, shared memory."""
    gpus = facts.gpus
    spans = [e for e in facts.engines if is_here(e) and len(e.gpus) > 1]
    if not spans or gpus is None:
        return
    pairs = {(a, b): why for a, b, why in gpus.no_peer}
    for engine in spans:
        own = [info.index for info in facts.infos(engine)]
        lacking = [f"{a}-{b} ({why})" for (a, b), why in pairs.items() if a in own and b in own]
        if lacking:
            yield note(
                "nccl.no-peer",
                f"GPUs of engine '{engine.name}' cannot reach each other's memory: NCCL goes through host RAM",
                f"no peer access: {', '.join(lacking)}",
                "add --disable-custom-all-reduce to its command; on boards that could, turn ACS off in the BIOS",
                engine=engine.name,
            )
    translated = [gpu for gpu in (facts.driver.pci if facts.driver else ()) if (gpu.iommu or "").startswith("DMA")]
    if translated:
        yield risk(
            "nccl.iommu",
            "the IOMMU translates the GPUs' addresses: peer-to-peer copies may hang or return wrong bytes",
            ", ".join(f"{gpu.bus_id} is in a group of type {gpu.iommu}" for gpu in translated),
            "add iommu=pt to GRUB_CMDLINE_LINUX in /etc/default/grub, `sudo update-grub`, reboot",
        )
    yield from _shm_room(facts, max(len(e.gpus) for e in spans))


def _shm_room(facts: Facts, ranks: int) -> Iterator[Finding]:
    seen = facts.processes
    if seen is None or seen.shm_free_bytes is None:
        return
    need = GIB // 4 * ranks
    if seen.shm_free_bytes < need:
        yield broken(
            "nccl.shm",
            f"shared memory (/dev/shm) has {gib(seen.shm_free_bytes)} free: {ranks} ranks exchange messages there",
            f"{gib(seen.shm_total_bytes or 0)} in all",
            "start the container with --ipc=host or --shm-size=16g, or `sudo mount -o remount,size=50% /dev/shm`",
        )
