"""What the doctor asks of Nomad, against its double."""

from pathlib import Path

import pytest

from rotator.config import FleetConfig
from rotator.doctor import probe_service
from rotator.doctor.probe_service import nomad_node, read_nomad
from tests.nomad_double import NomadDouble
from tests.nomad_double.sample import HCL, sample_job


def fleet(address: str) -> FleetConfig:
    engine = {"name": "a", "gpus": [0], "launcher": "nomad", "port": 8001, "job": {"site": "/site.yaml"}}
    return FleetConfig.model_validate({"nomad": {"address": address, "deadline_s": 5}, "engines": [engine]})


async def test_a_fleet_without_nomad_s_engines_does_not_ask():
    plain = FleetConfig.model_validate({"engines": [{"name": "a", "gpus": [0], "command": ["x"]}]})
    assert await read_nomad(plain) is None


async def test_clients_and_jobs_that_drifted_from_their_recipe_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async with NomadDouble(tmp_path) as nomad:
        config = fleet(nomad.address)
        monkeypatch.setattr(probe_service, "render_text", lambda name, site: (HCL, 'job_id = "vllm-a"\n'))
        nomad.teach(HCL, 'job_id = "vllm-a"\n', sample_job(note="new"))
        told = await read_nomad(config)
        assert told is not None
        assert told.drifts == (("a", (), ""),)  # nothing is registered yet
        await nomad.cluster.register(sample_job(note="old"))
        told = await read_nomad(config)
    assert told is not None
    assert [node.name for node in told.nodes] == ["gpu1"]
    [(engine, lines, trouble)] = told.drifts
    assert (engine, trouble) == ("a", "")
    assert any("old -> new" in line for line in lines)


async def test_a_nomad_that_is_away_is_told_in_words():
    told = await read_nomad(fleet("http://127.0.0.1:9"))
    assert told is not None
    assert told.error


def test_a_node_as_nomad_tells_of_it():
    node = nomad_node(
        {
            "ID": "0123",
            "Name": "gpu1",
            "Status": "ready",
            "SchedulingEligibility": "eligible",
            "Drivers": {"docker": {"Healthy": True, "Detected": True}},
            "Attributes": {"driver.docker.volumes.enabled": "true", "driver.docker.runtimes": "nvidia,runc"},
            "HostNetworks": {"loopback": {}},
        }
    )
    assert (node.docker, node.volumes, node.runtimes, node.host_networks) == (
        True,
        True,
        ("nvidia", "runc"),
        ("loopback",),
    )
    assert nomad_node({"Attributes": None, "Drivers": None}).docker is False
