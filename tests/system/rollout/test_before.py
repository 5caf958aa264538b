"""What is refused before anything is begun."""

import hashlib
import json
from pathlib import Path

import pytest

from rotator.cli.main import run
from rotator.cli.rollout_check import bundle_problems, environment_problems
from rotator.cli.rollout_world import FleetFile
from rotator.rollout.records import Settings

OLD = """\
engines:
  - {name: a, gpus: [0], command: [/opt/a/bin/vllm, serve]}
  - {name: b, gpus: [1], command: [/opt/b/bin/vllm, serve]}
  - {name: c, gpus: [2], command: [/opt/b/bin/vllm, serve]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(OLD)
    return path


def said(file: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    nobody = ("--url", "http://127.0.0.1:9")
    code = run(["jobs", "rollout", "-c", str(file), *nobody, "--yes", *words])
    got = capsys.readouterr()
    return code, got.out + got.err


def test_a_target_that_changes_nothing_or_more_than_versions_is_refused(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = file.with_name("new.yaml")
    target.write_text(OLD)
    code, words = said(file, capsys, "--to", str(target))
    assert (code, "there is nothing to roll" in words) == (1, True)
    target.write_text(OLD.replace("gpus: [1]", "gpus: [3]") + "policies: {min_stay_s: 7}\n")
    code, words = said(file, capsys, "--to", str(target))
    assert code == 1
    assert "engine 'b'.gpus: changed: a rollout changes only what engines are started with" in words
    assert "policies.min_stay_s" in words
    assert "nothing was begun" in words
    assert file.read_text() == OLD


def test_what_to_do_must_be_said_once_and_where_it_can_be_done(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(file, capsys)[0] == 2
    assert said(file, capsys, "--status", "--resume")[0] == 2
    away = tmp_path / "elsewhere" / "new.yaml"
    away.parent.mkdir()
    away.write_text(OLD)
    code, words = said(file, capsys, "--to", str(away))
    assert (code, "paths in it are relative to its folder" in words) == (2, True)
    assert said(file, capsys, "--to", str(file), "--recall", "8,many")[0] == 2
    assert said(file, capsys, "--to", str(file), "--recall", "")[0] == 2, "an empty variable of a script is no wish"
    assert said(file, capsys, "--to", str(file), "--site-to", str(file))[0] == 2
    assert said(file, capsys, "--to", str(file.with_name("none.yaml")))[0] == 2
    assert said(file, capsys, "--resume") == (1, "rotator: there is no rollout here: begin one with --to\n")
    assert said(file, capsys, "--status") == (0, "there was no rollout here yet\n")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--install", "pip install vllm"), "--install changes an environment: name it with --environment"),
        (("--to", "new.yaml", "--environment", "/opt/a"), "--environment /opt/a: say what changes it with --install"),
        (("--install", " ", "--environment", "/opt/a"), "--install: there is no command in it"),
        (("--install", "pip 'vllm", "--environment", "/opt/a"), "is no command line (no closing quotation)"),
        (("--install", "x", "--environment", "/opt/a", "--to", "new.yaml"), "give one of --to, --site-to, --install"),
        (("--site-to", "site.yaml"), "--site-to: no engine's job comes from a site file"),
    ],
)
def test_options_that_say_too_little_or_two_things_are_refused(
    file: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], why: str
) -> None:
    code, lines = said(file, capsys, *words)
    assert (code, why in lines) == (2, True), lines


def test_a_site_file_that_is_not_there_or_is_none_is_told_before_anything_is_begun(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = "launcher: nomad, port: 8001, job: {site: old.yaml}"
    file.write_text(f"engines:\n  - {{name: a, gpus: [0], {job}}}\n")
    before = file.read_text()
    assert said(file, capsys, "--site-to", "none.yaml") == (2, "rotator: --site-to: there is no file none.yaml\n")
    assert said(file, capsys, "--site-to", str(file.parent)) == (
        2,
        f"rotator: --site-to: there is no file {file.parent}\n",
    )
    assert file.read_text() == before


def test_a_target_that_is_no_fleet_file_is_told_by_its_own_name(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = file.with_name("new.yaml")
    target.write_text("engines: 3\n")
    code, words = said(file, capsys, "--to", str(target))
    assert (code, words.startswith(f"rotator: {target}: engines: should be a list")) == (1, True), words


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "settings": 3, "parts": [], "log": []}'])
def test_a_journal_that_is_none_is_told_and_left_alone(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file.write_text(f"state_dir: state\n{OLD}")
    journal = tmp_path / "state" / "rollout" / "rollout.json"
    journal.parent.mkdir(parents=True)
    journal.write_text(text)
    for words in (("--status",), ("--resume",), ("--to", str(file))):
        code, lines = said(file, capsys, *words)
        assert (code, "move it away if no rollout is under way" in lines) == (1, True), lines
    assert journal.read_text() == text


def test_a_service_that_is_not_there_has_its_own_exit_code(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = file.with_name("new.yaml")
    target.write_text(OLD.replace("/opt/a/", "/opt/a2/"))
    code, words = said(file, capsys, "--to", str(target))
    assert (code, "cannot reach the service" in words) == (3, True)
    assert words.endswith("nothing was begun\n"), "there is nothing to resume"


def test_a_tampered_bundle_is_refused(file: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "0d5e"
    (bundle / "files/vllm").mkdir(parents=True)
    (bundle / "files/vllm/cumem.py").write_text("fixed = True\n")
    digest = hashlib.sha256(b"fixed = True\n").hexdigest()
    facts = {"format": 1, "files": [{"path": "vllm/cumem.py", "sha256": digest, "body_sha256": "x"}]}
    (bundle / "manifest.json").write_text(json.dumps(facts))
    text = OLD.replace("name: a,", f"name: a, overlay_manifest: {bundle}/manifest.json,")
    engine = FleetFile(file).parsed(text).engines[0]
    assert list(bundle_problems(engine)) == []
    (bundle / "files/vllm/cumem.py").write_text("fixed = False\n")
    assert "is not what its manifest says" in next(bundle_problems(engine))
    (bundle / "files/vllm/cumem.py").unlink()
    assert "No such file" in next(bundle_problems(engine))


def test_an_environment_that_engines_share_is_not_changed_under_them(file: Path) -> None:
    fleet = FleetFile(file).parsed(OLD)
    assert list(environment_problems(fleet, Settings(environment="/opt/a"), ["a"])) == []
    assert "engines c run from it too" in next(environment_problems(fleet, Settings(environment="/opt/b"), ["b"]))
    assert "share it" in next(environment_problems(fleet, Settings(environment="/opt/b"), ["b", "c"]))
