"""Engines that can free by bytes hand KV cache over and keep their weights in VRAM."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.system.service.rig import Rig, engine, rig_up

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEIGHTS_GIB, KV_GIB = 4, 8  # of two engines the weights fit on the GPU together, the KV caches do not


def elastic(name: str) -> dict[str, object]:
    footprint = {"awake_gib": WEIGHTS_GIB + KV_GIB + 1, "residue_gib": 1, "kv_gib": KV_GIB}
    return engine(name, weights_gib=WEIGHTS_GIB, kv_gib=KV_GIB, elastic=True, footprint=footprint)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    async with rig_up(tmp_path_factory.mktemp("elastic"), [elastic("a"), elastic("b")]) as rig:
        yield rig


async def held_gib(rig: Rig, name: str) -> float:
    return float((await rig.view(name))["held_bytes"][0] / (1 << 30))


async def test_two_engines_swap_by_handing_over_kv_bytes_alone(rig: Rig) -> None:
    first = {name: await rig.say(name, "what is kept?", 20) for name in ("a", "b")}
    stream = await rig.chat("b", "a long story", 400).begun()
    again = await rig.say("a", "what is kept?", 20)
    view = await rig.view("b")
    assert (view["state"], view["depth"]) == ("asleep", "kv")
    assert WEIGHTS_GIB < await held_gib(rig, "b") < WEIGHTS_GIB + KV_GIB / 2  # no more was freed than was lacking
    told = await stream.end()
    assert (told.error, told.broken, told.done) == (None, None, True)
    assert told.text == await rig.say("b", "a long story", 400)
    assert {"a": again, "b": await rig.say("b", "what is kept?", 20)} == first
    rows = (await rig.get("/ledger?table=transitions&limit=200"))["rows"]
    sleeps = [row for row in rows if row["action"] == "sleep"]
    assert len(sleeps) >= 3
    for row in sleeps:
        step = next(s for s in row["plan"]["evict"] if s["engine"] == row["engine"])
        assert (step["level"], step["depth"]) == (0, "kv")
        assert "KV cache first" in row["reason"]
    await rig.check()


async def test_an_engine_that_kept_its_weights_is_adopted_after_the_service_was_killed(rig: Rig) -> None:
    before = [await rig.say("a"), await rig.say("b")]
    await rig.until_state("a", "asleep")
    pid = await rig.pid("a")
    await rig.restart()
    await rig.until_state("a", "asleep")
    assert [await rig.say("a"), await rig.say("b")] == before
    assert await rig.pid("a") == pid
    await rig.check()
