"""`rotator demo`: the whole main job, as a newcomer runs it."""

import asyncio
import json
import sys

import pytest


@pytest.mark.timeout(150)
async def test_the_demo_ends_well_and_prints_its_result_as_one_json_object() -> None:
    demo = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "rotator",
        "demo",
        "--json",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, told = await demo.communicate()
    assert demo.returncode == 0, told.decode()[-3000:]
    result = json.loads(out)
    assert {
        "requests", "failed", "lost", "swaps", "wakes", "sleeps", "ledger_matches_devices", "canaries_passed", "engines"
    } <= set(result)  # fmt: skip
    assert (result["failed"], result["lost"], result["ledger_matches_devices"]) == (0, 0, True)
    assert result["requests"] > 0
    assert result["swaps"] > 0
    assert result["canaries_passed"] >= result["wakes"]
    assert len(result["engines"]) == 5
