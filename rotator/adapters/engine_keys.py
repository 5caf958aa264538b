"""The engines' own API keys: a new one for each launch of a process, so that nobody but this service uses the engine.

Loopback is open to every user of the machine; vLLM asks for the key on all paths below /v1. An engine outlives the
service, so its key is kept where only the service's own user may read it.
"""

import json
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rotator.ports import LaunchError, LaunchSpec
from rotator.ports_nodes import Door, Doors

VARIABLE = "VLLM_API_KEY"
_OPTION = "--api-key"
_log = logging.getLogger(__name__)


class EngineKeys:
    """By the engines' base URLs. ``others`` are the doors of agents, behind which there may be engines with keys."""

    def __init__(self, path: Path, others: Doors = lambda _: None) -> None:
        """Raises LaunchError where the file is there and cannot be read."""
        self._path = path
        self._others = others
        self._issued: dict[str, str] = _read(path)
        self._given: dict[str, str] = {}
        self._doors: dict[str, Door] = {}

    def issue(self, spec: LaunchSpec) -> str:
        """The key that an engine is to be launched with: a new one, or the one that its configuration gives. Blocking;
        raises LaunchError where it cannot be kept."""
        key = _configured(spec) or f"sk-{secrets.token_urlsafe(32)}"
        issued = {**self._issued, spec.url: key}
        try:
            _write(self._path, issued)
        except OSError as e:
            raise LaunchError(
                f"engine '{spec.engine}': its API key cannot be kept in {self._path}: {e.strerror}: make room or fix "
                "the rights"
            ) from None
        self._issued = issued
        return key

    def give(self, keys: Mapping[str, str]) -> None:
        """Keys of engines that others start, by URL, instead of those given before."""
        self._given = dict(keys)

    def door(self, url: str) -> Door | None:
        """What is shown at this URL, or one below it: the engine's key, the agent's word, both or neither."""
        key = self._key(url)
        agent = self._others(url)
        if not key:
            return agent
        if agent is not None:
            return replace(agent, key=key)
        door = self._doors.get(url)
        if door is None or door.key != key:
            if len(self._doors) >= 256:  # base URLs alone come again and again
                self._doors.clear()
            door = self._doors[url] = Door(None, "", key)
        return door

    def _key(self, url: str) -> str:
        base = "/".join(url.split("/", 3)[:3])
        found = self._given.get(base) or self._issued.get(base)
        if found is None and self._given:
            found = next(
                (key for below, key in self._given.items() if url.startswith(f"{below}/") or url == below), None
            )
        return found or ""


def _configured(spec: LaunchSpec) -> str:
    """vLLM takes its option before its variable."""
    for at, word in enumerate(spec.command):
        name, _, value = word.partition("=")
        if name == _OPTION:
            return value or (spec.command[at + 1] if at + 1 < len(spec.command) else "")
    return spec.env.get(VARIABLE, "")


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise LaunchError(f"{path}: the engines' API keys cannot be read: {e.strerror}: fix the rights") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        _log.error("%s is damaged: engines that run with a key of it will be started anew", path)
        return {}
    return {str(url): str(key) for url, key in found.items()}


def _write(path: Path, keys: Mapping[str, str]) -> None:
    """Whole or not at all; readable by its owner alone from its first byte on."""
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(dict(keys), file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
