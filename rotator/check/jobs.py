"""Findings about jobs that come from a site file: what its lint says, and where fleet file and site file disagree."""

from collections.abc import Iterator

from rotator.check.findings import Finding, Surroundings, error
from rotator.config import EngineConfig, FleetConfig
from rotator.jobs import JobsError, Site, load_site, render
from rotator.jobs.foreign import views_of
from rotator.jobs.lint import lint_rendered, read_job
from rotator.jobs.render import named
from rotator.jobs.site import EngineSite
from rotator.jobs.view import command


def check_jobs(fleet: FleetConfig, around: Surroundings) -> Iterator[Finding]:
    for engine in fleet.engines:
        if engine.job is None or engine.job.site is None or not around.exists(engine.job.site):
            continue
        place = f"engine '{engine.name}'.job"
        try:
            site = load_site(engine.job.site)
            name = named(site, engine.job.name or engine.name)
            made = render(site, name)
        except JobsError as e:
            yield from (Finding(f"{place}: {problem}") for problem in e.problems)
            continue
        if name not in site.engines:
            yield error(f"{place}.name", f"'{name}' of the site file is no engine", "name one of its engines")
            continue
        yield from _agreement(fleet, engine, site, site.engines[name])
        yield from (
            Finding(f"{place}: {found.line}", found.is_error)
            for found in lint_rendered(_as_told(site, name, engine), made)
        )


def job_words(engine: EngineConfig) -> tuple[str, ...]:
    """Program and arguments of an engine as its job gives them; none where it has no job, or it cannot be read here."""
    job = engine.job
    try:
        if job is not None and job.site is not None:
            site = load_site(job.site)
            return command(render(site, named(site, job.name or engine.name)))
        if job is not None and job.file is not None:
            views = views_of(read_job(job.file, variables=job.variables), file=str(job.file))
            return views[0].words if len(views) == 1 else ()
    except (JobsError, KeyError):  # a job that is no engine has no such words
        return ()
    return ()


def _as_told(site: Site, name: str, engine: EngineConfig) -> Site:
    """The service puts engines to sleep by the fleet file's levels, whatever a recipe says."""
    told = site.engines[name].model_copy(update={"sleep_levels": engine.sleep_levels})
    return site.model_copy(update={"engines": {**site.engines, name: told}})


def _agreement(fleet: FleetConfig, engine: EngineConfig, site: Site, said: EngineSite) -> Iterator[Finding]:
    place, file = f"engine '{engine.name}'", engine.job.site if engine.job else None
    if engine.port != said.port:
        yield error(f"{place}.port", f"is {engine.port}, and {said.port} in {file}", "make them equal")
    gpus = site.gpus_of(said)
    if len(engine.gpus) != len(gpus):
        problem = f"names {len(engine.gpus)} GPUs, and {file} {len(gpus)}"
        yield error(f"{place}.gpus", problem, "name the same GPUs in both")
    for gpu in engine.gpus:
        uuid = str(gpu).rsplit("/", 1)[-1]
        if uuid.startswith(("GPU-", "MIG-")) and uuid not in gpus:
            yield error(f"{place}.gpus", f"GPU {uuid} is not among its GPUs in {file}", "name the same GPUs in both")
    if fleet.nomad.namespace is not None and fleet.nomad.namespace != site.namespace:
        problem = f"is '{fleet.nomad.namespace}', and '{site.namespace}' in {file}"
        yield error("nomad.namespace", problem, "make them equal")
