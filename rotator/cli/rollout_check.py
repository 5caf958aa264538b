"""Before a rollout begins: does the target change what it is meant to, is it whole, does it fit? Changes nothing."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rotator.adapters.nomad_job import var_file
from rotator.adapters.overlay import read_manifest
from rotator.cli.jobs_nomad import Outcome, Registry, compare, on_nomad
from rotator.cli.rollout_service import RestService
from rotator.cli.rollout_world import FleetFile, engine_of, rendered, users_of
from rotator.config import EngineConfig, FleetConfig
from rotator.jobs import JobsError, Rendered, load_site
from rotator.jobs.lint import lint_site
from rotator.jobs.render import named
from rotator.ports import GpuInfo
from rotator.rollout.change import changed
from rotator.rollout.records import Settings
from rotator.service.specs import launch_spec

_RESTS = ("awake", "asleep", "stopped")


def chosen(old: FleetConfig, new: FleetConfig, names: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """(engine -> what differs of it, problems), in the order in which they are rolled."""
    found, problems = changed(old, new)
    known = {e.name for e in old.engines}
    said = [f"engine '{n}': is not in the fleet file" for n in names if n not in known]
    said += [
        f"engine '{n}': the target has it as it is: there is nothing to roll" for n in names if n in known - set(found)
    ]
    said += [
        f"{p}: a rollout changes only what engines are started with: bring this in by `rotator reload`"
        for p in problems
    ]
    wanted = {n: found[n] for n in names if n in found} if names else found
    if not wanted and not said:
        said = ["the target has every engine as it is: there is nothing to roll"]
    return wanted, said


def bundle_problems(engine: EngineConfig) -> Iterator[str]:
    """Every file of its bundle as the manifest has it."""
    path = engine.overlay_manifest
    if path is None:
        return
    try:
        files = read_manifest(path)
    except ValueError as e:
        yield f"engine '{engine.name}': {e}"
        return
    for item in files:
        file = path.parent / "files" / item.path
        try:
            is_same = hashlib.sha256(file.read_bytes()).hexdigest() == item.sha256
        except OSError as e:
            yield f"engine '{engine.name}': {file}: {e.strerror}: build the bundle again"
            continue
        if not is_same:
            yield f"engine '{engine.name}': {file} is not what its manifest says: build the bundle again"


def lint_problems(engine: EngineConfig) -> Iterator[str]:
    if engine.job is None or engine.job.site is None:
        return
    try:
        site = load_site(engine.job.site)
        name = named(site, engine.job.name or engine.name)
        yield from (f.line for f in lint_site(site, (name,)) if f.is_error)
    except JobsError as e:
        yield from e.problems


def state_problems(service: RestService, names: Sequence[str]) -> Iterator[str]:
    """Nothing is begun on an engine or a GPU that is not well."""
    gpus = {g["id"]: g for g in service.gpus()}
    for name in names:
        view = service.engine(name)
        if view["state"] not in _RESTS:
            yield f"engine '{name}' is {view['state']} ({view['reason']}): it must be awake, asleep or stopped"
        if view["launcher"] == "attach":
            yield f"engine '{name}' is attached: whoever started it must exchange it"
        for gpu in (gpus[id] for id in view["gpus"]):
            if gpu["health"] != "ok":
                yield f"GPU {gpu['index']} of engine '{name}' is {gpu['health']}: {gpu['reason']}"


def place_problems(
    path: Path, service: RestService, old: FleetConfig, new: FleetConfig, names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """(what Nomad would change, a line each; problems): no place, or a job that is not as the present file says."""
    mine = [n for n in names if engine_of(new, n).launcher == "nomad"]
    if not mine:
        return [], []
    infos = _infos(service)
    try:
        before = [_job(engine_of(old, n), infos, old) for n in mine]
        after = [_job(engine_of(new, n), infos, new) for n in mine]
    except JobsError as e:
        return [], list(e.problems)
    outcomes = on_nomad(path, lambda client: _compared(client, before))
    problems = [
        f"engine '{o.name}': its job differs from the present file already ({'; '.join(o.lines[:3])}): restart it first"
        for o in outcomes
        if o.lines
    ]
    outcomes = on_nomad(path, lambda client: _compared(client, after))
    problems += [f"engine '{o.name}': Nomad has no place for it: {o.failed}" for o in outcomes if o.failed]
    return [f"engine '{o.name}': {line}" for o in outcomes for line in o.lines], problems


def _infos(service: RestService) -> dict[str, GpuInfo]:
    return {g["id"]: GpuInfo(g["id"], g["index"], g["name"], g["total_bytes"]) for g in service.gpus()}


def _job(engine: EngineConfig, infos: dict[str, GpuInfo], fleet: FleetConfig) -> Rendered:
    """As the service itself would make it: with the places of its variables filled in."""
    made = rendered(engine)
    if engine.job is None or engine.job.site is not None:
        return replace(made, name=engine.name)
    gpus = tuple(i for g in engine.gpus for i in infos.values() if str(g) in (str(i.index), i.id))
    spec = launch_spec(engine, f"http://127.0.0.1:{engine.port}", gpus, fleet.state_dir)
    variables = dict(spec.job.variables) if spec.job else {}
    return replace(made, name=engine.name, variables=var_file(variables))


async def _compared(client: Registry, made: Sequence[Rendered]) -> tuple[Outcome, ...]:
    """A job file of one's own names its job itself: Nomad's parser tells."""
    ids = [one.job_id or str((await client.parse(one.hcl, one.variables))["ID"]) for one in made]
    return await compare(client, [replace(one, job_id=id) for one, id in zip(made, ids, strict=True)])


def environment_problems(fleet: FleetConfig, settings: Settings, names: Sequence[str]) -> Iterator[str]:
    """An environment that others run from cannot be exchanged under one engine alone."""
    prefix = Path(settings.environment)
    users = [e.name for e in users_of(fleet, prefix)]
    if others := [n for n in users if n not in names]:
        yield f"{prefix}: engines {', '.join(others)} run from it too: give each engine its own environment"
    if len(users) > 1 and not others:
        yield f"{prefix}: {', '.join(users)} share it, so they cannot go one at a time: give each its own environment"
    for name in names:
        if name not in users:
            yield f"engine '{name}' does not run from {prefix}: its program is {engine_of(fleet, name).command[:1]}"


def all_problems(
    file: FleetFile, service: RestService, old: FleetConfig, new: FleetConfig, names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """(what Nomad would change, every problem)."""
    problems = [
        line for n in names for line in (*bundle_problems(engine_of(new, n)), *lint_problems(engine_of(new, n)))
    ]
    problems += state_problems(service, names)
    if problems:
        return [], problems
    return place_problems(file.path, service, old, new, names)
