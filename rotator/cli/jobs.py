"""``rotator jobs``: job specs from recipes and a site file; judged, compared with Nomad, registered in turn."""

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from rotator.cli import render as show
from rotator.cli.errors import OK, PROBLEM, USAGE, fail
from rotator.cli.jobs_nomad import Outcome, compare, on_nomad, parsed_by_nomad, register_all
from rotator.cli.options import AsJson, print_json
from rotator.cli.rollout import rollout
from rotator.jobs import Finding, JobsError, Rendered, Site, load_catalogue, load_site, render
from rotator.jobs.known_broken import Situation, is_version
from rotator.jobs.lint import lint_job, lint_site, read_job
from rotator.jobs.recipe import Arch
from rotator.jobs.render import names
from rotator.jobs.schema import json_schema, markdown
from rotator.jobs.view import Facts

jobs_app = typer.Typer(
    name="jobs",
    help="Nomad jobs of engines, from recipes and a site file.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

jobs_app.command()(rollout)

SITE_DEFAULT = Path("site.yaml")
SitePath = Annotated[Path, typer.Option("--site", "-s", help="the site file")]
Names = Annotated[
    list[str] | None, typer.Argument(help="engines of the site, gpu-lease@<node>, agents or rotator; all if none")
]
Fleet = Annotated[Path | None, typer.Option("--config", "-c", help="fleet file, for its section 'nomad'")]
Deadline = Annotated[float, typer.Option("--deadline", min=1, max=86400, help="wait at most so many seconds for a job")]


@jobs_app.command("list")
def list_(
    site: Annotated[Path | None, typer.Option("--site", "-s", help="a site file: its jobs instead")] = None,
    as_json: AsJson = False,
) -> None:
    """The catalogue's recipes, or a site's jobs."""
    if site is not None:
        made = [render(loaded, name) for loaded in (_site(site),) for name in names(loaded)]
        rows = [{"name": r.name, "job": r.job_id, "spec": r.template, "recipe": r.values.get("recipe")} for r in made]
        _rows(rows, as_json, "jobs")
        return
    recipes = _orderly(load_catalogue).values()
    rows = [
        {
            "name": r.name,
            "weights GiB": r.weights_gib.value,
            "TP#": r.tensor_parallel.value,
            "vLLM": r.vllm.value,
            "on": " ".join(r.arch),
            "profiles": " ".join(r.profiles),
        }
        for r in recipes
    ]
    if as_json:
        print_json([r.model_dump(mode="json") for r in recipes])
        return
    _rows(rows, False, "recipes")


def _rows(rows: list[dict[str, Any]], as_json: bool, title: str) -> None:
    if as_json:
        print_json(rows)
    elif rows:
        shown = (tuple("" if v is None else v for v in row.values()) for row in rows)
        show.console().print(show.table(title, tuple(rows[0]), shown, whole=tuple(rows[0])[:1]))


@jobs_app.command("render")
def render_(
    jobs: Names = None,
    site: SitePath = SITE_DEFAULT,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write spec and variables of each job there")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the variables of jobs, or write specs and variables as files that `nomad job run -var-file` takes."""
    made = _rendered(_site(site), jobs)
    if out is not None:
        for one in made:
            _write(out, one)
    if as_json:
        keys = ("name", "job_id", "namespace", "template", "hcl", "variables")
        print_json([{key: getattr(one, key) for key in keys} for one in made])
    elif out is not None:
        for one in made:
            spec, variables = _paths(out, one)
            typer.echo(f"nomad job run -var-file {variables} {spec}")
    else:
        typer.echo("\n".join(f"# {one.name}: for {one.template}.nomad.hcl\n{one.variables}" for one in made), nl=False)


def _paths(out: Path, one: Rendered) -> tuple[Path, Path]:
    stem = one.job_id
    return out / f"{stem}.nomad.hcl", out / f"{stem}.vars.hcl"


def _write(out: Path, one: Rendered) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, text in zip(_paths(out, one), (one.hcl, one.variables), strict=True):
            path.write_text(text, encoding="utf-8")
    except OSError as e:
        fail(PROBLEM, f"{out}: cannot be written ({e.strerror}): name another folder with --out")


@jobs_app.command()
def lint(
    jobs: Names = None,
    site: SitePath = SITE_DEFAULT,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="a job file of your own, .hcl or .json")] = None,
    var_file: Annotated[Path | None, typer.Option("--var-file", help="variables for that file")] = None,
    nomad: Annotated[
        bool, typer.Option("--nomad", help="let Nomad parse that file: expressions are seen through")
    ] = False,
    vllm: Annotated[
        str | None, typer.Option("--vllm", help="the vLLM in that file's image; its tag's if absent")
    ] = None,
    arch: Annotated[str | None, typer.Option("--arch", help="the GPUs that it is for, e.g. sm120")] = None,
    config: Fleet = None,
    as_json: AsJson = False,
) -> None:
    """Refuse what is known to break, and say where it is known from. Exit code 1 if anything is."""
    if file is None:
        own = {"--var-file": var_file, "--nomad": nomad, "--vllm": vllm, "--arch": arch}
        if given := [option for option, value in own.items() if value]:
            fail(USAGE, f"{given[0]} is about a job file of your own: name it with --file")
        loaded = _site(site)
        _conclude(_orderly(lint_site, loaded, _chosen(loaded, jobs)), str(site), as_json)
        return
    if jobs:
        fail(USAGE, f"'{jobs[0]}': jobs are named of a site file, and --file is judged as a whole: give one of both")
    if nomad:
        job = on_nomad(config, lambda client: parsed_by_nomad(client, file, var_file))
    else:
        job = _orderly(read_job, file, var_file)
    _conclude(_orderly(lint_job, job, file=str(file), facts=_facts(vllm, arch)), str(file), as_json)


