"""The command line: every command, and how each one ends."""

import os
import sys
from collections.abc import Callable, Sequence

import typer

from rotator import __version__
from rotator.cli import (
    act,
    agent,
    bench,
    capacity,
    doctor,
    env,
    incidents,
    jobs,
    ledger_files,
    local,
    logs,
    look,
    replay,
    simulate,
    soak,
    top,
)
from rotator.cli.client import Transport
from rotator.cli.errors import EPILOG, INTERNAL, INTERRUPTED, PROBLEM, CliError

TRACEBACK = "ROTATOR_TRACEBACK"

app = typer.Typer(
    name="rotator",
    help="Models take turns on shared GPUs.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors as plain lines
)


@app.callback(invoke_without_command=True)
def version(
    show: bool = typer.Option(False, "--version", help="print the version"),
) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


_COMMANDS: tuple[Callable[..., None], ...] = (
    *(local.serve, local.check, local.schema, local.key, local.demo),
    *(look.status, look.engines, look.gpus, look.queue, look.plan, look.ledger, look.events),
    *(act.wake, act.sleep, act.swap, act.cordon, act.reload),
    *(doctor.doctor, ledger_files.ledger_backup, ledger_files.ledger_restore),
    *(top.top, logs.logs, bench.bench),
    *(act.reserve, look.reservations, act.unreserve),
    *(capacity.capacity, replay.replay),
    *(simulate.simulate, simulate.trace, soak.soak),
)
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(incidents.app, name="incidents")
for _action, _help in (
    ("start", "Start an engine."),
    ("stop", "Stop an engine and free all it holds."),
    ("restart", "Stop an engine and start it again."),
):
    app.command(_action)(act.engine_command(_action, _help))
for _action, _help in (
    ("release", "Let a quarantined or failed engine try again at once."),
    ("pin", "Never evict an engine."),
    ("unpin", "Let an engine be evicted again."),
):
    app.command(_action)(act.engine_setting(_action, _help))


app.add_typer(agent.agent_app, name="agent")
app.add_typer(env.env_app, name="env")
app.add_typer(jobs.jobs_app, name="jobs")


def run(arguments: Sequence[str], transport: Transport | None = None) -> int:
    """Run one command and return its exit code. ``transport`` carries its requests instead of HTTP."""
    try:
        app(args=list(arguments), prog_name="rotator", obj=transport)
    except CliError as e:
        for line in str(e).splitlines():
            print(f"rotator: {line}", file=sys.stderr)
        return e.code
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else PROBLEM if e.code else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:  # a fault of ours: no traceback reaches who did not ask for one
        if os.environ.get(TRACEBACK):
            raise
        said = f"internal error: {type(e).__name__}: {e}".splitlines()[0]
        print(f"rotator: {said}: please report it, with what {TRACEBACK}=1 shows", file=sys.stderr)
        return INTERNAL
    return 0


def main() -> None:
    sys.exit(run(sys.argv[1:]))
