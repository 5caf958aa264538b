"""What an agent tells, whom it lets in, and what it never does."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from rotator.adapters.agents import AgentRefused, Agents
from rotator.adapters.fleet_devices import FleetDevices, FleetReports
from rotator.adapters.gpu_reports import NvmlReports
from rotator.adapters.machine import package_versions, unequal
from rotator.agent.certs import make
from rotator.agent.settings import AgentConfig
from rotator.config import ConfigError
from rotator.config_nodes import NodeConfig
from rotator.core.gpu_faults import GpuHealth
from rotator.ports import DeviceError, DeviceTimeout, NodeError
from rotator.ports_nodes import TOKEN_HEADER, pid_of_node, pid_there
from tests.contract.agent.conftest import GIB, Running, agent_up, engine_up

SOON_S = 5.0


async def test_gpus_of_a_node_are_known_by_its_name_and_their_processes_by_its_number(
    agent: Running, agents: Agents
) -> None:
    devices = FleetDevices(None, agents)
    (info,) = await devices.inventory(deadline_s=SOON_S)
    assert (info.id, info.node, info.compute_capability) == ("n/GPU-x", "n", (12, 0))
    reading = await devices.read("n/GPU-x", deadline_s=SOON_S)
    assert reading.by_pid == {pid_of_node(1, 4711): 5 * GIB}
    assert [pid_there(pid) for pid in reading.by_pid] == [4711]
    agent.devices.by_pid = None
    assert (await devices.read("n/GPU-x", deadline_s=SOON_S)).by_pid is None


async def test_what_a_gpu_reports_of_itself_is_told_of_other_nodes_too(agents: Agents) -> None:
    told = await FleetReports(NvmlReports(), agents).health("n/GPU-x", deadline_s=SOON_S)
    assert told == GpuHealth("n/GPU-x", xids=(79, 48), ecc_uncorrected=3, remap_pending=True)
    with pytest.raises(DeviceError, match="there is no GPU GPU-y here"):
        await FleetReports(NvmlReports(), agents).health("n/GPU-y", deadline_s=SOON_S)


async def test_a_gpu_that_hangs_there_hangs_here_and_one_that_fails_fails(agent: Running, agents: Agents) -> None:
    devices = FleetDevices(None, agents)
    agent.devices.error = DeviceTimeout("GPU-x: the driver did not answer")
    with pytest.raises(DeviceTimeout, match="the driver did not answer"):
        await devices.read("n/GPU-x", deadline_s=SOON_S)
    agent.devices.error = DeviceError("GPU-x: fell off the bus")
    with pytest.raises(DeviceError, match="fell off the bus"):
        await devices.read("n/GPU-x", deadline_s=SOON_S)


async def test_a_node_is_looked_at_and_its_loss_and_return_are_news_once(tls: Path) -> None:
    async with agent_up(tls) as running:
        agents = Agents([running.node()])
        (first,) = await agents.look(deadline_s=SOON_S)
        assert first.reachable
        assert first.host_bytes > 0
        assert first.boot_id
        assert await agents.look(deadline_s=SOON_S) == ()
    (lost,) = await agents.look(deadline_s=SOON_S)
    assert not lost.reachable
    assert lost.host_bytes == first.host_bytes
    assert await agents.look(deadline_s=SOON_S) == ()
    await agents.close()


async def test_an_agent_that_calls_itself_otherwise_is_not_believed(agent: Running) -> None:
    agents = Agents([agent.node(name="m")])
    (told,) = await agents.look(deadline_s=SOON_S)
    assert not told.reachable
    assert "is the agent of 'n'" in told.reason
    await agents.close()


async def test_nobody_comes_in_with_another_token(agent: Running, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("another-token-of-the-same-length-as-ours-is")
    agents = Agents([agent.node(token_file=tmp_path / "token")])
    with pytest.raises(AgentRefused, match="401"):
        await agents.host("n", deadline_s=SOON_S)
    await agents.close()


async def test_nobody_comes_in_without_a_certificate_of_our_authority(agent: Running, tmp_path: Path) -> None:
    make(tmp_path, {"n": ["127.0.0.1"]})
    foreign = agent.node(cert=tmp_path / "service.pem", key=tmp_path / "service.key")
    agents = Agents([foreign, agent.node(name="mistrusted", agent="https://localhost:1", ca=tmp_path / "ca.pem")])
    with pytest.raises(NodeError):
        await agents.host("n", deadline_s=SOON_S)
    await agents.close()
    bare = aiohttp.TCPConnector(ssl=False)
    token = {TOKEN_HEADER: (agent.tls / "token").read_text().strip()}
    async with aiohttp.ClientSession(connector=bare) as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"https://127.0.0.1:{agent.port}/v1/node", headers=token)


async def test_the_service_talks_to_no_agent_of_another_authority(agent: Running, tmp_path: Path) -> None:
    make(tmp_path, {})
    agents = Agents([agent.node(ca=tmp_path / "ca.pem")])
    with pytest.raises(NodeError, match="is not signed by"):
        await agents.host("n", deadline_s=SOON_S)
    await agents.close()


async def test_what_an_engine_left_is_found_by_its_mark_and_ended_with_its_children(agents: Agents) -> None:
    program = "import subprocess, time; subprocess.Popen(['sleep', '60']); print(flush=True); time.sleep(60)"
    mine = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, env={**os.environ, "ROTATOR_ENGINE": "glm/agent-test"}, stdout=subprocess.PIPE
    )
    try:
        assert mine.stdout is not None
        await mine.stdout.readline()
        found = (await agents.processes("glm/agent-test", ["n"], deadline_s=SOON_S))["n"]
        assert len(found) == 2
        assert mine.pid in {one.pid for one in found}
        assert (await agents.processes("glm/agent-other", ["n", ""], deadline_s=SOON_S)) == {"n": (), "": ()}
        pids = await agents.pids("glm/agent-test", ["n"], deadline_s=SOON_S)
        assert pid_of_node(1, mine.pid) in pids
        assert (await agents.kill("glm/agent-test", ["n"], grace_s=1.0, deadline_s=SOON_S)) == {"n": ()}
        assert await mine.wait() < 0
    finally:
        if mine.returncode is None:
            mine.kill()


async def test_versions_are_read_without_running_anything(tls: Path, tmp_path: Path) -> None:
    site = tmp_path / "env/lib/python3.12/site-packages"
    for name, version in (("torch", "2.11.0"), ("nvidia_nccl_cu13", "2.28.9"), ("flashinfer_python", "0.5.3")):
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
        (site / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    assert package_versions(tmp_path / "env") == {"torch": "2.11.0", "nccl": "2.28.9", "flashinfer": "0.5.3"}
    async with agent_up(tls, environments={"default": tmp_path / "env"}) as running:
        agents = Agents([running.node()])
        told = await agents.versions(["n"], deadline_s=SOON_S)
        assert told["n"]["nccl"] == "2.28.9"
        with pytest.raises(AgentRefused, match=r"names no environment '\.\./etc'"):
            await agents.versions(["n"], "../etc", deadline_s=SOON_S)
        await agents.close()
    (line,) = unequal({"n": told["n"], "m": {**told["n"], "nccl": "2.27.0"}})
    assert line == "nccl differs: 2.28.9 on n, 2.27.0 on m: install the same on all"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/engines", {"engine": "glm", "port": 80}, 422),
        ("/v1/engines", {"engine": "glm", "port": 8001, "host": "10.0.0.1"}, 422),
        ("/v1/engines", {"engine": "../glm", "port": 8001}, 422),
        ("/v1/engines", {"engine": "x" * 70_000, "port": 8001}, 413),
    ],
)
async def test_no_host_nor_odd_name_nor_large_body_is_taken(
    agents: Agents, path: str, body: dict[str, object], status: int
) -> None:
    with pytest.raises(AgentRefused) as refused:
        await agents.call("n", "PUT", path, body=body, deadline_s=SOON_S)
    assert refused.value.status == status


async def test_the_agents_own_port_is_no_engine(agent: Running, agents: Agents) -> None:
    with pytest.raises(AgentRefused, match="the agent's own"):
        await agents.call("n", "PUT", "/v1/engines", body={"engine": "e", "port": agent.port}, deadline_s=SOON_S)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"host": "0.0.0.0"}, "is not loopback: give ca, cert and key"),
        ({"ca": "ca.pem"}, "give all of ca, cert and key, or none"),
        ({"engines": {"glm": 70_000}}, "70000 is no port"),
    ],
)
def test_an_agents_file_that_is_unsafe_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        AgentConfig.model_validate({"node": "n", "token_file": "token", **change})


def test_certificates_are_made_once_and_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    written = make(tmp_path / "tls", {"gpu2": ["10.0.0.2", "gpu2.lan"]})
    assert {p.name for p in written} >= {"ca.pem", "ca.key", "service.pem", "gpu2.pem", "gpu2.key", "token"}
    assert all(p.stat().st_mode & 0o077 == 0 for p in written)
    assert make(tmp_path / "tls", {"gpu2": ["10.0.0.2"]}) == []
    assert {p.name for p in make(tmp_path / "tls", {"gpu3": ["10.0.0.3"]})} == {"gpu3.pem", "gpu3.key"}
    (tmp_path / "tls/ca.key").unlink()
    with pytest.raises(ConfigError, match=r"only one of ca\.pem and ca\.key"):
        make(tmp_path / "tls", {"gpu4": ["10.0.0.4"]})


async def test_an_engine_declared_during_a_look_is_told_at_the_next(agent: Running) -> None:
    agents = Agents([agent.node()])
    for number in range(3):
        agents.declare("n", f"e{number}", 9000 + number)
    looking = asyncio.create_task(agents.look(deadline_s=SOON_S))
    while "e0" not in await known_there(agents):
        pass
    agents.declare("n", "late", 9100)
    await looking
    await agents.look(deadline_s=SOON_S)
    assert (await known_there(agents))["late"] == 9100
    assert agents.known("n").reachable
    await agents.close()


async def test_an_engine_that_an_agent_will_not_take_costs_neither_the_node_nor_the_others(
    agent: Running, agents: Agents
) -> None:
    agents.declare("n", "bad", agent.port)
    agents.declare("n", "good", 9001)
    (record,) = await agents.look(deadline_s=SOON_S)
    assert record.reachable
    assert await known_there(agents) == {"good": 9001}


async def known_there(agents: Agents) -> dict[str, int]:
    told: dict[str, int] = (await agents.call("n", "GET", "/v1/node", deadline_s=SOON_S))["engines"]
    return told


@pytest.mark.parametrize("told", ["{}", "[]", "null", '{"processes": 1, "left": [{}], "host": {}, "default": 3}'])
async def test_an_answer_of_another_shape_is_a_nodes_error_and_nothing_else(tmp_path: Path, told: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=told)

    (tmp_path / "token").write_text("t" * 40)
    async with engine_up(answer) as port:
        files = {"token_file": tmp_path / "token"}
        node = NodeConfig.model_validate({"name": "n", "agent": f"http://127.0.0.1:{port}", **files})
        agents = Agents([node])
        asks: list[Coroutine[Any, Any, object]] = [
            agents.processes("e", ["n"], deadline_s=SOON_S),
            agents.kill("e", ["n"], grace_s=0, deadline_s=SOON_S),
            agents.host("n", deadline_s=SOON_S),
            agents.answers("e", "n", deadline_s=SOON_S),
            agents.pids("e", ["n"], deadline_s=SOON_S),
        ]
        for ask in asks:
            with pytest.raises(NodeError, match="another release"):
                await ask
        (looked,) = await agents.look(deadline_s=SOON_S)
        assert "another release" in looked.reason
        await agents.close()
