"""The doctor's quick look before a launch: what surely keeps an engine from starting, told instead of tried."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from rotator.adapters.device_thread import DeviceThread
from rotator.config import EngineConfig
from rotator.core.values import EngineName
from rotator.doctor.facts import DriverFacts, Facts, KernelFacts, LaunchFacts, is_here
from rotator.doctor.findings import Finding
from rotator.doctor.judge_driver import judge_driver, judge_kernel
from rotator.doctor.judge_engine import judge_files, judge_launch, judge_software
from rotator.doctor.machine import MachineProbes
from rotator.doctor.probe_driver import read_driver
from rotator.doctor.probe_kernel import read_loaded
from rotator.ports import DeviceError, GpuInfo, LaunchSpec

DEADLINE_S = 10.0
_log = logging.getLogger(__name__)


class Preflight:
    """For one event loop. An engine whose files hang has a thread of its own that hangs, and is launched unchecked: a
    slow disk must not be what keeps an engine down."""

    def __init__(
        self,
        gpus: Callable[[EngineName], tuple[GpuInfo, ...]],
        root: Path = Path("/"),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """``gpus`` are an engine's, as the service knows them."""
        self._gpus = gpus
        self._root = root
        self._environ = os.environ if environ is None else environ
        self._threads: dict[EngineName, DeviceThread] = {}  # as many as the fleet ever had engines

    async def __call__(self, engine: EngineConfig, spec: LaunchSpec) -> str | None:
        """Why the launch surely fails, and what mends it; None where nothing speaks against it. Never raises."""
        if engine.launcher != "process" or not is_here(engine):
            return None
        gpus = self._gpus(engine.name)
        thread = self._threads.setdefault(engine.name, DeviceThread(f"the look at engine '{engine.name}'"))
        try:
            found = await thread.call(lambda: self.look(engine, spec, gpus), deadline_s=DEADLINE_S)
        except DeviceError as e:
            _log.warning("engine '%s' is launched unchecked: %s", engine.name, e)
            return None
        except Exception:
            _log.exception("engine '%s' is launched unchecked", engine.name)
            return None
        return in_words(found)

    def look(self, engine: EngineConfig, spec: LaunchSpec, gpus: tuple[GpuInfo, ...]) -> tuple[Finding, ...]:
        """Blocking: a few small files, the headers of the model's files."""
        probes = MachineProbes(None, self._root, environ=self._environ)
        facts = Facts(
            kernel=read_loaded(self._root),
            driver=read_driver(self._root),
            software=(probes.software(engine, gpus, spec.command),),
            files=probes.files([engine]),
            launches=LaunchFacts((probes.launch(engine, spec.command),)),
        )
        judges = (judge_launch, judge_files, judge_software)
        found = [f for judge in judges for f in judge(facts)]
        if _has_driver(facts.driver, facts.kernel):
            found = [*judge_kernel(facts), *judge_driver(facts), *found]
        return tuple(f for f in found if f.stops_launch)


def _has_driver(driver: DriverFacts | None, kernel: KernelFacts | None) -> bool:
    """Without an NVIDIA driver there is nothing to say about it: simulated GPUs have none."""
    return bool(driver and kernel and (driver.proc_version or kernel.module_version))


def in_words(found: tuple[Finding, ...]) -> str | None:
    """The first finding, and how many more there are."""
    if not found:
        return None
    first = found[0]
    more = f" ({len(found) - 1} more: see `rotator doctor`)" if len(found) > 1 else ""
    return f"not launched, it cannot start: {first.what}; {first.evidence}; {first.fix}{more}"
