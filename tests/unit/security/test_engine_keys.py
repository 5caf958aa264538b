"""Engines' own keys: made for a launch, kept for the next life of the service, shown to their engine alone."""

import json
import stat
from pathlib import Path

import pytest

from rotator.adapters.engine_keys import EngineKeys
from rotator.ports import LaunchError, LaunchSpec
from rotator.ports_nodes import Door

URL = "http://127.0.0.1:8001"


def spec(*command: str, **env: str) -> LaunchSpec:
    return LaunchSpec("a", "process", command or ("vllm",), env, URL, "")


def test_each_launch_has_a_new_key_that_its_url_is_shown(tmp_path: Path):
    keys = EngineKeys(tmp_path / "keys.json")
    assert keys.door(f"{URL}/v1/models") is None
    one, other = keys.issue(spec()), keys.issue(spec())
    assert one != other
    for url in (URL, f"{URL}/v1/models"):
        door = keys.door(url)
        assert door is not None
        assert door.headers == {"authorization": f"Bearer {other}"}
        assert other not in repr(door)
    assert keys.door("http://127.0.0.1:80012") is None


def test_a_key_is_kept_for_the_next_life_where_only_its_owner_reads_it(tmp_path: Path):
    path = tmp_path / "keys.json"
    key = EngineKeys(path).issue(spec())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    door = EngineKeys(path).door(URL)
    assert door is not None
    assert door.key == key


@pytest.mark.parametrize(
    "given", [spec("vllm", "--api-key", "own"), spec("vllm", "--api-key=own"), spec(VLLM_API_KEY="own")]
)
def test_a_key_of_the_configuration_is_the_engines(tmp_path: Path, given: LaunchSpec):
    assert EngineKeys(tmp_path / "keys.json").issue(given) == "own"


def test_an_engine_behind_an_agent_is_shown_its_key_beside_the_agents_word(tmp_path: Path):
    agent = "https://gpu2:8411/engines/a"
    keys = EngineKeys(
        tmp_path / "keys.json", lambda url: Door(None, "word") if url.startswith("https://gpu2") else None
    )
    keys.give({agent: "own"})
    door, other = keys.door(f"{agent}/v1/models"), keys.door("https://gpu2:8411/engines/ab")
    assert door is not None
    assert other is not None
    assert (door.token, door.key, other.key) == ("word", "own", "")


def test_a_damaged_file_is_no_reason_not_to_start_and_one_that_cannot_be_kept_is_told(tmp_path: Path):
    path = tmp_path / "keys.json"
    path.write_text("[")
    keys = EngineKeys(path)
    keys.issue(spec())
    assert list(json.loads(path.read_text())) == [URL]
    with pytest.raises(LaunchError, match="cannot be kept"):
        EngineKeys(tmp_path / "nowhere" / "keys.json").issue(spec())
