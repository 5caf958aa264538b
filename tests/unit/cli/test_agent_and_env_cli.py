"""``rotator agent`` and ``rotator env`` as commands: how they end, and in which words."""

import json
from pathlib import Path

import pytest

from rotator.cli.main import run


def test_an_agent_beyond_loopback_refuses_to_run_without_certificates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "agent.yaml").write_text("node: a\nhost: 0.0.0.0\ntoken_file: token\n")
    assert run(["agent", "-c", str(tmp_path / "agent.yaml")]) == 1
    assert "is not loopback: give ca, cert and key" in capsys.readouterr().err


def test_a_token_that_others_may_read_or_that_is_short_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "agent.yaml").write_text("node: a\nport: 0\ntoken_file: token\n")
    (tmp_path / "token").write_text("x" * 40)
    (tmp_path / "token").chmod(0o644)
    assert run(["agent", "-c", str(tmp_path / "agent.yaml")]) == 1
    assert "everybody may read it: chmod 640" in capsys.readouterr().err
    (tmp_path / "token").write_text("short")
    assert run(["agent", "-c", str(tmp_path / "agent.yaml")]) == 1
    assert "at least 32 characters" in capsys.readouterr().err


def test_certificates_are_made_by_command_and_a_node_without_an_address_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["agent", "certs", "--out", str(tmp_path / "tls"), "--node", "gpu2=10.0.0.2,gpu2.lan"]) == 0
    assert {p.name for p in (tmp_path / "tls").iterdir()} >= {"ca.pem", "service.key", "gpu2.pem", "token"}
    assert run(["agent", "certs", "--out", str(tmp_path / "tls"), "--node", "gpu3"]) == 2
    assert "give NAME=HOST" in capsys.readouterr().err


def test_archives_are_told_as_json_and_a_damaged_one_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["env", "list", "--archives", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    (tmp_path / "broken").mkdir()
    assert run(["env", "list", "--archives", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["name"] == "broken"
    assert run(["env", "restore", "nothing", "--archives", str(tmp_path)]) == 1
    assert "see `rotator env list`" in capsys.readouterr().err
