"""The options of ``rotator jobs rollout``: one goal, and how hard a new version is tried."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rotator.cli.errors import USAGE, fail

RECALL_MAX = 256

Engines = Annotated[list[str] | None, typer.Argument(help="only these, in this order; all that differ if none")]
To = Annotated[Path | None, typer.Option("--to", help="the fleet file as it is to be")]
SiteTo = Annotated[
    Path | None, typer.Option("--site-to", help="the site file that jobs are to come from, instead of a fleet file")
]
Install = Annotated[
    str | None,
    typer.Option("--install", help="command that changes --environment in place, run while its engine is down"),
]
Environment = Annotated[
    Path | None, typer.Option("--environment", help="the Python environment that --install changes; archived before")
]
Archives = Annotated[Path, typer.Option("--archives", help="folder of environments' archives")]
Resume = Annotated[bool, typer.Option("--resume", help="go on where the last one stopped")]
Abort = Annotated[bool, typer.Option("--abort", help="take back the engine that is under way, and end it")]
Status = Annotated[bool, typer.Option("--status", help="show the last one, and change nothing")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, show what would be done")]

Recall = Annotated[str, typer.Option("--recall", help="how many long prompts at once, batch after batch")]
RecallWords = Annotated[int, typer.Option("--recall-words", min=20, max=1_000_000, help="length of each")]
RecallAsBefore = Annotated[
    bool, typer.Option("--recall-as-before", help="a version may miss as many needles as the one in place does")
]
Cycles = Annotated[int, typer.Option("--cycles", min=0, max=10_000, help="sleeps and wakes")]
Samples = Annotated[int, typer.Option("--samples", min=1, max=1000, help="answers whose speed is measured")]
Tolerance = Annotated[float, typer.Option("--tolerance", min=0, max=10, help="how much slower it may be, as a share")]
Drain = Annotated[
    float, typer.Option("--drain-deadline", min=1, max=86400, help="seconds for requests in flight to end")
]
AwayFor = Annotated[
    float, typer.Option("--away", min=0, max=86400, help="seconds to wait for a service or Nomad that is away")
]


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to be new: a fleet file, another site file, or an environment that a command changes in place."""

    to: Path | None = None
    site_to: Path | None = None
    install: tuple[str, ...] = ()
    environment: str = ""

    @property
    def is_given(self) -> bool:
        return bool(self.to or self.site_to or self.install)


def goal(to: Path | None, site_to: Path | None, install: str | None, environment: Path | None, others: int) -> Goal:
    """``others`` counts the further things that the command is told to do: one thing at a time."""
    if sum(one is not None for one in (to, site_to, install)) + others != 1:
        fail(USAGE, "give one of --to, --site-to, --install, --resume, --abort and --status")
    if environment is not None and install is None:
        fail(USAGE, f"--environment {environment}: say what changes it with --install")
    if install is None:
        return Goal(to, site_to)
    if environment is None:
        fail(USAGE, "--install changes an environment: name it with --environment")
    return Goal(install=_words(install), environment=str(environment.absolute()))


def _words(install: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(install))
    except ValueError as e:
        fail(USAGE, f"--install: {install!r} is no command line ({str(e).lower()}): quote it as for a shell")
    if not words:
        fail(USAGE, "--install: there is no command in it: give one as '/opt/vllm/bin/pip install vllm==0.27.0'")
    return words


def sizes(text: str) -> tuple[int, ...]:
    """The batches of --recall."""
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    if not found or any(not 1 <= size <= RECALL_MAX for size in found):
        fail(USAGE, f"--recall: '{text}' is no list of numbers from 1 to {RECALL_MAX}, as 8,16")
    return found
