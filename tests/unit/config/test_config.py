"""The fleet file: what it takes, and what it says to what it does not take."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rotator import config
from rotator.config import ConfigError

BASE = Path("/etc/rotator")
ENGINE = {"name": "a", "gpus": [0], "command": ["serve"]}


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, base=BASE)
    for line in caught.value.problems:
        assert "\n" not in line
        assert ": " in line, "the place comes first"
    return caught.value.problems


def only(text: str) -> str:
    [line] = problems(text)
    return line


def with_engine(**more: Any) -> str:
    return yaml.safe_dump({"engines": [{**ENGINE, **more}]})


def with_top(**more: Any) -> str:
    return yaml.safe_dump({"engines": [ENGINE], **more})


def test_the_smallest_file_is_one_engine_and_binds_to_loopback():
    fleet = config.parse(with_engine(), base=BASE)
    assert [e.name for e in fleet.engines] == ["a"]
    assert fleet.bind.is_loopback
    assert fleet.engines[0].model == "a"


def test_relative_paths_are_relative_to_the_file():
    fleet = config.parse(
        yaml.safe_dump({"engines": [{**ENGINE, "model_path": "m", "workdir": "w"}], "state_dir": "s"}), base=BASE
    )
    assert (fleet.state_dir, fleet.engines[0].model_path) == (BASE / "s", BASE / "m")
    assert fleet.engines[0].workdir == "/etc/rotator/w"


def test_absolute_paths_stay():
    fleet = config.parse(with_top(state_dir="/var/lib/rotator"), base=BASE)
    assert fleet.state_dir == Path("/var/lib/rotator")


def test_bare_numbers_in_a_command_and_an_environment_are_text():
    fleet = config.parse(
        "engines:\n- {name: a, gpus: [0], command: [serve, --tp, 4, --share, 0.9], env: {DEV: 1}}", base=BASE
    )
    assert fleet.engines[0].command == ("serve", "--tp", "4", "--share", "0.9")
    assert fleet.engines[0].env == {"DEV": "1"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "file: not a mapping: it needs at least 'engines:'"),
        ("- a", "file: not a mapping: it needs at least 'engines:'"),
        ("a: [", "line 1, column 5: not valid YAML: expected the node content, but found '<stream end>'"),
        ("a: \x00", "file: not valid YAML: unacceptable character #x0000"),
        ("engines: []\nengines: []", "line 2: key 'engines' is given twice in one place: remove one"),
        ("{}", "engines: is missing: add it"),
        ("engines: {}", "engines: should be a list"),
        ("engines: []", "engines: is empty: give at least one entry"),
        (with_top(engins=[]), "engins: unknown key: did you mean 'engines'?"),
        (with_top(zzz=1), "zzz: unknown key: remove it"),
        (with_top(bind={"prot": 1}), "bind.prot: unknown key: did you mean 'port'?"),
        (with_top(bind=5), "bind: should be a mapping of keys to values"),
        (with_top(bind={"port": "http"}), "bind.port: input should be a valid integer"),
        (with_top(bind={"port": 70000}), "bind.port: input should be less than or equal to 65535, not 70000"),
        (with_engine(prot=1), "engine 'a'.prot: unknown key: did you mean 'port'?"),
        (with_engine(gpus=0), "engine 'a'.gpus: should be a list"),
        (with_engine(gpus=[]), "engine 'a'.gpus: is empty: give at least one entry"),
        (with_engine(gpus=[0, "0"]), "engine 'a': 'gpus' names a GPU twice: remove one"),
        (with_engine(gpus=[0, 1, 2], tp=2), "engine 'a': 3 GPUs cannot hold whole groups of tp 2"),
        (with_engine(sleep_levels=[3]), "engine 'a'.sleep_levels.0: input should be 1 or 2, not 3"),
        (with_engine(sleep_levels=[1, 1]), "engine 'a': 'sleep_levels' names a level twice: remove one"),
        (with_engine(env={"DEV": True}), "engine 'a'.env.DEV: YAML reads a bare true as no text: put it in quotes"),
        (with_engine(command=[]), "engine 'a': launcher 'process' needs 'command'"),
        (with_engine(launcher="attach"), "engine 'a': launcher 'attach' needs 'url'"),
        (with_engine(url="http://127.0.0.1:8000"), "engine 'a': 'url' is for launcher 'attach' only"),
        (with_engine(launcher="docker"), "engine 'a'.launcher: input should be 'process', 'attach' or 'nomad'"),
        (with_engine(fallback={}), "engine 'a'.fallback: give exactly one of 'model' and 'url'"),
        (with_engine(fallback={"model": "b"}), "file: engine 'a': fallback model 'b' is no engine here: name one"),
        (with_engine(fallback={"model": "a"}), "file: engine 'a': its fallback is itself: name another model"),
        (with_engine(name="a b"), "engine 'a b'.name: string should match pattern"),
        (with_engine(port=8400), "file: port 8400 is bind.port and an engine's: change one"),
        (with_top(bind={"host": "0.0.0.0"}), "file: bind.host is not loopback and there are no keys"),
        (with_top(keys=[{"name": "x", "sha256": "short"}]), "keys.0.sha256: string should match pattern"),
        (with_top(devices={"gpus": "some"}), "devices.gpus: input should be 'all'"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(text: str, says: str):
    assert only(text).startswith(says)


def test_a_name_that_two_engines_claim_is_told_with_both():
    text = yaml.safe_dump({"engines": [ENGINE, {**ENGINE, "name": "b", "aliases": ["a"]}]})
    assert only(text) == "engines: 'a' is both of engine 'a' and of 'b': rename one"


def test_a_port_that_two_engines_claim_is_told():
    text = yaml.safe_dump({"engines": [{**ENGINE, "port": 9}, {**ENGINE, "name": "b", "port": 9}]})
    assert only(text) == "file: port 9 is given to more than one engine: change one"


@pytest.mark.parametrize(("field", "second"), [("name", {"sha256": "1" * 64}), ("sha256", {"name": "y"})])
def test_two_keys_that_cannot_be_told_apart_are_refused(field: str, second: dict[str, str]):
    first = {"name": "x", "sha256": "0" * 64}
    assert f"{field} '{first[field]}' is given to more than one key" in only(
        with_top(keys=[first, {**first, **second}])
    )


def test_every_mistake_is_told_at_once():
    text = yaml.safe_dump({"engines": [{**ENGINE, "gpu": [0]}], "bind": {"prot": 1}, "gateway": {"queue_max": 0}})
    assert [line.split(":")[0] for line in problems(text)] == ["bind.prot", "engine 'a'.gpu", "gateway.queue_max"]


def test_an_engine_without_a_name_is_told_by_its_number():
    assert only("engines: [{gpus: [0], command: [x]}]") == "engines.0.name: is missing: add it"


def test_merged_yaml_anchors_may_be_overridden():
    text = "engines:\n- &e {name: a, gpus: [0], command: [x]}\n- {<<: *e, name: b}"
    assert [e.name for e in config.parse(text, base=BASE).engines] == ["a", "b"]


def test_a_file_nested_beyond_reason_is_refused_and_nothing_breaks():
    assert only("[" * 5000).startswith("file: not valid YAML")


def test_a_spec_hash_changes_with_what_starts_the_engine_and_with_nothing_else():
    one = config.parse(with_engine(), base=BASE).engines[0]
    assert one.spec_hash() == config.parse(with_engine(priority=5), base=BASE).engines[0].spec_hash()
    assert one.spec_hash() != config.parse(with_engine(env={"A": "1"}), base=BASE).engines[0].spec_hash()
