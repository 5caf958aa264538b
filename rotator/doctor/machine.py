"""The probes of a machine: this one, or one that was written down below a folder."""

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from rotator.adapters.device_thread import DeviceThread
from rotator.adapters.devices import NvmlDevices
from rotator.check.vllm import flag, is_vllm, model_argument
from rotator.config import EngineConfig, FleetConfig
from rotator.doctor.facts import (
    Facts,
    FileFacts,
    Launch,
    LaunchFacts,
    Model,
    OverlayFile,
    Software,
    is_here,
    model_folder,
)
from rotator.doctor.known import known_troubles
from rotator.doctor.probe_driver import read_driver
from rotator.doctor.probe_engine import find_program, look_at_launch, look_at_software
from rotator.doctor.probe_gpus import read_gpus, recorded_gpus
from rotator.doctor.probe_host import read_host
from rotator.doctor.probe_kernel import read_kernel
from rotator.doctor.probe_models import look_at_model, look_at_overlay, model_type
from rotator.doctor.probe_processes import read_processes
from rotator.doctor.probe_service import read_ledger, read_nodes, read_nomad, read_ports
from rotator.ports import Devices, GpuInfo

PROBE_S = 20.0
_HERE = Path("/")
_PATH = "/usr/local/bin:/usr/bin:/bin"


