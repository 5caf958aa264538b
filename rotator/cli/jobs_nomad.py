"""What ``rotator jobs`` asks of Nomad: compare, register one after another, and follow each until it is healthy."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rotator import config
from rotator.adapters.nomad_access import access_of
from rotator.adapters.nomad_client import NomadClient, Planned, Registered
from rotator.adapters.nomad_words import OUR_META, diff_lines, placement_words
from rotator.cli.errors import FAILED, OK, PROBLEM, REFUSED, UNREACHABLE, fail
from rotator.config import ConfigError
from rotator.config_nomad import NomadConfig
from rotator.jobs import JobsError, Rendered
from rotator.jobs.files import read_text
from rotator.ports import LaunchConflict, LauncherAway, LaunchError, LaunchRefused

POLL_S = 2.0
_ADVICE = {
    "unreachable": "start Nomad there, or say where it is: NOMAD_ADDR, or nomad.address of a fleet file given with -c",
    "leader": "try again when its servers have elected one",
}
_ENDED_BADLY = ("failed", "cancelled", "blocked")

T = TypeVar("T")


class Registry(Protocol):
    """What is asked of Nomad here (``adapters/nomad_client.py``)."""

    async def parse(self, hcl: str, variables: str = "") -> dict[str, Any]: ...
    async def plan(self, job: Mapping[str, Any]) -> Planned: ...
    async def register(
        self, job: Mapping[str, Any], *, modify_index: int, source: str = "", variables: str = ""
    ) -> Registered: ...
    async def job(self, job_id: str) -> dict[str, Any] | None: ...
    async def deployment(self, job_id: str) -> dict[str, Any] | None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """One job: what differs (``lines``), why it has no place (``failed``), and in words what became of it."""

    name: str
    job_id: str
    said: str
    is_new: bool = False
    lines: tuple[str, ...] = ()
    failed: str = ""
    warnings: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def on_nomad(fleet: Path | None, ask: Callable[[Registry], Awaitable[T]]) -> T:
    """Run one conversation with Nomad; what goes wrong ends the command with its own exit code."""

    async def talk(settings: NomadConfig) -> T:
        async with NomadClient(access_of(settings, os.environ), deadline_s=settings.deadline_s) as client:
            return await ask(client)

    try:
        settings = config.load(fleet).nomad if fleet is not None else NomadConfig()
        return asyncio.run(talk(settings))
    except ConfigError as e:
        fail(PROBLEM, *e.problems)
    except JobsError as e:
        fail(PROBLEM, *e.problems)
    except LauncherAway as e:
        fail(REFUSED if e.kind == "token" else UNREACHABLE, str(e), *([_ADVICE[e.kind]] if e.kind in _ADVICE else []))
    except (LaunchRefused, LaunchConflict) as e:
        fail(REFUSED, str(e), *(["give the job's variables with --var-file"] if "Unset variable" in str(e) else []))
    except LaunchError as e:
        fail(PROBLEM, str(e))


async def parsed_by_nomad(client: Registry, file: Path, var_file: Path | None) -> Mapping[str, Any]:
    """Anybody's HCL as Nomad understands it."""
    return await client.parse(read_text(file), read_text(var_file) if var_file else "")


async def compare(client: Registry, made: Sequence[Rendered]) -> tuple[Outcome, ...]:
    """What registering each job would do. Nothing is changed."""
    return tuple([(await _look(client, one))[0] for one in made])


async def register_all(
    client: Registry, made: Sequence[Rendered], *, deadline_s: float
) -> tuple[tuple[Outcome, ...], int]:
    """One after another: the next only when the one before is healthy. Stops at the first that fails.

    A ``deadline_s`` of 0 does not wait for health. The second value is the command's exit code.
    """
    done: list[Outcome] = []
    for one in made:
        outcome, is_well = await _register(client, one, deadline_s)
        done.append(outcome)
        if not is_well:
            left = [other.name for other in made[len(done) :]]
            done += [Outcome(name, "", "not begun: an earlier job failed") for name in left]
            return tuple(done), FAILED
    return tuple(done), OK


async def _look(client: Registry, one: Rendered) -> tuple[Outcome, dict[str, Any], Planned, bool]:
    job = await client.parse(one.hcl, one.variables)
    registered = await client.job(one.job_id)
    _keep_marks(job, registered)
    planned = await client.plan(job)
    lines = diff_lines(planned.diff)
    failed = placement_words(planned.failed) if planned.failed else ""
    is_stopped = bool(registered and registered.get("Stop"))
    said = "is not registered" if registered is None else "is stopped" if is_stopped else "is as registered"
    if registered is not None and lines:
        said = f"differs in {len(lines)} {'place' if len(lines) == 1 else 'places'}"
    if failed:
        said += f"; Nomad has no place for it: {failed}"
    shown = lines if registered is not None else ()
    outcome = Outcome(one.name, one.job_id, said, registered is None, shown, failed, planned.warnings)
    needs = registered is None or is_stopped or bool(lines)
    return outcome, job, planned, needs


def _keep_marks(job: dict[str, Any], registered: Mapping[str, Any] | None) -> None:
    """What the service wrote into the registered job stays: by it the service finds its engines again."""
    marks = {k: v for k, v in ((registered or {}).get("Meta") or {}).items() if k in OUR_META}
    if marks:
        job["Meta"] = {**(job.get("Meta") or {}), **marks}


async def _register(client: Registry, one: Rendered, deadline_s: float) -> tuple[Outcome, bool]:
    outcome, job, planned, needs = await _look(client, one)
    if not needs:
        return outcome, True
    if outcome.failed:
        return outcome, False
    told = await client.register(job, modify_index=planned.job_modify_index, source=one.hcl, variables=one.variables)
    said, is_well = "registered", True
    if deadline_s > 0:
        said, is_well = await _healthy(client, one.job_id, deadline_s)
    warnings = told.warnings or outcome.warnings
    return Outcome(one.name, one.job_id, said, outcome.is_new, outcome.lines, "", warnings), is_well


async def _healthy(client: Registry, job_id: str, deadline_s: float) -> tuple[str, bool]:
    """Follow the deployment that this registration began: that of the job's version, or of a later one."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    job = await client.job(job_id)
    version = int((job or {}).get("Version") or 0)
    last = "no deployment yet"
    while loop.time() - began < deadline_s:
        found = await client.deployment(job_id)
        if found is not None and int(found.get("JobVersion") or 0) >= version:
            status = str(found.get("Status"))
            last = str(found.get("StatusDescription") or status)
            if status == "successful":
                return f"registered and healthy after {loop.time() - began:.0f} s", True
            if status in _ENDED_BADLY:
                return f"registered, and its deployment ended: {last}", False
        await asyncio.sleep(POLL_S)
    return f"registered, but not healthy within {deadline_s:g} s: {last}", False
