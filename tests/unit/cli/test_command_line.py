"""The command line as a whole: its reference is current, and no wrong input ends in a traceback."""

from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rotator.cli import command_docs, errors
from rotator.cli.main import app, run
from tests.unit.cli.transport import CannedTransport

DOCS = Path(__file__).parents[3] / "docs"
# They run a service, or write what has a form of its own.
_NO_JSON = {
    "rotator agent",
    "rotator agent certs",
    "rotator serve",
    "rotator schema",
    "rotator trace",
    "rotator jobs schema",
}


def commands() -> dict[str, Any]:
    return dict(command_docs._leaves(typer.main.get_command(app)))


def test_the_reference_of_the_commands_is_current():
    assert (DOCS / "cli.md").read_text() == command_docs.markdown(typer.main.get_command(app)), "run 'make docs'"


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_says_what_it_does_and_what_each_option_means(name: str):
    command = commands()[name]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} {parameter.opts} has no help"


def _words(name: str) -> st.SearchStrategy[list[str]]:
    """The command with its own options in any order, and values that make no sense."""
    command = commands()[name]
    options = [o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")]
    values = st.sampled_from(["", "x", "-1", "nan", "1e309", "0", "é\0", "../..", "a=b", "{}", "http://[", "9" * 40])
    pair = st.tuples(st.sampled_from(options), values).map(list)
    return st.lists(st.one_of(pair, values.map(lambda v: [v])), max_size=5).map(
        lambda parts: [*name.split()[1:], *(word for part in parts for word in part)]
    )


@pytest.mark.parametrize("name", sorted(set(commands()) - _NO_JSON))
def test_every_command_that_tells_something_tells_it_as_json_too(name: str):
    assert any("--json" in p.opts for p in commands()[name].params), f"{name} has no --json"


# What runs for long, opens a page's process or asks a machine by design is not for random words.
_FUZZED = sorted(set(commands()) - {"rotator serve", "rotator demo", "rotator soak", "rotator agent", "rotator trace"})


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.sampled_from(_FUZZED).flatmap(_words))
@example(words=["wake", "a", "--deadline", "nan"])
@example(words=["status", "--url", "http://["])
@example(words=["events", "--key", "é\0"])
@example(words=["ledger-backup", "\0"])
def test_no_words_on_the_command_line_end_in_a_traceback(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ROTATOR_TRACEBACK", raising=False)
    code = run(
        [w for w in words if w not in ("--install-completion", "--show-completion")], CannedTransport(OSError("no"))
    )
    said = capsys.readouterr()
    assert code in errors.MEANINGS
    assert code != errors.INTERNAL, said.err
    assert "Traceback" not in said.err
