"""Engines that wedge behind a healthy /health, crash in a loop, leave more behind each time; GPUs that are lost."""

import asyncio
import hashlib
import hmac
import io
import json
import tarfile
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.system.service.rig import Rig, engine, eventually, free_port, rig_up

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECRET = "0123456789abcdef"
QUICK: dict[str, Any] = {
    "every_s": 0.2,
    "stall_s": 1.2,
    "stall_young_s": 1.2,
    "residue_growth_gib": 0.5,
    "probe_deadline_s": 0.4,
    "quiet_s": 0.3,
    "evidence": {"deadline_s": 5},
}
NOTICED_S = 4.0  # stall_s, two looks, and what two shared cores may add


class Receiver:
    """What a webhook's receiver got; its first answer is an error, so that it is told again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.failures = 1

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/hook", self._take)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        return runner

    async def _take(self, request: web.Request) -> web.Response:
        if self.failures:
            self.failures -= 1
            return web.Response(status=503)
        self.got.append((dict(request.headers), await request.read()))
        return web.Response()

    def told(self) -> list[tuple[str, str]]:
        return [(m["event"], m["incident"]["kind"]) for m in (json.loads(body) for _, body in self.got)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    runner = await receiver.start()
    yield receiver
    await runner.cleanup()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> AsyncIterator[Rig]:
    """``a`` computes prompts slowly on one GPU; ``b`` and one that dies at every start share the other. All are watched
    closely, and incidents are told to ``receiver``."""
    hook = {"url": f"http://127.0.0.1:{receiver.port}/hook", "secret_env": "HOOK_SECRET"}
    slow = engine("a", arguments=["--prefill-tokens-per-s", "20"], env={"MY_API_KEY": "not-for-bundles-1234"})
    engines = [slow, engine("b", gpus=[1]), engine("dying", gpus=[1], misbehave={"die_at": "load"})]
    recovery = {"breaker_failures": 2, "backoff_max_s": 0.3, "vram_drain_deadline_s": 1}
    settings: dict[str, Any] = {"watchdog": QUICK, "webhooks": [hook], "recovery": recovery}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOOK_SECRET", SECRET)
        async with rig_up(tmp_path_factory.mktemp("watchdog"), engines, 2, **settings) as rig:
            await rig.say("a")
            yield rig


async def bundle_of(rig: Rig, id: str) -> dict[str, bytes]:
    async with aiohttp.ClientSession() as session, session.get(f"{rig.url}/incidents/{id}/bundle") as answer:
        assert answer.status == 200
        packed = await answer.read()
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        found = {m.name.partition("/")[2]: archive.extractfile(m) for m in archive.getmembers() if m.isfile()}
        return {name: file.read() for name, file in found.items() if file is not None}


async def test_one_that_is_slow_to_prefill_sleeps_or_stands_idle_is_not_taken_for_wedged(rig: Rig) -> None:
    begun = rig.events.now()
    assert await rig.say("a", "word " * 50), "seconds of prefill in which no counter moves"
    await rig.post("/sleep", model="a")
    await asyncio.sleep(1.5)
    await rig.post("/wake", model="a")
    await asyncio.sleep(1.5)
    assert not rig.events.find("incident.opened", since=begun)
    assert await rig.state("a") == "awake"


async def test_a_wedge_behind_a_healthy_health_is_noticed_examined_and_mended(rig: Rig, receiver: Receiver) -> None:
    old = rig.engine_processes("a")
    caught = rig.chat("a", tokens=2000)
    await caught.begun()
    begun = rig.events.now()
    await rig.misbehave("a", wedged=True)

    opened = await rig.events.wait("incident.opened", "a", begun, within_s=NOTICED_S)
    assert (opened["data"]["of"], opened["data"]["severity"]) == ("wedged", "serious")
    answer = await caught.end()
    assert not answer.claims_to_be_complete, "what was cut must not look whole"
    assert await rig.say("a"), "it is back by itself"
    assert rig.engine_processes("a").isdisjoint(old)
    closed = await rig.events.wait("incident.closed", "a", begun)
    assert closed["data"]["outcome"] == "back in service"
    await is_documented(rig, opened["data"]["id"], old)
    await is_told(receiver)
    await rig.check()


async def is_documented(rig: Rig, id: str, old: set[int]) -> None:
    """Its bundle holds what was there, says what was not, and no secret."""
    (shown,) = [i for i in await rig.get("/incidents?engine=a") if i["id"] == id]
    assert (shown["kind"], shown["count"]) == ("wedged", 1)
    files, (pid,) = await bundle_of(rig, id), old
    assert {"manifest.json", "incident.json", "log.txt", "journal.json", "engine-metrics.txt"} <= files.keys()
    assert b"thread" in files[f"stacks/{pid}-kernel.txt"]
    assert b"No available shared memory broadcast block" in files["log.txt"]
    assert b"vllm:generation_tokens_total" in files["engine-metrics.txt"]
    assert not any(b"not-for-bundles" in content for content in files.values())
    missing = json.loads(files["manifest.json"])["missing"]
    assert any(m["what"] == "nccl" for m in missing), missing
    assert all(m["why"] for m in missing)
    await rig.problem("GET", "/incidents/nothing")


async def is_told(receiver: Receiver) -> None:
    """Signed, once each, although the receiver refused at first."""
    await eventually(lambda: ("incident.closed", "wedged") in receiver.told(), within_s=10, what="the webhook")
    assert receiver.told().count(("incident.opened", "wedged")) == 1
    headers, body = receiver.got[0]
    at, _, digest = headers["X-Rotator-Signature"].removeprefix("t=").partition(",sha256=")
    assert hmac.new(SECRET.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest() == digest


async def test_what_is_left_behind_cycle_by_cycle_leads_to_a_restart_at_a_quiet_moment(rig: Rig) -> None:
    old, begun = rig.engine_processes("a"), rig.events.now()
    await rig.misbehave("a", residue_growth_gib=0.3)
    for _ in range(3):
        await rig.post("/sleep", model="a")
        await asyncio.sleep(0.3)  # a look at it
        await rig.post("/wake", model="a")
    opened = await rig.events.wait("incident.opened", "a", begun)
    assert opened["data"]["of"] == "residue"
    stopped = await rig.events.wait("engine.stopped", "a", begun)
    assert "planned restart" in stopped["data"]["reason"]
    closed = await rig.events.wait("incident.closed", "a", begun)
    assert closed["data"]["outcome"] == "back in service"
    assert rig.engine_processes("a").isdisjoint(old)
    (step,) = (await rig.get("/ledger?table=transitions&action=stop"))["rows"][:1]
    assert "grew from" in step["reason"]


async def test_one_that_crashes_again_and_again_is_quarantined_until_a_person_releases_it(rig: Rig) -> None:
    await rig.chat("dying").end()
    await rig.until_state("dying", "quarantined")
    view, refused = await rig.view("dying"), await rig.chat("dying").end()
    assert "2 times within" in view["reason"]
    assert refused.status == 503
    assert "quarantined" in (refused.error or "")
    (open_one,) = [i for i in await rig.get("/incidents?open=true") if i["kind"] == "crash_loop"]
    assert "rotator release dying" in open_one["advice"]
    assert len(rig.events.find("engine.starting", "dying")) == 2, "it is not started again"
    await rig.post("/engines/dying/release")
    assert not [i for i in await rig.get("/incidents?open=true") if i["engine"] == "dying"]


async def test_a_lost_gpu_is_cordoned_for_good_and_clients_are_told_what_to_do(rig: Rig) -> None:
    await rig.say("a")
    begun = rig.events.now()
    rig.box.fail_nvml(0, 15)

    async def is_noticed() -> bool:
        opened = [e["data"] for e in rig.events.find("incident.opened", since=begun)]
        return any(data["of"] == "gpu_lost" and data["gpu"] for data in opened)

    await eventually(is_noticed, within_s=NOTICED_S, what="a lost GPU")  # what was released before may die again
    await rig.until_state("a", "failed")
    assert not rig.engine_processes("a")
    refused = await rig.chat("a").end()
    assert refused.status == 503
    assert "power-cycle" in (refused.error or ""), refused.error
    assert await rig.say("b"), "the other GPU serves on"

    rig.box.heal_nvml(0)
    (kept,) = (await rig.get("/ledger?table=gpus&index=0"))["rows"]
    assert (kept["cordoned"], "power-cycle" in kept["cordon_reason"]) == (True, True), "a restart would know it, too"

    async def is_read_again() -> bool:
        lost, fine = await rig.get("/gpus")
        return (lost["health"], fine["health"]) == ("cordoned", "ok") and "power-cycle" in lost["reason"]

    await eventually(is_read_again, within_s=5, what="a cordon with its reason")
    assert (await rig.chat("a").end()).status == 503
    await rig.post("/gpus/0/uncordon")
    assert await rig.say("a")
    assert not [i for i in await rig.get("/incidents?open=true") if i["gpu"]]
    await rig.check()
