"""What a reload does to whom."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rotator import config
from rotator.config_diff import Changes, describe_changes

ENGINE = {"name": "a", "gpus": [0], "command": ["serve"]}


def fleet(*engines: dict[str, Any], **top: Any) -> config.FleetConfig:
    return config.parse(yaml.safe_dump({"engines": list(engines) or [ENGINE], **top}), base=Path("/etc/rotator"))


def test_the_same_file_asks_for_nothing():
    changes = describe_changes(fleet(), fleet())
    assert changes == Changes()
    assert not changes.any


def test_engines_come_and_go_by_name():
    b = {**ENGINE, "name": "b"}
    changes = describe_changes(fleet(ENGINE), fleet(b))
    assert (changes.added, changes.removed, changes.restart_needed) == (("b",), ("a",), ())


@pytest.mark.parametrize(
    "change",
    [
        {"command": ["serve", "--new"]},
        {"env": {"A": "1"}},
        {"gpus": [1]},
        {"port": 9000},
        {"workdir": "/tmp"},
        {"launcher": "nomad", "port": 9000, "job": {"file": "a.hcl"}},
    ],
)
def test_what_an_engine_was_started_with_needs_its_restart(change: dict[str, Any]):
    changes = describe_changes(
        fleet(ENGINE, {**ENGINE, "name": "b"}), fleet({**ENGINE, **change}, {**ENGINE, "name": "b"})
    )
    assert changes.restart_needed == ("a",)
    assert changes.live_applied == ()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"pin": True}, "engine 'a'.pin: False -> True"),
        ({"priority": 5}, "engine 'a'.priority: 0 -> 5"),
        ({"aliases": ["x", "y"]}, "engine 'a'.aliases: [] -> [x, y]"),
        ({"drain_bound_s": 9}, "engine 'a'.drain_bound_s: unset -> 9.0"),
        ({"overrides": {"set": {"n": 1}}}, """engine 'a'.overrides: {} -> {"set":{"n":1}}"""),
    ],
)
def test_what_only_the_service_knows_about_an_engine_applies_at_once(change: dict[str, Any], line: str):
    changes = describe_changes(fleet(), fleet({**ENGINE, **change}))
    assert (changes.live_applied, changes.restart_needed) == ((line,), ())


def test_both_kinds_of_change_to_one_engine_are_told_apart():
    changes = describe_changes(fleet(), fleet({**ENGINE, "pin": True, "env": {"A": "1"}}))
    assert changes.restart_needed == ("a",)
    assert changes.live_applied == ("engine 'a'.pin: False -> True",)


def test_policies_apply_at_once():
    changes = describe_changes(fleet(), fleet(policies={"min_stay_s": 5}, devices={"reserve_gib": 2}))
    assert changes.live_applied == ("devices.reserve_gib: 1.0 -> 2.0", "policies.min_stay_s: 2.0 -> 5.0")
    assert changes.service_restart_needed == ()


@pytest.mark.parametrize(
    "change",
    [{"bind": {"port": 9}}, {"state_dir": "/x"}, {"devices": {"gpus": [0]}}, {"ledger": {"url": "sqlite:////x"}}],
)
def test_what_the_service_is_built_around_waits_for_its_restart(change: dict[str, Any]):
    changes = describe_changes(fleet(), fleet(**change))
    assert len(changes.service_restart_needed) == 1
    assert changes.live_applied == ()


def test_keys_are_told_by_name_and_never_by_digest():
    keys = [{"name": "ci", "sha256": "ab" * 32}]
    changes = describe_changes(fleet(), fleet(keys=keys))
    assert changes.live_applied == ("keys: none -> ci",)
    replaced = describe_changes(fleet(keys=keys), fleet(keys=[{"name": "ci", "sha256": "cd" * 32}]))
    assert replaced.live_applied == ("keys: ci -> ci",)


def test_every_change_is_one_line_for_an_operator():
    b = {**ENGINE, "name": "b"}
    changes = describe_changes(
        fleet(ENGINE, b), fleet({**ENGINE, "port": 9, "pin": True}, {**ENGINE, "name": "c"}, bind={"port": 1})
    )
    assert changes.lines() == (
        "engine 'c': added",
        "engine 'b': removed",
        "engine 'a': started differently from now on; restart it to apply",
        "engine 'a'.pin: False -> True (applied)",
        "bind.port: 8400 -> 1 (restart the service to apply)",
    )
