"""What an engine on Nomad is planned with where nobody measured it and no footprint is given: what its job says."""

import json
from pathlib import Path

import pytest

from rotator.check.planned import planned_engine
from rotator.config import parse
from rotator.ports import GpuInfo

TOTAL = 100 << 30
GPUS = {f"GPU-{i}": GpuInfo(f"GPU-{i}", i, "RTX PRO 6000", TOTAL) for i in range(2)}
FIXED = Path(__file__).parents[1] / "jobs" / "fixed"


def share(job: str, **more: object) -> float:
    """Of each GPU."""
    text = f"engines:\n  - name: one\n    launcher: nomad\n    port: 8501\n    gpus: [0, 1]\n    job: {job}\n"
    text += "".join(f"    {key}: {value}\n" for key, value in more.items())
    (config,) = parse(text, base=Path("/")).engines
    engine = planned_engine(config, GPUS)
    assert engine is not None
    assert len(set(engine.awake_bytes)) == 1
    return round(engine.awake_bytes[0] / TOTAL, 2)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "site.yaml").write_text((FIXED / "site.yaml").read_text())
    recipe = (FIXED / "recipe.yaml").read_text()
    own = "args:\n  --gpu-memory-utilization: {value: 0.31, source: here}\n"
    (tmp_path / "recipe.yaml").write_text(recipe.replace("args:\n", own, 1))
    return tmp_path / "site.yaml"


def test_a_job_of_a_site_file_says_its_share(site: Path):
    assert share(f"{{site: {site}}}") == 0.31


def test_a_footprint_goes_before_it(site: Path):
    assert share(f"{{site: {site}}}", footprint="{awake_gib: 20}") == 0.20


@pytest.mark.parametrize("value", ["0.42", "${var.share}"])
def test_a_job_file_says_its_share_also_by_a_variable(tmp_path: Path, value: str):
    file = tmp_path / "one.nomad.hcl"
    file.write_text(
        'job "one" {\n  group "g" {\n    task "vllm" {\n      driver = "docker"\n      config {\n'
        f'        args = ["serve", "/m", "--gpu-memory-utilization", "{value}"]\n      }}\n    }}\n  }}\n}}\n'
        'variable "share" {\n  type = string\n}\n'
    )
    assert share(f'{{file: {file}, variables: {{share: "0.42"}}}}') == 0.42


def test_a_job_in_json_says_its_share(tmp_path: Path):
    file = tmp_path / "one.json"
    task = {"Name": "vllm", "Driver": "docker", "Config": {"args": ["serve", "/m", "--gpu-memory-utilization=0.5"]}}
    file.write_text(json.dumps({"Job": {"ID": "one", "TaskGroups": [{"Name": "g", "Tasks": [task]}]}}))
    assert share(f"{{file: {file}}}") == 0.50


@pytest.mark.parametrize("job", ["{site: /nowhere/site.yaml}", "{file: /nowhere/one.hcl}"])
def test_where_the_job_cannot_be_read_it_is_vllms_own_share(job: str):
    assert share(job) == 0.92
