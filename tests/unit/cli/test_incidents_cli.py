"""``rotator incidents``: list, show, save the evidence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rotator.cli.main import run
from tests.unit.cli.transport import ApiTransport

Service = Callable[..., ApiTransport]


def test_the_list_says_what_is_open_and_what_to_do(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["incidents"], service()) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "glm" in line]
    assert [("open" in row, "look at it" in row) for row in rows] == [(True, True), (False, False)]
    assert run(["incidents", "--open", "--json"], service()) == 0
    assert [i["id"] for i in json.loads(capsys.readouterr().out)] == ["two-glm"]


def test_no_incidents_is_said_in_words(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["incidents", "--engine", "other"], service()) == 0
    assert capsys.readouterr().out == "no incidents\n"


def test_one_is_shown_with_its_files_and_what_is_missing(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["incidents", "show", "one-glm"], service()) == 0
    out = capsys.readouterr().out
    assert "back in service" in out
    assert "log.txt" in out
    assert "missing: nccl: no rank listens" in out


def test_a_bundle_is_saved_once_and_never_over_a_file(
    service: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    to = tmp_path / "e.tar.gz"
    assert run(["incidents", "bundle", "one-glm", "-o", str(to)], service()) == 0
    assert to.read_bytes() == b"packed evidence"
    assert "15 bytes" in capsys.readouterr().out
    assert run(["incidents", "bundle", "one-glm", "-o", str(to)], service()) != 0
    assert "exists: give another name" in capsys.readouterr().err


def test_a_bundle_that_is_gone_leaves_no_file(
    service: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    to = tmp_path / "e.tar.gz"
    assert run(["incidents", "bundle", "two-glm", "-o", str(to)], service()) != 0
    assert "too old to be kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
