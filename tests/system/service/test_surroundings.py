"""What is around the service fails: device queries hang, ports are taken, the ledger's disk is full."""

import asyncio
import resource
from pathlib import Path

import aiohttp

from tests.system.service.rig import Rig, engine, eventually, free_port, rig_up


async def test_a_hung_device_query_makes_that_gpu_unknown_while_serving_goes_on_and_it_heals(tmp_path: Path) -> None:
    engines = [engine("a"), engine("b"), engine("c", gpus=[1]), engine("d", gpus=[1])]
    async with rig_up(tmp_path, engines, gpus=2, devices={"read_deadline_s": 0.4}) as rig:
        for name in ("b", "a", "c"):
            await rig.say(name)
        stream = await rig.chat("a", "story", 600).begun()
        rig.box.hang_nvml(0)
        unknown = await rig.events.wait("gpu.unknown")
        gpu = unknown["data"]["gpu"]
        assert any(gpu in reason and "unknown" in reason for reason in (await rig.readiness())["reasons"])
        assert await rig.say("a"), "an awake engine on it serves on"
        mark = rig.events.now()
        waiting = rig.chat("b")
        assert await rig.say("d"), "the other GPU rotates on"
        assert await rig.say("c")
        assert (await stream.end()).done
        assert not waiting.task.done()
        assert not rig.events.find("engine.draining", "a", mark), "no transition starts on a GPU that nobody can read"
        rig.box.heal_nvml(0)
        assert (await waiting.end()).done
        await eventually(lambda: nothing_degraded(rig), what="a healed GPU")
        await rig.check()


async def nothing_degraded(rig: Rig) -> bool:
    return (await rig.readiness())["reasons"] == []


async def test_the_services_own_port_being_taken_is_one_clear_line_and_exit_code_1(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [engine("a")])
    holder = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", rig.port)
    try:
        rig.spawn()
        assert await rig.ended() == 1
        lines = [line for line in rig.log().splitlines() if " INFO " not in line]
        assert len(lines) == 1, rig.log()
        assert f"127.0.0.1:{rig.port}" in lines[0]
        assert "choose another port" in lines[0]
    finally:
        holder.close()
        await rig.close()


async def test_a_second_service_on_the_same_fleet_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    async with rig_up(tmp_path, [engine("a")]) as rig:
        text = await rig.say("a")
        first, before = rig.service, await rig.pids()
        rig.settings = {"bind": {"port": free_port()}}
        rig.spawn()
        try:
            assert await rig.ended() == 1
            assert "Traceback" not in rig.log()
        finally:
            rig.service = first
        assert await rig.say("a") == text
        assert await rig.pids() == before


async def test_an_engines_port_being_taken_fails_its_start_with_the_reason(tmp_path: Path) -> None:
    port = free_port()
    holder = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
    async with rig_up(tmp_path, [engine("a", port=port), engine("b")]) as rig:
        problem = await rig.problem("POST", "/engines/a/start")
        assert problem["status"] == 502
        assert "cannot listen" in problem["detail"]
        assert await rig.say("b")
        holder.close()
        await holder.wait_closed()
        assert await rig.say("a"), "it comes once the port is free"
        await rig.check()


async def test_a_full_disk_lets_awake_engines_serve_and_starts_no_transition_until_there_is_room(
    tmp_path: Path,
) -> None:
    async with rig_up(tmp_path, [engine("a"), engine("b")]) as rig:
        for name in ("b", "a"):
            await rig.say(name)
        assert rig.service is not None
        pid = rig.service.pid
        _, hard = room = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        mark = rig.events.now()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        waiting = rig.chat("b")
        await eventually(lambda: says(rig, "ledger cannot be written"), what="word of the ledger in /readyz")
        assert await rig.say("a"), "an awake engine serves on"
        assert not waiting.task.done()
        assert not rig.events.find("engine.falling_asleep", "a", mark)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, room)
        assert (await waiting.end()).done
        assert not await says(rig, "ledger")
        await rig.check()


async def says(rig: Rig, words: str) -> bool:
    return any(words in reason for reason in (await rig.readiness())["reasons"])


async def test_the_engines_own_endpoints_cannot_be_reached_through_the_service(tmp_path: Path) -> None:
    """The development endpoints that put engines to sleep are not for clients."""
    async with rig_up(tmp_path, [engine("a")]) as rig, aiohttp.ClientSession() as session:
        await rig.say("a")
        for path in ("/v1/load_lora_adapter", "/v1/sleep", "/collective_rpc", "/stub/state", "/is_sleeping"):
            async with session.post(rig.url + path, json={"model": "a"}) as answer:
                assert answer.status in (404, 405), path
        assert await rig.state("a") == "awake"
