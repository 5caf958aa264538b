"""What ``rotator check`` says of engines whose jobs come from a site file."""

from pathlib import Path

from rotator.check.jobs import check_jobs
from rotator.config import parse
from tests.unit.check.fakes import FakeMachine

SITE = Path(__file__).parents[3] / "tests" / "unit" / "jobs" / "fixed" / "site.yaml"


def lines(site: Path = SITE, *, name: str = "one", engine: str = "", top: str = "", **keys: object) -> list[str]:
    said = {"gpus": "[0, 1]", "port": 8501, **keys}
    text = f"{top}\nengines:\n  - name: {name}\n    launcher: nomad\n    job: {{site: {site}{engine}}}\n"
    text += "".join(f"    {key}: {value}\n" for key, value in said.items())
    return [f.line for f in check_jobs(parse(text, base=Path("/")), FakeMachine())]


def test_a_fleet_file_and_a_site_file_that_agree_need_no_word():
    assert lines() == []
    assert lines(gpus="[GPU-a, GPU-b]", top="nomad: {namespace: models}") == []


def test_where_they_disagree_is_told_with_both():
    assert lines(port=9000) == [f"engine 'one'.port: is 9000, and 8501 in {SITE}: make them equal"]
    assert lines(gpus="[0]") == [f"engine 'one'.gpus: names 1 GPUs, and {SITE} 2: name the same GPUs in both"]
    assert lines(gpus="[GPU-a, GPU-x]") == [
        f"engine 'one'.gpus: GPU GPU-x is not among its GPUs in {SITE}: name the same GPUs in both"
    ]
    assert lines(top="nomad: {namespace: other}") == [
        f"nomad.namespace: is 'other', and 'models' in {SITE}: make them equal"
    ]


def test_an_engine_that_the_site_does_not_know_is_told():
    (line,) = lines(name="nobody")
    assert line.startswith("engine 'nobody'.job: job 'nobody': is not in the site file: name one of")
    assert lines(engine=", name: rotator") == [
        "engine 'one'.job.name: 'rotator' of the site file is no engine: name one of its engines"
    ]


def test_the_lint_judges_the_fleet_files_sleep_levels_and_the_job(tmp_path: Path):
    site = tmp_path / "site.yaml"
    text = SITE.read_text().replace("max_kill_timeout_s: 300", "max_kill_timeout_s: 30", 1)
    site.write_text(text)
    (tmp_path / "recipe.yaml").write_text((SITE.parent / "recipe.yaml").read_text().replace("none,", "fp8,", 1))
    found = lines(site, sleep_levels="[1, 2]")
    assert [line.split("[")[-1].split(";")[0] for line in found] == ["level-2", "kill-timeout"]


def test_a_site_file_that_is_wrong_is_told_in_its_own_words(tmp_path: Path):
    site = tmp_path / "site.yaml"
    site.write_text("nodes: {}\n")
    assert any("engines: is missing" in line for line in lines(site))