class MachineProbes:
    """Implements walk.Probes. ``root`` is where /proc, /sys, /boot and the engines' files lie; ``devices`` replaces
    NVML. Blocking work runs in a thread of its own each, so that a file system that hangs holds up its part alone."""

    def __init__(
        self,
        fleet: FleetConfig | None,
        root: Path = _HERE,
        *,
        devices: Devices | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._fleet = fleet
        self._root = root
        self._devices = devices
        self._environ = os.environ if environ is None else environ
        self._is_here = root == _HERE

    async def gather(self, part: str, known: Facts) -> Any:
        asked = self._async_parts(known).get(part)
        if asked is not None:
            return await asked()
        work = self._blocking_parts(known)[part]
        return await DeviceThread(f"doctor's look at {part}").call(work, deadline_s=PROBE_S)

    def _async_parts(self, known: Facts) -> Mapping[str, Callable[[], Awaitable[Any]]]:
        fleet = self._fleet
        parts: dict[str, Callable[[], Awaitable[Any]]] = {}
        if self._is_here:
            parts["gpus"] = lambda: read_gpus(self._devices or NvmlDevices())
        elif self._devices is not None:
            devices = self._devices
            parts["gpus"] = lambda: read_gpus(devices)
        if fleet is not None and self._is_here:
            parts["nomad"] = lambda: read_nomad(fleet)
            parts["nodes"] = lambda: read_nodes(fleet)
        return parts

    def _blocking_parts(self, known: Facts) -> Mapping[str, Callable[[], Any]]:
        root, fleet = self._root, self._fleet
        nothing: Callable[[], Any] = lambda: None  # noqa: E731 - one more entry of the table below
        return {
            "kernel": lambda: read_kernel(root),
            "driver": lambda: read_driver(root),
            "gpus": lambda: recorded_gpus(root),
            "host": lambda: read_host(root),
            "processes": lambda: read_processes(root, _service_id(fleet)),
            "ledger": (lambda: read_ledger(fleet)) if fleet and self._is_here else nothing,
            "ports": (lambda: read_ports(fleet, _held_by(known, fleet))) if fleet and self._is_here else nothing,
            "software": lambda: tuple(self.software(e, known.infos(e)) for e in self._own_engines()),
            "files": lambda: self.files(self._own_engines(every=True)),
            "launches": lambda: self._launches(known),
            "nomad": nothing,
            "nodes": nothing,
        }

    def _own_engines(self, *, every: bool = False) -> list[EngineConfig]:
        """Engines of this machine that the service itself starts, or all of this machine."""
        engines = self._fleet.engines if self._fleet else ()
        return [e for e in engines if is_here(e) and (every or e.launcher == "process")]

    # -- one engine --------------------------------------------------------------------------------------------------

    def software(self, engine: EngineConfig, infos: tuple[GpuInfo, ...], command: tuple[str, ...] = ()) -> Software:
        words = command or filled(engine)
        if not is_vllm(words):
            return Software(engine.name)  # what another server needs is not known here
        program = find_program(self._root, words, self._path(engine), engine.workdir)
        folder = model_folder(engine, model_argument(words))
        kind = model_type(self._below(folder)) if folder is not None else ""
        seen = look_at_software(self._root, engine.name, program, kind)
        troubles = known_troubles(engine, seen, infos, {**self._environ, **engine.env})
        return Software(
            seen.engine, seen.prefix, seen.python, seen.packages, seen.torch_cuda, seen.modules, troubles, kind
        )

    def launch(self, engine: EngineConfig, command: tuple[str, ...] = ()) -> Launch:
        has_path = bool(engine.env.get("PYTHONPATH") or (self._is_here and self._environ.get("PYTHONPATH")))
        words = command or filled(engine)
        return look_at_launch(self._root, engine.name, words, self._path(engine), engine.workdir, has_path=has_path)

    def model(self, engine: EngineConfig) -> Model | None:
        folder = model_folder(engine, model_argument(engine.command))
        if folder is None:
            return None
        is_usual = flag(engine.command, "--load-format") in (None, "auto", "safetensors", "fastsafetensors")
        return look_at_model(engine.name, self._below(folder), str(folder), weights=is_usual)

    def files(self, engines: list[EngineConfig]) -> FileFacts:
        """Nomad's engines have their models where their jobs mount them from: only what the fleet file names."""
        models = tuple(m for e in engines if (m := self.model(e)) is not None)
        overlays: list[OverlayFile] = []
        troubles: list[tuple[str, str, str]] = []
        for engine in engines:
            if engine.overlay_manifest is None:
                continue
            manifest = self._below(engine.overlay_manifest)
            try:
                overlays += look_at_overlay(engine.name, manifest)
            except ValueError as e:
                troubles.append((engine.name, str(engine.overlay_manifest), str(e)))
        return FileFacts(models, tuple(overlays), tuple(troubles))

    def _launches(self, known: Facts) -> LaunchFacts:
        running = self._running(known)
        found = []
        for engine in self._own_engines():
            launch = self.launch(engine)
            words = running.get(engine.name)
            expected = tuple(w for w in launch.expected[1:] if "{" not in w)
            found.append(
                Launch(
                    launch.engine,
                    launch.program,
                    launch.problem,
                    launch.interpreter,
                    launch.package,
                    launch.package_version,
                    expected if words is not None else (),
                    words,
                )
            )
        return LaunchFacts(tuple(found))

    def _running(self, known: Facts) -> dict[str, tuple[str, ...]]:
        """The words of each engine's first process: the one whose parent is not the engine's too."""
        seen = known.processes or read_processes(self._root, _service_id(self._fleet))
        marked = [p for p in seen.processes if p.engine]
        firsts = {
            p.engine: p.pid
            for p in reversed(marked)
            if not any(q.pid == p.ppid and q.engine == p.engine for q in marked)
        }
        words = {}
        for name, pid in firsts.items():
            try:
                raw = (self._root / "proc" / str(pid) / "cmdline").read_bytes()
            except OSError:
                continue
            words[name] = tuple(w.decode(errors="replace") for w in raw.rstrip(b"\0").split(b"\0"))
        return words

    def _path(self, engine: EngineConfig) -> str:
        return engine.env.get("PATH", self._environ.get("PATH", _PATH) if self._is_here else _PATH)

    def _below(self, path: Path) -> Path:
        return self._root / str(path).lstrip("/") if path.is_absolute() else path


def filled(engine: EngineConfig) -> tuple[str, ...]:
    """The command with what is known without a launch: the name and the GPUs; the port where the file gives one."""
    places = {"{name}": engine.name, "{tp}": str(len(engine.gpus))}
    if engine.port is not None:
        places["{port}"] = str(engine.port)
    return tuple(_replaced(word, places) for word in engine.command)


def _replaced(word: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        word = word.replace(place, value)
    return word


def _service_id(fleet: FleetConfig | None) -> str:
    try:
        return (fleet.state_dir / "service_id").read_text().strip() if fleet else ""
    except OSError:
        return ""


def _held_by(known: Facts, fleet: FleetConfig) -> int | None:
    return known.ledger.held_by if known.ledger else read_ledger(fleet).held_by
