"""Commands that need no service."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from rotator.cli import config_docs, errors
from rotator.cli.main import run
from rotator.config import ConfigError, KeyConfig
from rotator.ports import LedgerError
from rotator.service.keys import Keys

DOCS = Path(__file__).parents[3] / "docs"
Output = pytest.CaptureFixture[str]


def test_a_new_keys_entry_opens_the_service_to_its_holder(capsys: Output):
    assert run(["key", "ci", "--scope", "operate"]) == errors.OK
    shown = capsys.readouterr().out
    secret = shown.split()[4]
    entry = yaml.safe_load(shown[shown.index("keys:") :])["keys"][0]
    keys = Keys([KeyConfig.model_validate(entry)])
    assert keys.authorize({"authorization": f"Bearer {secret}"}, "operate") is None
    assert keys.authorize({"authorization": f"Bearer {secret}"}, "admin") is not None


def test_a_new_key_can_be_read_by_a_program(capsys: Output):
    assert run(["key", "--json"]) == errors.OK
    assert set(json.loads(capsys.readouterr().out)) == {"name", "key", "sha256", "scopes"}


def test_a_scope_that_does_not_exist_is_wrong_usage():
    assert run(["key", "--scope", "root"]) == errors.USAGE


@pytest.mark.parametrize(
    ("arguments", "file"), [(["schema"], "fleet.schema.json"), (["schema", "--markdown"], "configuration.md")]
)
def test_the_documents_in_the_tree_are_what_the_types_say(capsys: Output, arguments: list[str], file: str):
    assert run(arguments) == errors.OK
    assert capsys.readouterr().out == (DOCS / file).read_text(), f"run `make docs` to write docs/{file} again"


def test_the_reference_names_every_key_of_every_section():
    text = config_docs.markdown()
    schema = json.loads(config_docs.json_schema())
    sections = [schema, *schema["$defs"].values()]
    keys = {key for section in sections for key in section.get("properties", {})}
    assert keys
    assert {key for key in keys if f"| `{key}` |" not in text} == set()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[object, ...]]]:
    """Puts a module with one function in place of one that starts real things."""

    def put(module: str, function: str, outcome: int | Exception) -> list[tuple[object, ...]]:
        calls: list[tuple[object, ...]] = []

        def act(*arguments: object) -> int:
            calls.append(arguments)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        made = ModuleType(module)
        setattr(made, function, act)
        monkeypatch.setitem(sys.modules, module, made)
        return calls

    return put


def test_serve_runs_the_service_on_the_file_and_ends_with_its_code(stand_in: Callable[..., list[tuple[object, ...]]]):
    calls = stand_in("rotator.app", "serve", 7)
    assert run(["serve", "-c", "fleet.yaml"]) == 7
    assert calls == [(Path("fleet.yaml"),)]


@pytest.mark.parametrize(
    ("error", "lines"),
    [(ConfigError(["keys: add one", "bind.port: change it"]), 2), (LedgerError("held by another service"), 1)],
)
def test_a_service_that_cannot_start_tells_why_line_by_line(
    stand_in: Callable[..., list[tuple[object, ...]]], capsys: Output, error: Exception, lines: int
):
    stand_in("rotator.app", "serve", error)
    assert run(["serve"]) == errors.PROBLEM
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_the_demo_ends_with_its_own_code(stand_in: Callable[..., list[tuple[object, ...]]]):
    calls = stand_in("rotator.demo.run", "main", 1)
    assert run(["demo", "--keep", "--json"]) == 1
    assert calls == [(True, True)]


def test_a_check_of_a_file_that_is_not_there_says_so_in_one_line(
    stand_in: Callable[..., list[tuple[object, ...]]], capsys: Output
):
    stand_in("rotator.adapters.devices", "NvmlDevices", 0)
    assert run(["check", "-c", "/nowhere/fleet.yaml"]) == errors.PROBLEM
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("error: /nowhere/fleet.yaml: cannot be read")
    assert last == "/nowhere/fleet.yaml: 1 errors, 0 warnings"
