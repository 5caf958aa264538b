"""Machines and their GPUs in the ledger."""

from rotator.adapters.ledger import SqlLedger
from rotator.ports import GpuInfo, NodeRecord


async def test_a_restart_knows_the_nodes_and_gpus_that_an_earlier_life_saw(ledger: SqlLedger) -> None:
    here = GpuInfo("GPU-a", 0, "card", 96 << 30, (12, 0), "0000:01:00.0")
    there = GpuInfo("gpu2/GPU-a", 0, "card", 96 << 30, (12, 1), "0000:01:00.0", unified_memory=True, node="gpu2")
    node = NodeRecord("gpu2", "https://10.0.0.2:8411", "boot-1", 128 << 30, True, "", 1_000.0)
    await ledger.put_gpus([here, there])
    await ledger.put_node(node)
    found = await ledger.recover()
    assert set(found.gpus) == {here, there}
    assert found.nodes == (node,)


async def test_a_node_that_was_lost_keeps_what_was_known_of_it(ledger: SqlLedger) -> None:
    node = NodeRecord("gpu2", "https://10.0.0.2:8411", "boot-1", 128 << 30, True, "", 1_000.0)
    await ledger.put_node(node)
    await ledger.put_node(NodeRecord("gpu2", node.agent, "boot-1", 128 << 30, False, "no connection to it", 1_000.0))
    (row,) = (await ledger.query("nodes", filters={"reachable": "false"})).rows
    assert (row["name"], row["reason"], row["host_bytes"]) == ("gpu2", "no connection to it", 128 << 30)


async def test_gpus_of_a_ledger_without_nodes_are_of_the_services_own_machine(ledger: SqlLedger) -> None:
    await ledger.put_gpus([GpuInfo("GPU-a", 0, "card", 1)])
    assert [row["node"] for row in (await ledger.query("gpus", filters={})).rows] == [""]
