from pathlib import Path
from typing import Any

import pytest
import yaml

from rotator import config
from rotator.ports import GpuInfo
from rotator.service.specs import launch_spec


def fleet(nomad: dict[str, Any] | None = None, **engine: Any) -> config.FleetConfig:
    made = {"name": "a", "gpus": [0], "launcher": "nomad", "port": 8001, "job": {"file": "a.hcl"}, **engine}
    return config.parse(yaml.safe_dump({"engines": [made], "nomad": nomad or {}}), base=Path("/etc/rotator"))


@pytest.mark.parametrize(
    ("engine", "problem"),
    [
        ({"job": None}, "needs 'job' and 'port'"),
        ({"port": None}, "needs 'job' and 'port'"),
        ({"job": {}}, "give exactly one of 'file' and 'site'"),
        ({"job": {"file": "a", "site": "b"}}, "give exactly one of 'file' and 'site'"),
        ({"job": {"site": "b", "variables": {"x": 1}}}, "'variables' are for 'file'"),
        ({"job": {"file": "a", "name": "b"}}, "'name' is for 'site'"),
        ({"launcher": "process", "command": ["x"]}, "'job' is for launcher 'nomad' only"),
    ],
)
def test_a_job_that_cannot_be_is_refused_with_what_to_do(engine: dict[str, Any], problem: str):
    with pytest.raises(config.ConfigError, match=problem):
        fleet(**engine)


@pytest.mark.parametrize(
    ("nomad", "problem"),
    [
        ({"cert_file": "a"}, "'cert_file' and 'key_file' belong together"),
        ({"insecure_skip_verify": True, "ca_file": "a"}, "makes 'ca_file' useless"),
        ({"address": "gpu1:4646"}, "nomad.address"),
    ],
)
def test_an_access_that_cannot_be_is_refused_with_what_to_do(nomad: dict[str, Any], problem: str):
    with pytest.raises(config.ConfigError, match=problem):
        fleet(nomad)


def test_files_are_relative_to_the_fleet_file():
    made = fleet({"token_file": "token", "ca_file": "/ca.pem"}, job={"site": "site.yaml"})
    assert made.nomad.token_file == Path("/etc/rotator/token")
    assert made.nomad.ca_file == Path("/ca.pem")
    assert made.engines[0].job is not None
    assert made.engines[0].job.site == Path("/etc/rotator/site.yaml")


def test_places_in_a_jobs_variables_are_filled_in():
    variables = {"uuids": "{gpu_uuids}", "port": "{port}", "deep": [{"x": "{name} on {gpus}"}], "count": 3}
    engine = fleet(job={"file": "a.hcl", "variables": variables}).engines[0]
    gpus = (GpuInfo("GPU-7", 7, "H200", 1), GpuInfo("GPU-9", 9, "H200", 1))
    spec = launch_spec(engine, "http://127.0.0.1:8001", gpus, Path("/s"))
    assert spec.job is not None
    assert spec.job.variables == {"uuids": ["GPU-7", "GPU-9"], "port": "8001", "deep": [{"x": "a on 7,9"}], "count": 3}
    assert spec.job.file == "/etc/rotator/a.hcl"


def test_another_job_needs_the_engines_restart():
    assert fleet().engines[0].spec_hash() != fleet(job={"file": "b.hcl"}).engines[0].spec_hash()
