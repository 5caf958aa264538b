"""Blocking work off the loop: what hangs takes nothing else with it."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rotator.adapters import blocking
from rotator.adapters.blocking import off_loop
from rotator.adapters.evidence import FileEvidence
from rotator.config_watchdog import EvidenceConfig
from rotator.ports import LaunchError
from rotator.ports_watchdog import Case

HANGS = """
import asyncio, threading
from rotator.adapters.blocking import off_loop
async def story():
    try:
        await off_loop(threading.Event().wait, deadline_s=0.05, doing="this")
    except Exception as e:
        print(e)
asyncio.run(story())
"""


async def test_what_hangs_costs_its_caller_alone_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "THREADS_MAX", 40)
    hanging = threading.Event()
    calls = [off_loop(hanging.wait, deadline_s=0.3, doing="it") for _ in range(40)]
    held = asyncio.gather(*calls, return_exceptions=True)
    try:
        await asyncio.sleep(0.05)
        with pytest.raises(LaunchError, match="was not tried"):
            await off_loop(lambda: 1, deadline_s=5, doing="another")
        assert await asyncio.to_thread(lambda: 2) == 2, "the pool of others is free"
        assert all(isinstance(error, LaunchError) for error in await held)
    finally:
        hanging.set()
    for thread in threading.enumerate():
        if thread.name == "off the loop":
            await asyncio.to_thread(thread.join, 5)
    assert await off_loop(lambda: 3, deadline_s=5, doing="another") == 3


async def test_what_the_work_raises_is_raised_and_its_own_timeout_is_not_ours() -> None:
    def late() -> None:
        raise TimeoutError("its own")

    with pytest.raises(ZeroDivisionError):
        await off_loop(lambda: 1 / 0, deadline_s=5, doing="it")
    with pytest.raises(TimeoutError, match="its own"):
        await off_loop(late, deadline_s=5, doing="it")


def test_a_process_ends_without_what_hangs() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=20, check=True)
    assert "took longer than 0.05 s" in done.stdout


async def test_large_evidence_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    evidence = FileEvidence(tmp_path, lambda: EvidenceConfig(log_lines=1), environ={})
    loop, longest_s, done = asyncio.get_running_loop(), 0.0, asyncio.Event()

    async def beat() -> None:
        nonlocal longest_s
        while not done.is_set():
            before_s = loop.time()
            await asyncio.sleep(0.005)
            longest_s = max(longest_s, loop.time() - before_s)

    beating = asyncio.create_task(beat())
    text = "a line of a page of metrics that names tokens/s and no secret\n" * 40_000
    began_s = loop.time()
    await evidence.collect(Case("i1", texts={"engine-metrics.txt": text}), deadline_s=30)
    took_s = loop.time() - began_s
    done.set()
    await beating
    assert (tmp_path / "incidents/i1/engine-metrics.txt").stat().st_size == len(text)
    assert longest_s < took_s / 2
