"""Which node of its pool an engine gets."""

from pathlib import Path
from typing import Any

import yaml

from rotator.config import FleetConfig, parse
from rotator.service.pools import gpu_names, place

HAVE = {f"{node}/{gpu}" for node in ("a", "b", "c") for gpu in (0, 1)}


def fleet(*engines: dict[str, Any]) -> FleetConfig:
    nodes = [
        {"name": n, "agent": f"http://127.0.0.1:{8411 + i}", "token_file": "t", "pool": "big" if n != "c" else None}
        for i, n in enumerate("abc")
    ]
    plain = {"launcher": "attach", "url": "http://127.0.0.1:8001", "footprint": {"awake_gib": 10}}
    return parse(yaml.safe_dump({"nodes": nodes, "engines": [{**plain, **e} for e in engines]}), base=Path("/etc"))


def exists(name: str) -> bool:
    return name in HAVE


def test_engines_of_a_pool_go_where_least_was_promised() -> None:
    made = fleet(
        {"name": "one", "node": "big", "gpus": [0]},
        {"name": "two", "node": "big", "gpus": [0]},
        {"name": "fixed", "gpus": ["a/0"]},
    )
    assert place(made, exists, {}) == {"fixed": "", "one": "b", "two": "a"}


def test_an_engine_keeps_the_node_that_it_had_even_if_another_is_emptier_now() -> None:
    made = fleet({"name": "one", "node": "big", "gpus": [0]}, {"name": "fixed", "gpus": ["a/0"]})
    assert place(made, exists, {"one": "a"})["one"] == "a"
    assert place(made, exists, {"one": "c"})["one"] == "b", "c is no node of that pool"


def test_nobody_new_is_sent_to_a_node_that_does_not_answer_if_another_does() -> None:
    made = fleet({"name": "one", "node": "big", "gpus": [0]})
    assert place(made, exists, {}, frozenset("a"))["one"] == "b"
    assert place(made, exists, {}, frozenset("ab"))["one"] == "a"


def test_a_pool_without_the_gpus_that_are_asked_for_gives_a_name_that_no_gpu_has() -> None:
    made = fleet({"name": "one", "node": "big", "gpus": [0, 7]})
    assert place(made, exists, {}) == {"one": "big"}
    assert not any(exists(name) for name in gpu_names(made.engines[0], "big"))


def test_gpus_that_name_a_node_keep_it_and_the_others_get_the_engines() -> None:
    made = fleet({"name": "wide", "node": "a", "gpus": [0, "b/0", "c/1"]})
    assert gpu_names(made.engines[0], place(made, exists, {})["wide"]) == ("a/0", "b/0", "c/1")
