"""One service, three machines: engines of different nodes take turns, one spans all, an agent is killed and back."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.system.nodes.rig import NodesRig
from tests.system.service.rig import eventually


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[NodesRig]:
    # This machine's own RAM counts for no other node.
    rig = NodesRig(tmp_path, host_memory_gib=1, devices={"sample_every_s": 0.5}, page={"enabled": False})
    try:
        for node in rig.nodes.values():
            node.start_agent()
        await rig.start_engine("wide", "abc", asleep=True)
        await asyncio.gather(rig.start_engine("on-b", "b"), rig.start_engine("on-c", "c"))
        await rig.serve()
        yield rig
    finally:
        await rig.close()


async def test_engines_of_three_nodes_take_turns_and_a_lost_agent_stops_only_its_own_node(rig: NodesRig) -> None:
    await rig.until_state("wide", "asleep")
    await rig.until_state("on-b", "awake")
    await rig.until_state("on-c", "awake")
    ids = [g["id"] for g in await rig.get("/gpus")]
    assert [id.partition("/")[0] for id in ids] == ["a", "b", "c"]

    # An engine on three nodes is wanted: both engines in its way, on two of them, yield.
    assert await rig.say("wide", tokens=6)
    assert [await rig.state(n) for n in ("wide", "on-b", "on-c")] == ["awake", "asleep", "asleep"]
    assert [await rig.sleeps(n) for n in ("wide", "on-b", "on-c")] == [False, True, True]
    # A swap between engines of different nodes: one on b is wanted, the one that spans all yields everywhere.
    assert await rig.say("on-b", stream=True)
    assert [await rig.state(n) for n in ("wide", "on-b")] == ["asleep", "awake"]
    check = await rig.get("/ledger/check")
    assert check["matches"], check

    # The ledger knows the machines.
    nodes = {row["name"]: row for row in (await rig.get("/ledger?table=nodes"))["rows"]}
    assert {n: row["reachable"] for n, row in nodes.items()} == {"a": True, "b": True, "c": True}
    assert {row["node"] for row in (await rig.get("/ledger?table=gpus"))["rows"]} == {"a", "b", "c"}

    # A GPU of another node is named as in the fleet file.
    assert (await rig.post("/gpus/c/0/cordon", reason="fan"))["health"] == "cordoned"
    assert (await rig.post("/gpus/c/0/uncordon"))["id"] == next(id for id in ids if id.startswith("c/"))

    # A killed agent makes its node's GPU unknown; serving on other nodes goes on.
    assert await rig.say("on-c")
    rig.nodes["b"].kill_agent()
    await rig.events.wait("node.lost")
    await eventually(lambda: _unknown(rig, "b"), what="an unknown GPU on b")
    assert await rig.say("on-c")
    assert await rig.state("on-b") == "awake"  # nobody can ask it: that says nothing about it
    answer = await rig.chat("on-b", **{"x-rotator-deadline-s": "1"}).end()
    assert answer.status in (502, 503, 504)
    assert not answer.claims_to_be_complete

    # And it comes back with what it knew: engines' places are told to it again, nothing was restarted.
    starts = (await rig.view("on-b"))["pids"]
    rig.nodes["b"].start_agent()
    await rig.events.wait("node.back")
    assert await rig.say("on-b")
    assert (await rig.view("on-b"))["pids"] == starts
    assert await rig.say("wide")

    # The service is killed while a node is away: it starts all the same, from what the ledger knows of that node.
    rig.nodes["b"].kill_agent()
    await rig.kill()
    await rig.serve()
    assert (await rig.state("on-b")) != "awake"
    await rig.until_state("on-c", "asleep", "awake")
    rig.nodes["b"].start_agent()
    await rig.until_state("on-b", "asleep", "awake")
    await rig.until_state("wide", "asleep", "awake")
    assert await rig.say("on-b")


async def _unknown(rig: NodesRig, node: str) -> bool:
    return [g["id"].partition("/")[0] for g in await rig.get("/gpus") if g["health"] == "unknown"] == [node]
