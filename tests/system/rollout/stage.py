"""Three stub engines on a box, a target file beside the fleet file, and the command as an operator runs it."""

import asyncio
import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.system.service.rig import Rig, engine, eventually, merge

QUICK = ("--recall", "2,8", "--recall-words", "300", "--cycles", "2", "--samples", "2", "--tolerance", "5", "--yes")
NEW = {"VERSION": "2"}


def stub(name: str, gpu: int, **more: Any) -> dict[str, Any]:
    return engine(name, gpus=[gpu], arguments=["--prefill-tokens-per-s", "500"], **more)


def target_of(rig: Rig, names: Sequence[str], misbehave: Mapping[str, Mapping[str, Any]] = {}) -> Path:
    """The fleet file as it is to be: engines of ``names`` with another environment, some of them worse than before."""
    fleet = json.loads(rig.write_fleet().read_text())
    for one in fleet["engines"]:
        if one["name"] in names:
            one["env"] = {**one["env"], **NEW}
            if one["name"] in misbehave:
                one["command"] = [*one["command"], "--misbehave", json.dumps(misbehave[one["name"]])]
    path = rig.folder / "target.yaml"
    path.write_text(json.dumps(fleet, indent=1))
    return path


class Command:
    """One `rotator jobs rollout` under way."""

    def __init__(self, rig: Rig, *arguments: str) -> None:
        words = ["jobs", "rollout", "-c", str(rig.folder / "fleet.yaml"), "--url", rig.url, *arguments]
        self._log = rig.folder / "rollout.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rotator", *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    async def until_said(self, words: str) -> None:
        def heard() -> bool:
            assert self.process.poll() is None or words in self.said, self.said
            return words in self.said

        await eventually(heard, within_s=60, what=lambda: f"'{words}' in:\n{self.said}")

    async def end(self, within_s: float = 90) -> int:
        return await asyncio.to_thread(self.process.wait, within_s)

    async def kill(self) -> None:
        self.process.kill()
        await self.end()


async def runs_new(rig: Rig) -> dict[str, bool]:
    """By engine, whether its process has the new version's environment."""
    found = {}
    for name in [e["name"] for e in rig.engines]:
        (pid,) = rig.engine_processes(name)
        found[name] = b"VERSION=2\0" in Path(f"/proc/{pid}/environ").read_bytes()
    return found


def file_is_new(rig: Rig) -> dict[str, bool]:
    engines = json.loads((rig.folder / "fleet.yaml").read_text())["engines"]
    return {e["name"]: "VERSION" in e["env"] for e in engines}