def _facts(vllm: str | None, arch: str | None) -> Facts:
    known = get_args(Arch)
    if arch is not None and arch not in known:
        fail(USAGE, f"--arch: '{arch}' is none of {', '.join(known)}")
    if vllm is not None and not is_version(vllm):
        fail(USAGE, f"--vllm: '{vllm}' is no version: write what `vllm --version` tells, as 0.26.0")
    return Facts(Situation(vllm=vllm, arch=cast("Arch | None", arch)))


def _conclude(found: tuple[Finding, ...], where: str, as_json: bool) -> None:
    errors = [f for f in found if f.is_error]
    if as_json:
        shown = [
            {"level": "error" if f.is_error else "warning", "rule": f.rule, "source": f.source, "line": f.line}
            for f in found
        ]
        print_json({"ok": not errors, "findings": shown})
    else:
        for finding in found:
            typer.echo(f"{'error' if finding.is_error else 'warning'}: {finding.line}")
        typer.echo(f"{where}: {len(errors)} errors, {len(found) - len(errors)} warnings")
    raise typer.Exit(PROBLEM if errors else OK)


@jobs_app.command()
def plan(jobs: Names = None, site: SitePath = SITE_DEFAULT, config: Fleet = None, as_json: AsJson = False) -> None:
    """What registering jobs would change, and whether Nomad finds a place. Exit code 1 if it does not."""
    outcomes = _compared(site, jobs, config)
    _outcomes(outcomes, as_json)
    raise typer.Exit(PROBLEM if any(o.failed for o in outcomes) else OK)


@jobs_app.command()
def diff(jobs: Names = None, site: SitePath = SITE_DEFAULT, config: Fleet = None, as_json: AsJson = False) -> None:
    """Where what is registered differs from what the site file says. Exit code 1 if anything does."""
    outcomes = _compared(site, jobs, config)
    _outcomes(outcomes, as_json)
    raise typer.Exit(PROBLEM if any(o.is_new or o.lines for o in outcomes) else OK)


@jobs_app.command()
def run(
    jobs: Names = None,
    site: SitePath = SITE_DEFAULT,
    config: Fleet = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="for each job to be healthy before the next")] = True,
    deadline: Deadline = 2400.0,
    as_json: AsJson = False,
) -> None:
    """Register jobs one after another, each only over what was seen of it, and only if lint finds no error."""
    loaded = _site(site)
    made = _rendered(loaded, jobs)
    errors = [f.line for f in _orderly(lint_site, loaded, _chosen(loaded, jobs)) if f.is_error]
    if errors:
        fail(PROBLEM, *errors, "nothing was registered")
    deadline_s = deadline if wait else 0.0
    outcomes, code = on_nomad(config, lambda client: register_all(client, made, deadline_s=deadline_s))
    _outcomes(outcomes, as_json)
    raise typer.Exit(code)


def _compared(site: Path, jobs: list[str] | None, config: Path | None) -> tuple[Outcome, ...]:
    made = _rendered(_site(site), jobs)
    return on_nomad(config, lambda client: compare(client, made))


def _outcomes(outcomes: tuple[Outcome, ...], as_json: bool) -> None:
    if as_json:
        print_json([o.as_dict() for o in outcomes])
        return
    for outcome in outcomes:
        typer.echo(f"{outcome.name} ({outcome.job_id}): {outcome.said}")
        for line in outcome.lines:
            typer.echo(f"  {line}")
        for warning in outcome.warnings.splitlines():
            typer.echo(f"  warning: {warning}")


@jobs_app.command()
def schema(
    what: Annotated[str, typer.Argument(help="site or recipe")] = "site",
    as_markdown: Annotated[
        bool, typer.Option("--markdown/--no-markdown", help="the reference of both for people instead")
    ] = False,
) -> None:
    """Print the JSON Schema of site files or recipes, for editors."""
    if what not in ("recipe", "site"):
        fail(USAGE, f"'{what}' is neither recipe nor site")
    typer.echo(markdown() if as_markdown else json_schema(what), nl=False)


# -- errors in one place ---------------------------------------------------------------------------------------------


def _orderly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """A call whose JobsError ends the command."""
    try:
        return call(*args, **kwargs)
    except JobsError as e:
        fail(PROBLEM, *e.problems)


def _site(path: Path) -> Site:
    loaded: Site = _orderly(load_site, path)
    return loaded


def _chosen(site: Site, jobs: list[str] | None) -> tuple[str, ...]:
    return tuple(jobs) if jobs else names(site)


def _rendered(site: Site, jobs: list[str] | None) -> tuple[Rendered, ...]:
    return tuple(_orderly(render, site, name) for name in _chosen(site, jobs))
