"""``rotator replay`` over an exported journal."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rotator.adapters.ledger_reader import Decided
from rotator.cli.main import run
from rotator.core.planner import plan
from rotator.core.values import Policy
from rotator.service.decisions import pack, unpack
from rotator.service.journal import plan_json
from tests.unit.core.fleets import awake, engine, snapshot, waiting


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """One decision whose minimum stay was none, and one without what it was decided from."""
    seen = snapshot(
        engine("a", demand=waiting(3, 9.0)),
        awake("b", demand=waiting(), awake_since_s=999.0),
        policy=Policy(min_stay_s=0.0),
    )
    (swap,) = plan(seen).swaps
    decided = [
        Decided("s1", 1000.0, plan_json(swap), pack(seen), {"a": "ok", "b": "ok"}),
        Decided("s2", 1001.0, plan_json(swap), None, {}),
    ]
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in decided))
    return path


def replayed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run(["replay", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_was_recorded_is_decided_the_same_by_its_own_numbers(journal: Path, capsys: pytest.CaptureFixture[str]):
    found = replayed(capsys, "--journal", str(journal))
    assert {k: found[k] for k in ("decisions", "same", "different", "unknown")} == {
        "decisions": 2, "same": 1, "different": 0, "unknown": 1,
    }  # fmt: skip


def test_another_policy_shows_what_would_differ_and_why(
    journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    policy = tmp_path / "policy.yaml"
    policy.write_text("policies: {min_stay_s: 600, longest_wait_s: null}")
    found = replayed(capsys, "--journal", str(journal), "--policy", str(policy))
    assert (found["different"], found["kinds"]) == (1, {"waits": 1})
    assert run(["replay", "--journal", str(journal), "--policy", str(policy)]) == 0
    shown = capsys.readouterr().out
    assert "then: sleep b at level 1, wake a: 3 requests wait for a" in shown
    assert "now:  nothing: a: waits until b has had its turn" in shown
    assert "2 decisions: 0 the same, 1 different (waits 1), 1 not recorded whole" in shown


def test_an_export_can_be_replayed_elsewhere(journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "copy.jsonl"
    first = replayed(capsys, "--journal", str(journal), "--export", str(copy))
    assert replayed(capsys, "--journal", str(copy)) == first


@pytest.mark.parametrize(
    ("text", "said"),
    [("not json\n", "line 1 is no decision"), ('{"swap_id": 1}\n', "line 1 is no decision")],
)
def test_a_file_that_is_no_journal_is_refused(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "x"
    path.write_text(text)
    assert run(["replay", "--journal", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_a_wrong_policy_file_is_told_line_by_line(journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    policy = tmp_path / "policy.yaml"
    policy.write_text("policies: {min_stay: 600}")
    assert run(["replay", "--journal", str(journal), "--policy", str(policy)]) == 2
    assert "policies: min_stay: unknown key: did you mean 'min_stay_s'?" in capsys.readouterr().err


def test_a_ledger_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["replay", "--ledger", f"sqlite:///{tmp_path}/none.db"]) == 1
    assert "there is no ledger" in capsys.readouterr().err
    assert run(["replay", "-c", str(tmp_path / "none.yaml")]) == 1
    assert "give the journal itself with --journal" in capsys.readouterr().err


def test_a_packed_snapshot_is_small():
    fleet = snapshot(*(awake(f"engine-{n}", "0123", demand=waiting(n)) for n in range(20)))
    packed = pack(fleet)
    assert unpack(packed) == fleet
    assert len(packed) < 2000
