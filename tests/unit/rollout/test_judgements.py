"""Needles, speeds, residues, and the fleet file between two versions."""

from pathlib import Path

import pytest
import yaml

from rotator.config import FleetConfig, parse
from rotator.rollout.change import changed, compose, with_site
from rotator.rollout.judge import GIB, Speed, Version, forgets, grows, slower
from rotator.rollout.needles import batch, judge
from rotator.rollout.records import Records, write_whole
from rotator.rollout.steps import Entry, Part, Result, Step, Way
from tests.unit.rollout.world import rollout_of

OLD = """\
# our box
engines:
  - name: a        # the big one
    gpus: [0]
    command: [vllm, serve, one]

  # the small one
  - name: b
    gpus: [1]
    command: [vllm, serve, two]
policies: {min_stay_s: 5}  # asked for
"""
NEW = OLD.replace("[vllm, serve, one]", "[vllm-2, serve, one]").replace("[vllm, serve, two]", "[vllm-2, serve, two]")


def fleet(text: str) -> FleetConfig:
    return parse(text, base=Path("/etc/rotator"))


def test_the_same_batch_comes_every_time_and_all_of_its_prompts_differ() -> None:
    needles = batch(16, 400)
    assert needles == batch(16, 400)
    assert len({n.prompt for n in needles}) == len({n.code for n in needles}) == 16
    assert all(300 < len(n.prompt.split()) < 600 for n in needles)
    assert all(n.prompt.count(n.code) == 1 for n in needles)


def test_needles_lie_at_depths_over_the_whole_length() -> None:
    depths = [n.prompt.index(n.code) / len(n.prompt) for n in batch(8, 800)]
    assert depths == sorted(depths)
    assert depths[0] < 0.15
    assert depths[-1] > 0.8


def test_a_code_is_found_however_its_digits_are_grouped_and_a_wrong_one_is_missed() -> None:
    needles = batch(3, 50)
    first, second = needles[0].code, needles[1].code
    answers = [f"It is {first[:3]}-{first[3:]}.", f"{second[0]},{second[1:4]},{second[4:]}", "I do not know"]
    found = judge(needles, answers)
    assert (found.asked, found.missed) == (3, (2,))
    assert found.example == "needle 2: 'I do not know'"


def test_every_needle_must_come_back_unless_the_version_before_missed_as_many() -> None:
    old = [{"asked": 8, "missed": [1, 2], "example": "x"}]
    as_many = [{"asked": 8, "missed": [3, 4], "example": "y"}]
    more = [{"asked": 8, "missed": [3, 4, 5], "example": "z"}]
    assert forgets(old, as_many, as_before=True) == ""
    assert forgets(old, more, as_before=True).startswith("3 of 8 concurrent needles")
    assert "missed 2" in forgets(old, as_many, as_before=False)


def test_a_version_may_be_slower_by_the_tolerance_and_no_more() -> None:
    old = Speed.of([(100.0, 0.5), (90.0, 0.6), (110.0, 0.4)])
    assert (old.tokens_per_s, old.ttft_s) == (100.0, 0.5)
    assert slower(old, Speed(86.0, 0.6, 3), 0.15) == ""
    assert slower(old, Speed(84.0, 0.5, 3), 0.15).startswith("84.0 tokens/s")
    assert slower(old, Speed(100.0, 0.7, 3), 0.15).startswith("0.700 s to the first token")


def test_what_stays_asleep_may_not_grow_over_the_cycles() -> None:
    steady = [[GIB, 2 * GIB], [GIB + (100 << 20), 2 * GIB], [GIB, 2 * GIB]]
    assert grows(steady, 0.25) == ""
    assert "in cycle 2" in grows([[GIB], [2 * GIB]], 0.25)


def test_a_version_is_known_by_all_that_it_is_made_of() -> None:
    one = Version("m", "0.26.0", "b1", "i@1", "latency", "h")
    assert one.key == Version("m", "0.26.0", "b1", "i@1", "latency", "h").key
    assert one.key != Version("m", "0.26.0", "b2", "i@1", "latency", "h").key
    assert one.words == "vLLM 0.26.0, bundle b1, image i@1, profile latency"


@pytest.mark.parametrize("names", [(), ("a",), ("b",), ("a", "b")])
def test_the_file_between_has_some_sections_new_and_every_comment_of_the_old(names: tuple[str, ...]) -> None:
    text = compose(OLD, NEW, names)
    commands = {e["name"]: e["command"][0] for e in yaml.safe_load(text)["engines"]}
    assert commands == {n: "vllm-2" if n in names else "vllm" for n in ("a", "b")}
    assert all(comment in text for comment in ("# our box", "# the small one", "# asked for"))


def test_a_file_that_is_written_otherwise_is_met_in_meaning() -> None:
    target = yaml.safe_dump(yaml.safe_load(NEW))
    text = compose(OLD, target, ("a",))
    assert yaml.safe_load(text)["engines"][0]["command"][0] == "vllm-2"
    assert "# our box" in text
    shared = "x-anchors: &c [vllm, serve]\nengines: [{name: a, command: *c}, {name: b, command: *c}]\n"
    other = shared.replace("[vllm, serve]", "[vllm-2, serve]")
    mixed = yaml.safe_load(compose(shared, other, ("b",)))["engines"]
    assert [e["command"][0] for e in mixed] == ["vllm", "vllm-2"]


def test_only_what_engines_are_started_with_is_a_version() -> None:
    old = fleet(OLD)
    fields, problems = changed(old, fleet(NEW))
    assert (fields, problems) == ({"a": ("command",), "b": ("command",)}, ())
    _, problems = changed(old, fleet(NEW.replace("gpus: [1]", "gpus: [2]").replace("min_stay_s: 5", "min_stay_s: 6")))
    assert "engine 'b'.gpus: changed" in problems
    assert any(line.startswith("policies.min_stay_s") for line in problems)
    _, problems = changed(old, fleet(OLD.replace("gpus: [0]\n", "gpus: [0]\n    model_path: /m\n")))
    assert problems[0].startswith("engine 'a': only model_path differs")


def test_another_site_file_is_put_under_the_jobs_that_have_one() -> None:
    text = "engines: [{name: a, job: {site: site.yaml}}, {name: b, command: [x]}]\n"
    engines = yaml.safe_load(with_site(text, {"a": "/new.yaml"}))["engines"]
    assert engines == [{"name": "a", "job": {"site": "/new.yaml"}}, {"name": "b", "command": ["x"]}]


def test_a_journal_says_the_same_after_it_was_read_again(tmp_path: Path) -> None:
    records = Records(tmp_path)
    mine = rollout_of((Part("a", True),))
    mine.log.append(Entry("a", Way.BACK, Step.LET_GO, Result.FAILED, 1.5, "why", {"x": [1]}))
    records.keep(mine)
    assert records.load() == mine
    assert records.path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_written_anew_keeps_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("old")
    path.chmod(0o640)
    write_whole(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)
    assert [p.name for p in tmp_path.iterdir()] == ["fleet.yaml"]
