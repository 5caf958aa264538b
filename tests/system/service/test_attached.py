"""An engine that somebody else runs: it takes turns like the others, and is never ended by us."""

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.service.rig import Rig, engine, eventually, free_port


class Attached:
    def __init__(self, rig: Rig, port: int, spec: dict[str, Any]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._environment = {**os.environ, **rig.box.env()}
        self._command = [str(port) if word == "{port}" else word for word in spec["command"]]
        self.process: subprocess.Popen[bytes]

    def start(self) -> int:
        self.process = subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def runs(self) -> bool:
        return self.process.poll() is None


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, [engine("own")], recovery={"on_shutdown": "stop"})
    try:
        yield rig
    finally:
        await rig.close()


@pytest.fixture
def other(rig: Rig) -> Attached:
    port = free_port()
    spec = engine("other")
    attached = Attached(rig, port, spec)
    rig.engines.append({**spec, "launcher": "attach", "command": [], "url": attached.url})
    return attached


async def up(rig: Rig, url: str) -> bool:
    try:
        return (await rig.call("GET", f"{url}/version"))[0] == 200
    except OSError:
        return False


async def test_it_rotates_its_death_is_noticed_it_comes_back_and_is_never_killed_by_us(
    rig: Rig, other: Attached
) -> None:
    other.start()
    await eventually(lambda: up(rig, other.url), what="the attached engine")
    await rig.serve()
    assert await rig.state("other") == "awake"
    undisturbed = await rig.say("other", "story", 300)
    stream = await rig.chat("other", "story", 300).begun()
    assert await rig.say("own"), "it yields"
    assert (await stream.end()).text == undisturbed, "and comes back"
    assert (await rig.get("/ledger/check"))["matches"]

    problem = await rig.problem("POST", "/engines/other/stop")
    assert problem["status"] == 409
    assert other.runs()

    mark = rig.events.now()
    broken = await rig.chat("other", "story", 2000).begun()
    other.kill()
    assert not (await broken.end()).claims_to_be_complete
    await rig.events.wait("engine.failed", "other", mark)
    assert await rig.say("own")
    await rig.post("/sleep", model="own")
    other.start()
    await rig.until_state("other", "awake")
    assert await rig.say("other", "story", 300) == undisturbed
    assert await rig.say("own")

    assert await rig.terminate() == 0
    assert other.runs()
    assert rig.processes() == {other.process.pid}


async def test_one_that_lies_is_quarantined_but_left_running(rig: Rig, other: Attached) -> None:
    other.start()
    await eventually(lambda: up(rig, other.url), what="the attached engine")
    await rig.serve()
    await rig.misbehave("other", lie_sleep=True)
    await rig.post("/sleep", model="other", wait=False)
    await rig.until_state("other", "quarantined")
    assert other.runs()
    refused = await rig.chat("other").end()
    assert refused.status == 503
    assert "said it sleeps" in str(refused.error)
    refused = await rig.chat("own").end()
    assert refused.status == 503, "its bytes are still there: nothing is planned over them"
    other.kill()
    other.start()
    await eventually(lambda: up(rig, other.url), what="the attached engine")
    await rig.post("/engines/other/release")
    await rig.until_state("other", "awake")
    assert await rig.say("own")
    assert await rig.say("other")
