"""Three engines, two of them on Nomad, a target beside the fleet file, and the command as operators run it."""

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rotator.adapters.nomad_job import var_file
from rotator.cli.main import run
from tests.nomad_double import NomadDouble
from tests.nomad_double.sample import HCL, sample_job
from tests.system.service.rig import Rig, engine, eventually, free_port

NAMES = ("a", "b", "c")
ON_NOMAD = ("a", "c")
FORGETFUL = {"forget_at": 8}
QUICK = (
    "--recall",
    "8",
    "--recall-words",
    "300",
    "--cycles",
    "1",
    "--samples",
    "1",
    "--tolerance",
    "5",
    "--yes",
    "--away",
    "60",
)
_STUB = ("--prefill-tokens-per-s", "400", "--tokens-per-s", "1000")


class Stage(Rig):
    """A rig whose fleet file is its own only once: a rollout changes it, and a restart must not change it back."""

    def write_fleet(self) -> Path:
        path = self.folder / "fleet.yaml"
        return path if path.exists() else super().write_fleet()


def _on_nomad(folder: Path, name: str, gpu: int) -> dict[str, Any]:
    file = folder / "engine.nomad.hcl"
    file.write_text(HCL)
    return {
        "name": name,
        "gpus": [gpu],
        "launcher": "nomad",
        "port": free_port(),
        "job": {"file": str(file), "variables": {"job_id": f"vllm-{name}", "port": "{port}", "note": "1"}},
        "start_deadline_s": 40,
        "stop_grace_s": 1,
        "footprint": {"awake_gib": 13, "residue_gib": 1},
    }


def _teach(nomad: NomadDouble, one: Mapping[str, Any], version: str, misbehave: Mapping[str, Any]) -> None:
    """What Nomad makes of this engine's job with this note: its version, and how it misbehaves."""
    name, port = one["name"], one["port"]
    argv = [sys.executable, "-m", "rotator.demo.engine", "--name", name, "--port", str(port), "--weights-gib", "8"]
    argv += ["--gpus", ",".join(map(str, one["gpus"])), "--kv-gib", "4", *_STUB]
    argv += ["--misbehave", json.dumps(misbehave)]
    env = {"ROTATOR_ENGINE": name, "VERSION": version}
    job = sample_job(f"vllm-{name}", port=port, argv=argv, env=env, note=version)
    nomad.teach(HCL, var_file({"job_id": f"vllm-{name}", "port": str(port), "note": version}), job)


def target(rig: Rig, nomad: NomadDouble, version: str, names: Sequence[str], forgetful: Sequence[str] = ()) -> Path:
    """The fleet file as it is to be: engines of ``names`` of another version, some of them worse than before."""
    fleet = json.loads((rig.folder / "fleet.yaml").read_text())
    for one in (e for e in fleet["engines"] if e["name"] in names):
        misbehave = FORGETFUL if one["name"] in forgetful else {}
        if one["name"] in ON_NOMAD:
            one["job"]["variables"]["note"] = version
            _teach(nomad, one, version, misbehave)
        else:
            one["env"]["VERSION"] = version
    path = rig.folder / "target.yaml"
    path.write_text(json.dumps(fleet, indent=1))
    return path


@contextlib.asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[tuple[Rig, NomadDouble]]:
    """All three are awake and of version 1, each on its own GPU."""
    engines = [_on_nomad(folder, "a", 0), engine("b", gpus=[1], arguments=[*_STUB]), _on_nomad(folder, "c", 2)]
    engines[1]["env"] = {"VERSION": "1"}
    rig = Stage(folder, engines, gpus=3)
    async with NomadDouble(folder / "nomad", environ={**os.environ, **rig.box.env()}) as nomad:
        rig.settings["devices"] = {"sample_every_s": 1.0}
        rig.settings["nomad"] = {"address": nomad.address, "deadline_s": 3, "resync_s": 1}
        for one in (engines[0], engines[2]):
            _teach(nomad, one, "1", {})
        try:
            await rig.serve()
            await asyncio.gather(*(rig.say(name) for name in NAMES))
            yield rig, nomad
        finally:
            await nomad.stop()
            await rig.close()


def _words(rig: Rig, arguments: Sequence[str]) -> list[str]:
    return ["jobs", "rollout", "-c", str(rig.folder / "fleet.yaml"), "--url", rig.url, *arguments]


class Killable:
    """A command in a process of its own."""

    def __init__(self, rig: Rig, *arguments: str) -> None:
        self._log = rig.folder / "rollout.log"
        with self._log.open("wb") as log:
            words = [sys.executable, "-m", "rotator", *_words(rig, arguments)]
            self._process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    async def killed_after(self, words: str) -> None:
        await self.killed_when(lambda: words in self._log.read_text())

    async def killed_when(self, it_is_so: Callable[[], bool]) -> None:
        await eventually(it_is_so, within_s=60, what=self._log.read_text)
        self._process.kill()
        await asyncio.to_thread(self._process.wait, 20)


class Command:
    """A command in a thread of this process: the same code, without its imports once more."""

    def __init__(self, rig: Rig, *arguments: str) -> None:
        self._text = io.StringIO()
        self._task = asyncio.create_task(asyncio.to_thread(self._run, _words(rig, arguments)))

    def _run(self, words: Sequence[str]) -> int:
        with contextlib.redirect_stdout(self._text), contextlib.redirect_stderr(self._text):
            return run(words)

    @property
    def said(self) -> str:
        return self._text.getvalue()

    async def until_said(self, words: str) -> None:
        def heard() -> bool:
            assert not self._task.done() or words in self.said, self.said
            return words in self.said

        await eventually(heard, within_s=60, what=lambda: f"'{words}' in:\n{self.said}")

    async def end(self, within_s: float = 90) -> int:
        async with asyncio.timeout(within_s):
            return await self._task


def versions(rig: Rig) -> dict[str, str]:
    """By engine, the version that its one process is."""
    found = {}
    for name in NAMES:
        (pid,) = rig.engine_processes(name)
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found[name] = next(w for w in words if w.startswith(b"VERSION=")).removeprefix(b"VERSION=").decode()
    return found


def in_file(rig: Rig) -> dict[str, str]:
    """By engine, the version that its next start would be."""
    engines = json.loads((rig.folder / "fleet.yaml").read_text())["engines"]
    return {e["name"]: e["job"]["variables"]["note"] if "job" in e else e["env"]["VERSION"] for e in engines}
