"""``rotator check`` on engines that Nomad runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rotator import config
from rotator.check.nomad import check_nomad
from tests.unit.check.fakes import FakeMachine


def lines(machine: FakeMachine | None = None, nomad: dict[str, Any] | None = None, **engine: Any) -> list[str]:
    made = {
        "name": "a", "gpus": [0], "launcher": "nomad", "port": 8001, "job": {"file": "a.hcl"}, **engine,
    }  # fmt: skip
    fleet = config.parse(yaml.safe_dump({"engines": [made], "nomad": nomad or {}}), base=Path("/etc/rotator"))
    return [finding.line for finding in check_nomad(fleet, machine or FakeMachine())]


def test_a_good_engine_on_nomad_brings_no_findings():
    assert lines() == []


def test_files_that_are_not_there_are_told():
    machine = FakeMachine()
    machine.missing = {Path("/etc/rotator/a.hcl"), Path("/etc/rotator/ca.pem")}
    assert lines(machine, {"ca_file": "ca.pem"}) == [
        "nomad.ca_file: /etc/rotator/ca.pem does not exist: correct the path",
        "engine 'a'.job.file: /etc/rotator/a.hcl does not exist: correct the path",
    ]


@pytest.mark.parametrize(
    ("nomad", "place"),
    [
        ({"insecure_skip_verify": True}, "nomad.insecure_skip_verify"),
        ({"address": "http://gpu1:4646", "token_file": "token"}, "nomad.address"),
    ],
)
def test_what_makes_nomad_unsafe_is_told(nomad: dict[str, Any], place: str):
    [line] = lines(nomad=nomad)
    assert line.startswith(place)


@pytest.mark.parametrize("address", ["http://127.0.0.1:4646", "http://localhost:4646", "http://[::1]:4646"])
def test_a_token_may_go_to_this_machines_own_agent_in_the_clear(address: str):
    assert lines(nomad={"address": address, "token_file": "token"}) == []


def test_what_does_nothing_under_nomad_is_told():
    [line] = lines(command=["vllm"], env={"A": "1"})
    assert line.startswith("engine 'a': 'command', 'env' do nothing under launcher 'nomad'")
