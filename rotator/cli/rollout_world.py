"""Fleet file, Nomad and ledger as a rollout needs them, by the adapters that are there."""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rotator import config
from rotator.adapters.baselines import SqlBaselines
from rotator.adapters.nomad_access import access_of
from rotator.adapters.nomad_client import NomadClient
from rotator.adapters.nomad_job import var_file
from rotator.check.planned import ledger_url
from rotator.config import ConfigError, EngineConfig, FleetConfig
from rotator.jobs import JobsError, Rendered, load_site, render
from rotator.jobs.render import named
from rotator.ports import LauncherAway, LaunchError, LedgerError
from rotator.rollout.judge import Version
from rotator.rollout.ports import Away, RolloutError
from rotator.rollout.records import write_whole

NOMAD_S = 5.0


class SystemClock:
    def now_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class FleetFile:
    """Implements rollout.ports.Fleet. Raises RolloutError for a file that cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._parsed: tuple[str, FleetConfig] | None = None

    def read(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError as e:
            raise RolloutError(f"{self.path}: {e.strerror}: give the file that the service runs by, with -c") from None
        except UnicodeDecodeError as e:
            raise RolloutError(f"{self.path}: byte {e.start} is not UTF-8: save the file as UTF-8 text") from None

    def write(self, text: str) -> None:
        try:
            write_whole(self.path, text)
        except OSError as e:
            raise RolloutError(f"{self.path}: {e.strerror}: run this as a user who may write it") from None

    def parsed(self, text: str) -> FleetConfig:
        if self._parsed is None or self._parsed[0] != text:
            try:
                self._parsed = text, config.parse(text, base=self.path.parent)
            except ConfigError as e:
                raise RolloutError("\n".join(f"{self.path}: {problem}" for problem in e.problems)) from None
        return self._parsed[1]

    def version(self, text: str, engine: str, vllm: str) -> Version:
        found = engine_of(self.parsed(text), engine)
        image, profile = _image(found)
        bundle = found.overlay_manifest.parent.name if found.overlay_manifest else ""
        return Version(found.model, vllm, bundle, image, profile, found.spec_hash())

    def start_deadline_s(self, engine: str) -> float:
        return engine_of(self.parsed(self.read()), engine).start_deadline_s

    def nomad_away(self, engine: str) -> str:
        fleet = self.parsed(self.read())
        if engine_of(fleet, engine).launcher != "nomad":
            return ""

        async def ask() -> None:
            async with NomadClient(access_of(fleet.nomad, os.environ), deadline_s=NOMAD_S) as client:
                await client.leader()

        try:
            asyncio.run(ask())
        except LauncherAway as e:
            return str(e)
        except LaunchError as e:
            return f"Nomad does not answer well: {e}"
        return ""


def engine_of(fleet: FleetConfig, name: str) -> EngineConfig:
    """Raises RolloutError where it has none of that name."""
    for engine in fleet.engines:
        if name == engine.name:
            return engine
    raise RolloutError(f"the fleet file has no engine '{name}': it has {', '.join(e.name for e in fleet.engines)}")


def _image(engine: EngineConfig) -> tuple[str, str]:
    """The image and the profile by its job; for a job file, its variables tell."""
    job = engine.job
    if job is None:
        return "", ""
    if job.site is None:
        return str(job.variables.get("image", "")), str(job.variables.get("recipe", ""))
    try:
        values = rendered(engine).values
    except JobsError as e:
        raise RolloutError(f"engine '{engine.name}': {e}") from None
    return str(values.get("image", "")), str(values.get("recipe", ""))


def rendered(engine: EngineConfig) -> Rendered:
    """Its job, from its site file or its own. Raises JobsError."""
    job = engine.job
    if job is None:
        raise JobsError(f"engine '{engine.name}': has no job")
    if job.site is not None:
        site = load_site(job.site)
        return render(site, named(site, job.name or engine.name))
    try:
        hcl = Path(str(job.file)).read_text(encoding="utf-8")
    except OSError as e:
        raise JobsError(f"{job.file}: cannot be read ({e.strerror}): correct 'job.file'") from None
    return Rendered(engine.name, "", "", "", hcl, var_file(job.variables), job.variables)


class LedgerBaselines:
    """Implements rollout.ports.Baselines."""

    def __init__(self, fleet: FleetConfig) -> None:
        self._kept = SqlBaselines(ledger_url(fleet))

    def get(self, engine: str, version: str) -> Mapping[str, Any] | None:
        try:
            return self._kept.get(engine, version)
        except LedgerError as e:
            raise Away(str(e)) from None

    def put(self, engine: str, version: Version, facts: Mapping[str, Any]) -> None:
        try:
            self._kept.put(engine, version.key, asdict(version), facts)
        except LedgerError as e:
            raise Away(str(e)) from None

    def close(self) -> None:
        self._kept.close()


def users_of(fleet: FleetConfig, prefix: Path) -> Sequence[EngineConfig]:
    """Engines whose program lies in an environment."""
    return [e for e in fleet.engines if e.launcher == "process" and Path(e.command[0]).is_relative_to(prefix)]
