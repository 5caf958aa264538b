"""``rotator soak``, as an operator or a maintainer uses it."""

import json

import pytest

from rotator.cli.main import run
from rotator.sim.faults import judge


def test_a_soak_says_what_failed_around_the_service_and_what_was_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["soak", "--seeds", "1", "--from", "3", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 seeds in ")
    assert "no GPU is overcommitted" in out
    assert "the ledger equals the devices" in out
    assert out.rstrip().endswith("0 seeds failed")


def test_a_soak_on_several_processes_counts_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for jobs in ("1", "2"):
        assert run(["soak", "--seeds", "2", "--jobs", jobs, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        told.append({name: said[name] for name in ("seeds", "virtual_seconds", "requests", "injected", "failures")})
    assert told[0] == told[1]
    assert told[0]["seeds"] == 2


def test_a_broken_invariant_is_told_with_the_command_to_replay_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "GRACE_S", -1e9)  # nobody may wait at all
    assert run(["soak", "--seeds", "1", "--jobs", "1", "--shrink"]) == 1
    out = capsys.readouterr().out
    assert "seed 1 failed: waits are bounded: " in out
    assert "rotator soak --replay 1 --shrink" in out
    assert "events down to 1:" in out
    assert "VIOLATION waits are bounded" in out


def test_a_replay_prints_script_and_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["soak", "--replay", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("seed 3: ")
    assert "Ask(at_s=" in out
    assert "seed 3 holds every invariant (trace " in out


def test_a_replay_of_a_failing_seed_ends_with_its_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "GRACE_S", -1e9)
    assert run(["soak", "--replay", "1"]) == 1
    assert "the same at every replay" in capsys.readouterr().out
