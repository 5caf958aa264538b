"""The stub as a process on a simulated box: its bytes are the device's, and they go when it goes."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from allocator.box import SimulatedBox
from rotator.adapters.vllm import VllmControl
from rotator.config import CanaryConfig
from rotator.core.values import Level
from rotator.ports import EngineRefused, EngineUnreachable
from rotator.service import canary

GIB = 1 << 30
MODEL = "m"
SOON_S = 20.0
CONFIG = CanaryConfig()
_USED = (
    "import json, pynvml as p; p.nvmlInit(); print(json.dumps([p.nvmlDeviceGetMemoryInfo("
    "p.nvmlDeviceGetHandleByIndex(i)).used for i in range(p.nvmlDeviceGetCount())]))"
)

StartEngine = Callable[..., Awaitable[tuple[asyncio.subprocess.Process, str]]]


@pytest.fixture
def box(tmp_path: Path) -> SimulatedBox:
    return SimulatedBox.create(tmp_path / "box", devices=2, memory_bytes=24 * GIB, copy_gib_s=0)


async def used_gib(box: SimulatedBox) -> list[float]:
    reader = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _USED, env=os.environ | box.nvml_env(), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await reader.communicate()
    return [round(used / GIB, 2) for used in json.loads(out)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def control() -> AsyncIterator[VllmControl]:
    made = VllmControl()
    yield made
    await made.close()


@pytest.fixture
async def engine(box: SimulatedBox) -> AsyncIterator[StartEngine]:
    started: list[asyncio.subprocess.Process] = []

    async def start(*more: str, port: int | None = None) -> tuple[asyncio.subprocess.Process, str]:
        at = port or free_port()
        sizes = ("--gpus", "0,1", "--weights-gib", "6", "--kv-gib", "4", "--residue-gib", "1")
        command = ("-m", "rotator.demo.engine", "--name", MODEL, "--port", str(at), *sizes, *more)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            env=os.environ | box.env(),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        started.append(process)
        return process, f"http://127.0.0.1:{at}"

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def until_healthy(control: VllmControl, url: str) -> None:
    async with asyncio.timeout(SOON_S):
        while not await control.is_healthy(url, deadline_s=1):  # noqa: ASYNC110 - a process tells no event
            await asyncio.sleep(0.02)


async def test_bytes_leave_the_device_and_come_back_and_answers_stay_the_same(
    box: SimulatedBox, engine: StartEngine, control: VllmControl
) -> None:
    process, url = await engine()
    await until_healthy(control, url)
    assert await used_gib(box) == [11.0, 11.0]
    golden = await canary.record(control, url, MODEL, CONFIG)
    for level in (Level.HOST, Level.DISCARD):
        await control.sleep(url, level=level, abort=False, deadline_s=SOON_S)
        assert await used_gib(box) == [1.0, 1.0]
        await control.wake(url, level=level, deadline_s=SOON_S)
        assert await used_gib(box) == [11.0, 11.0]
        verdict = await canary.check(control, url, MODEL, golden, CONFIG)
        assert verdict.ok, verdict.reason
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), SOON_S) == 0
    assert await used_gib(box) == [0.0, 0.0]


async def test_two_engines_that_cannot_be_awake_together_take_turns(
    box: SimulatedBox, engine: StartEngine, control: VllmControl
) -> None:
    _, first = await engine("--weights-gib", "14")
    await until_healthy(control, first)
    await control.sleep(first, level=Level.HOST, abort=False, deadline_s=SOON_S)
    _, second = await engine("--weights-gib", "15")
    await until_healthy(control, second)
    with pytest.raises(EngineRefused, match="out of memory"):
        await control.wake(first, level=Level.HOST, deadline_s=SOON_S)
    assert await control.is_sleeping(first, deadline_s=SOON_S)
    await control.sleep(second, level=Level.HOST, abort=False, deadline_s=SOON_S)
    await control.wake(first, level=Level.HOST, deadline_s=SOON_S)
    assert await used_gib(box) == [20.0, 20.0]


async def test_a_liar_keeps_its_bytes_and_a_killed_engine_loses_them(
    box: SimulatedBox, engine: StartEngine, control: VllmControl
) -> None:
    process, url = await engine("--misbehave", '{"lie_sleep": true}')
    await until_healthy(control, url)
    await control.sleep(url, level=Level.HOST, abort=False, deadline_s=SOON_S)
    assert await used_gib(box) == [11.0, 11.0]
    process.kill()
    await process.wait()
    assert await used_gib(box) == [0.0, 0.0]


async def test_residue_grows_on_the_device_where_told(
    box: SimulatedBox, engine: StartEngine, control: VllmControl
) -> None:
    _, url = await engine("--misbehave", '{"residue_growth_gib": 0.5}')
    await until_healthy(control, url)
    for residue in (1.5, 2.0):
        await control.sleep(url, level=Level.HOST, abort=False, deadline_s=SOON_S)
        assert await used_gib(box) == [residue, residue]
        await control.wake(url, level=Level.HOST, deadline_s=SOON_S)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--misbehave", '{"die_at": "start", "exit_code": 127}'), 127),
        (("--misbehave", '{"die_at": "load", "exit_code": 3}'), 3),
        (("--weights-gib", "40"), 1),
        (("--tp", "3"), 2),
        (("--misbehave", '{"typo": 1}'), 2),
    ],
)
async def test_a_start_that_fails_tells_by_its_exit_code(more: Any, code: int, engine: StartEngine) -> None:
    process, _ = await engine(*more)
    assert await asyncio.wait_for(process.wait(), SOON_S) == code


async def test_a_taken_port_ends_the_start_at_once(engine: StartEngine) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        process, _ = await engine(port=holder.getsockname()[1])
        assert await asyncio.wait_for(process.wait(), SOON_S) == 1


@pytest.mark.parametrize("place", ["sleep", "wake"])
async def test_it_dies_where_told_and_gives_all_bytes_back(
    place: str, box: SimulatedBox, engine: StartEngine, control: VllmControl
) -> None:
    process, url = await engine("--misbehave", json.dumps({"die_at": place, "exit_code": 9}))
    await until_healthy(control, url)

    async def cycle() -> None:
        await control.sleep(url, level=Level.HOST, abort=False, deadline_s=SOON_S)
        await control.wake(url, level=Level.HOST, deadline_s=SOON_S)

    with pytest.raises(EngineUnreachable, match=f"/{place}"):
        await cycle()
    assert await asyncio.wait_for(process.wait(), SOON_S) == 9
    assert await used_gib(box) == [0.0, 0.0]
