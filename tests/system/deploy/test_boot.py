"""A machine's boot, played: the unit's own command line, its readiness, and everything gone and started again."""

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.system.service.rig import SOON_S, Events, Rig, engine

UNIT = Path(__file__).parents[3] / "deploy/systemd/rotator.service"


class BootedRig(Rig):
    """The service as systemd starts it: by ExecStart, and up when it says so on the notification socket."""

    async def boot(self) -> None:
        """Return when the unit is active."""
        path = self.folder / "notify"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.bind(str(path))
            told.setblocking(False)
            os.environ["NOTIFY_SOCKET"] = str(path)
            try:
                self.spawn()
            finally:
                del os.environ["NOTIFY_SOCKET"]
            async with asyncio.timeout(40):
                assert await asyncio.get_running_loop().sock_recv(told, 100) == b"READY=1"
        self.events = Events(self.url)

    def spawn(self, prepare: Callable[[], None] | None = None) -> subprocess.Popen[bytes]:
        (line,) = [row for row in UNIT.read_text().splitlines() if row.startswith("ExecStart=")]
        program, *arguments = shlex.split(line.partition("=")[2])
        assert program == "/opt/rotator/bin/rotator"
        fleet = str(self.write_fleet())
        words = [fleet if word == "/etc/rotator/fleet.yaml" else word for word in arguments]
        assert fleet in words
        with (self.folder / "service.log").open("ab") as log:
            self.service = subprocess.Popen(
                [sys.executable, "-m", "rotator", *words],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.box.nvml_env()},
            )
        return self.service

    async def lose_power(self, *, but: set[int]) -> None:
        """Kill the service and all engines at once, but those processes."""
        assert self.service is not None
        for pid in (self.processes() | {self.service.pid}) - but:
            os.kill(pid, signal.SIGKILL)
        await self.ended()
        await self.events.close()


async def test_a_boot_brings_every_preloaded_engine_back_and_finds_those_that_run(tmp_path: Path) -> None:
    engines = [engine("first", preload=True), engine("second", gpus=[1], preload=True)]
    rig = BootedRig(tmp_path, engines, gpus=2, page={"enabled": False})
    try:
        await rig.boot()
        await rig.until_state("first", "awake")
        await rig.until_state("second", "awake")
        before = await rig.pids()
        await rig.lose_power(but=before["second"])
        await rig.boot()
        await rig.until_state("first", "awake", within_s=2 * SOON_S)
        await rig.until_state("second", "awake")
        after = await rig.pids()
        assert after["second"] == before["second"], "an engine that still ran was found, not doubled"
        assert after["first"].isdisjoint(before["first"])
        assert await rig.say("first")
        assert await rig.terminate() == 0
        assert await rig.pids() == after, "a stop of the unit leaves the engines, as KillMode=process does"
    finally:
        await rig.close()
