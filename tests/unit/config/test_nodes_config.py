"""Nodes in the fleet file."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rotator.config import ConfigError, FleetConfig, parse

ENGINE: dict[str, Any] = {"name": "glm", "launcher": "attach", "url": "http://127.0.0.1:8001", "gpus": ["gpu2/0"]}
NODE: dict[str, Any] = {
    "name": "gpu2",
    "agent": "https://10.0.0.2:8411",
    "ca": "tls/ca.pem",
    "cert": "tls/service.pem",
    "key": "tls/service.key",
    "token_file": "tls/token",
}


def read(nodes: list[dict[str, Any]], **engine: Any) -> FleetConfig:
    return parse(yaml.safe_dump({"nodes": nodes, "engines": [{**ENGINE, **engine}]}), base=Path("/etc/rotator"))


def test_a_nodes_files_are_relative_to_the_fleet_file() -> None:
    (node,) = read([NODE]).nodes
    assert (node.ca, node.token_file) == (Path("/etc/rotator/tls/ca.pem"), Path("/etc/rotator/tls/token"))
    assert node.url == "https://10.0.0.2:8411"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"agent": "http://10.0.0.2:8411"}, "plain http is for loopback only"),
        ({"ca": None}, "needs ca too: `rotator agent certs`"),
        ({"agent": "https://10.0.0.2:8411/here"}, "give its address alone"),
        ({"name": "gpu 2"}, "name"),
        ({"pool": "gpu2"}, "both a node and a pool"),
    ],
)
def test_a_node_that_cannot_be_reached_safely_is_refused_with_the_fix(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        read([{**NODE, **change}])


def test_a_node_on_loopback_may_go_without_certificates() -> None:
    node = {"name": "gpu2", "agent": "http://127.0.0.1:8411", "token_file": "token"}
    assert read([node]).nodes[0].cert is None
    with pytest.raises(ConfigError, match="token_file"):
        read([{**node, "token_file": None}])


def test_two_nodes_cannot_have_one_name_or_one_agent() -> None:
    with pytest.raises(ConfigError, match="named twice"):
        read([NODE, NODE])
    with pytest.raises(ConfigError, match="each node has its own"):
        read([NODE, {**NODE, "name": "gpu3"}])


def test_an_engine_that_names_no_known_node_is_refused() -> None:
    with pytest.raises(ConfigError, match="is on no node of this file: add 'gpu3'"):
        read([NODE], gpus=["gpu3/0"])
    with pytest.raises(ConfigError, match="there is no node or pool 'big'"):
        read([NODE], node="big", gpus=[0])


def test_an_engine_of_one_machine_keeps_the_hash_of_its_launch() -> None:
    plain = read([], gpus=[0]).engines[0]
    assert plain.spec_hash() == "dafdb9422c0c51ba"  # as the release before nodes made it
    assert read([NODE], node="gpu2", gpus=[0]).engines[0].spec_hash() != plain.spec_hash()
