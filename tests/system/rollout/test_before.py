"""What is refused before anything is begun, and environments that are exchanged in place."""

import hashlib
import json
import sys
import venv
from pathlib import Path

import pytest

from rotator.cli.main import run
from rotator.cli.rollout_check import bundle_problems, environment_problems
from rotator.cli.rollout_world import FleetFile, LocalEnvironments
from rotator.rollout.ports import StepFailed
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
    assert said(file, capsys, "--resume") == (1, "rotator: there is no rollout here: begin one with --to\n")
    assert said(file, capsys, "--status") == (0, "there was no rollout here yet\n")


def test_a_service_that_is_not_there_has_its_own_exit_code(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = file.with_name("new.yaml")
    target.write_text(OLD.replace("/opt/a/", "/opt/a2/"))
    code, words = said(file, capsys, "--to", str(target))
    assert (code, "cannot reach the service" in words) == (3, True)


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


def test_an_environment_that_an_install_spoiled_is_put_back(tmp_path: Path) -> None:
    prefix = tmp_path / "opt/vllm"
    venv.create(prefix, symlinks=True, with_pip=False)
    release = next(prefix.glob("lib/python3*/site-packages")) / "release.txt"
    release.write_text("old")
    spoil = (sys.executable, "-c", f"open({str(release)!r}, 'w').write('half'); raise SystemExit('no space left')")
    given = Settings(environment=str(prefix), archives=str(tmp_path / "kept"), install=spoil)
    mine = LocalEnvironments(given, "1")
    name = mine.archive("a")["name"]
    assert mine.archive("a")["name"] == name, "a second time after a death"
    with pytest.raises(StepFailed, match="ended with code 1: no space left"):
        mine.install("a")
    assert release.read_text() == "half"
    mine.restore("a", name)
    assert release.read_text() == "old"
