"""``rotator capacity`` on the shipped example."""

import json
from pathlib import Path

import pytest

from rotator.cli.main import run

EXAMPLE = str(Path(__file__).parents[3] / "examples" / "fleet.yaml")


def test_the_tables_say_who_fits_who_never_does_and_what_host_ram_is_needed(capsys: pytest.CaptureFixture[str]):
    assert run(["capacity", "-c", EXAMPLE, "--gpu-gib", "96"]) == 0
    shown = capsys.readouterr().out
    assert "embed + qwen3-8b" in shown
    assert "dsv4-flash and glm-5.1: 77.5 GiB are lacking on GPU 0" in shown
    assert "with KV caches of at most 14.5 GiB a GPU" in shown
    assert "host RAM: all masters need 583.0 GiB of 640.0 GiB, 57.0 GiB are left" in shown


def test_the_same_as_json(capsys: pytest.CaptureFixture[str]):
    assert run(["capacity", "-c", EXAMPLE, "--gpu-gib", "96", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert ["embed", "qwen3-8b"] in [t["engines"] for t in found["together"]]
    assert {s["engine"] for s in found["sizes"]} >= {"dsv4-flash", "glm-5.1"}
    assert found["measured"] == []


def test_smaller_gpus_hold_less(capsys: pytest.CaptureFixture[str]):
    assert run(["capacity", "-c", EXAMPLE, "--gpu-gib", "80"]) == 0
    assert "glm-5.1, not even alone" in capsys.readouterr().out


def test_a_wrong_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["capacity", "-c", str(tmp_path / "none.yaml")]) == 1
    assert "cannot be read" in capsys.readouterr().err
