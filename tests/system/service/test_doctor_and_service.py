"""A running service, its engines' logs, and a program that vanished under it."""

import asyncio
from pathlib import Path

import pytest

from rotator.cli import errors
from rotator.cli.main import run
from tests.system.service.rig import engine, rig_up


async def test_a_vanished_program_is_told_as_what_it_is_and_the_log_of_a_running_engine_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = engine("gone", command=[str(tmp_path / "bin" / "vllm"), "serve"])
    async with rig_up(tmp_path, [engine("a"), gone]) as rig:
        await rig.say("a")
        status, answer = await rig.call("POST", "/engines/gone/start?deadline_s=30")
        assert status == 502
        assert "not launched, it cannot start" in str(answer)
        assert "exit 127: no engine crash" in str(answer)
        assert await rig.state("a") == "awake"
        assert await asyncio.to_thread(run, ["logs", "a", "--url", rig.url]) == errors.OK
        assert capsys.readouterr().out.startswith("=== rotator: ")
