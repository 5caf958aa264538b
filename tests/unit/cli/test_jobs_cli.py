"""``rotator jobs`` without a Nomad: listing, rendering, judging, schemas; and how it ends."""

import json
from pathlib import Path

import pytest

from rotator.cli.main import run

ROOT = Path(__file__).parents[3]
SITE = str(ROOT / "examples" / "site.yaml")
ENGINE = str(ROOT / "jobs" / "engine.nomad.hcl")


def test_the_catalogue_is_listed_and_as_json_with_every_source(capsys: pytest.CaptureFixture[str]):
    assert run(["jobs", "list"]) == 0
    assert "deepseek-v4-flash-fp8" in capsys.readouterr().out
    assert run(["jobs", "list", "--json"]) == 0
    recipes = {r["name"]: r for r in json.loads(capsys.readouterr().out)}
    assert recipes["glm-5.1-reap-478b-nvfp4"]["tensor_parallel"]["source"] == "tp4-report and card"


def test_a_sites_jobs_are_listed_in_the_order_to_run_them(capsys: pytest.CaptureFixture[str]):
    assert run(["jobs", "list", "--site", SITE, "--json"]) == 0
    names = [r["name"] for r in json.loads(capsys.readouterr().out)]
    assert (names[0], names[-1]) == ("gpu-lease@box", "rotator")


def test_a_render_is_written_as_files_that_nomads_own_command_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["jobs", "render", "glm-5.1", "-s", SITE, "-o", str(tmp_path / "new")]) == 0
    spec, variables = tmp_path / "new" / "vllm-glm-5.1.nomad.hcl", tmp_path / "new" / "vllm-glm-5.1.vars.hcl"
    assert capsys.readouterr().out == f"nomad job run -var-file {variables} {spec}\n"
    assert spec.read_text() == (ROOT / "jobs" / "engine.nomad.hcl").read_text()
    assert 'engine = "glm-5.1"\n' in variables.read_text()


def test_a_render_is_printed_without_a_folder(capsys: pytest.CaptureFixture[str]):
    assert run(["jobs", "render", "rotator", "-s", SITE]) == 0
    assert capsys.readouterr().out.startswith("# rotator: for rotator.nomad.hcl\nconfig_dir = ")
    assert run(["jobs", "render", "rotator", "-s", SITE, "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert made["template"] == "rotator"


def test_a_clean_site_ends_well_and_a_broken_one_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["jobs", "lint", "-s", SITE]) == 0
    assert capsys.readouterr().out == f"{SITE}: 0 errors, 0 warnings\n"
    broken = tmp_path / "site.yaml"
    broken.write_text(Path(SITE).read_text().replace("vllm: 0.26.0", "vllm: 0.20.2", 1))
    assert run(["jobs", "lint", "glm-5.1", "-s", str(broken), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [f["rule"] for f in found["findings"]] == ["known-broken/nccl-sm120-0.20"]
    assert found["findings"][0]["source"].startswith("field report of 2026-05-10")


def test_a_job_file_of_ones_own_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mine.json"
    file.write_text('{"Job": {"TaskGroups": [{"Tasks": [{"Name": "vllm", "Config": {"image": "vllm:latest"}}]}]}}')
    assert run(["jobs", "lint", "--file", str(file)]) == 1
    assert "error: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["render", "nobody", "-s", SITE], 1, "rotator: job 'nobody': is not in the site file: name one of"),
        (["render", "-s", "none.yaml"], 1, "rotator: none.yaml: cannot be read (No such file or directory)"),
        (["render", "rotator", "-s", SITE, "-o", "/dev/null/x"], 1, "cannot be written"),
        (["lint", "-f", "none.hcl"], 1, "rotator: none.hcl: cannot be read"),
        (["lint", "-f", ENGINE, "--arch", "sm1"], 2, "--arch: 'sm1' is none of sm80"),
        (["lint", "-f", ENGINE, "--vllm", "newest"], 2, "--vllm: 'newest' is no version"),
        (["lint", "-f", ENGINE, "glm-5.1"], 2, "'glm-5.1': jobs are named of a site file"),
        (["lint", "-s", SITE, "--arch", "sm120"], 2, "--arch is about a job file of your own: name it with --file"),
        (["lint", "-s", SITE, "--var-file", "x"], 2, "--var-file is about a job file of your own"),
        (["schema", "fleet"], 2, "rotator: 'fleet' is neither recipe nor site"),
        (["plan", "-s", SITE, "-c", "none.yaml"], 1, "rotator: none.yaml: cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
):
    assert run(["jobs", *arguments]) == code
    assert said in capsys.readouterr().err


def test_nothing_is_registered_where_the_lint_finds_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NOMAD_ADDR", "http://127.0.0.1:1")
    broken = tmp_path / "site.yaml"
    broken.write_text(Path(SITE).read_text().replace("max_kill_timeout_s: 300", "max_kill_timeout_s: 30", 1))
    assert run(["jobs", "run", "glm-5.1", "-s", str(broken)]) == 1
    said = capsys.readouterr().err
    assert "kill_timeout of 120 s" in said
    assert "nothing was registered" in said


def test_an_unreachable_nomad_has_its_own_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NOMAD_ADDR", "http://127.0.0.1:1")
    assert run(["jobs", "plan", "glm-5.1", "-s", SITE]) == 3
    said = capsys.readouterr().err
    assert "cannot be reached: nobody listens there" in said
    assert "start Nomad there, or say where it is: NOMAD_ADDR" in said
    monkeypatch.setenv("NOMAD_ADDR", "http://no-such-host.invalid:4646")
    assert run(["jobs", "plan", "glm-5.1", "-s", SITE]) == 3
    assert "there is no host of that name" in capsys.readouterr().err


def test_names_are_shown_whole_however_much_stands_beside_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["jobs", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("deepseek-v4-flash-nvfp4 ")]


def test_a_wrong_recipe_or_profile_is_told_with_its_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken = tmp_path / "site.yaml"
    broken.write_text(Path(SITE).read_text().replace("recipe: glm-5.1-reap-478b-nvfp4", "recipe: glm-6"))
    assert run(["jobs", "lint", "-s", str(broken)]) == 1
    assert "rotator: engine 'glm-5.1': recipe 'glm-6': is not in the catalogue" in capsys.readouterr().err


def test_the_reference_of_keys_in_the_docs_is_current(capsys: pytest.CaptureFixture[str]):
    assert run(["jobs", "schema", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "jobs-keys.md").read_text(encoding="utf-8")
