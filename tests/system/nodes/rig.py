"""Three machines on one: each has simulated devices and an agent process of its own; the service has no GPU."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from allocator.box import SimulatedBox
from rotator.agent.certs import make
from tests.system.service.rig import GIB, Rig, eventually, free_port

NODES = ("a", "b", "c")


class Node:
    """One machine: a box with one GPU of 20 GiB, shown, and an agent."""

    def __init__(self, folder: Path, name: str, tls: Path) -> None:
        self.name = name
        self.folder = folder / name
        self.box = SimulatedBox.create(self.folder / "box", devices=1, memory_bytes=20 * GIB, copy_gib_s=0)
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.tls = tls
        self.agent: subprocess.Popen[bytes] | None = None

    def start_agent(self) -> None:
        file = {
            "node": self.name,
            "host": "127.0.0.1",
            "port": self.port,
            "ca": str(self.tls / "ca.pem"),
            "cert": str(self.tls / f"{self.name}.pem"),
            "key": str(self.tls / f"{self.name}.key"),
            "token_file": str(self.tls / "token"),
        }
        path = self.folder / "agent.yaml"
        path.write_text(json.dumps(file))
        with (self.folder / "agent.log").open("ab") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "rotator.agent", "-c", str(path)],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.box.nvml_env()},
            )

    def kill_agent(self) -> None:
        assert self.agent is not None
        self.agent.kill()
        self.agent.wait()

    def entry(self) -> dict[str, Any]:
        """Its part of the fleet file."""
        files = {"ca": "ca.pem", "cert": "service.pem", "key": "service.key", "token_file": "token"}
        return {
            "name": self.name,
            "agent": self.url,
            **{k: str(self.tls / v) for k, v in files.items()},
            "host_memory_gib": 100,
        }


class NodesRig(Rig):
    """Engines are attached: started here, as whoever runs a node would. ``entries`` go into the fleet file."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, [], **settings)
        tls = folder / "tls"
        make(tls, {name: ["127.0.0.1"] for name in NODES})
        self.nodes = {name: Node(folder, name, tls) for name in NODES}
        self.entries: list[dict[str, Any]] = []
        self.ports: dict[str, int] = {}

    def write_fleet(self) -> Path:
        path = super().write_fleet()
        fleet = json.loads(path.read_text())
        fleet["devices"]["gpus"] = []
        fleet["nodes"] = [node.entry() for node in self.nodes.values()]
        fleet["engines"] = self.entries
        path.write_text(json.dumps(fleet, indent=1))
        return path

    async def start_engine(self, name: str, nodes: str, *, asleep: bool = False, **more: Any) -> None:
        """Start a stub on these nodes' GPUs (one letter each, the head first) and add it to the fleet file."""
        port = self.ports[name] = free_port()
        boxes = [self.nodes[node].box for node in nodes]
        if len(nodes) > 1:
            places = ",".join(str(box.path) for box in boxes)
            command = ["-m", "tests.system.nodes.spanning", name, str(port), places, "8", "4"]
        else:
            command = ["-m", "rotator.demo.engine", "--name", name, "--port", str(port)]
            command += ["--weights-gib", "8", "--kv-gib", "4", "--tokens-per-s", "100"]
        self._start(name, command, {**boxes[0].env(), "ROTATOR_ENGINE": name})
        self.entries.append(
            {
                "name": name,
                "launcher": "attach",
                "url": f"http://127.0.0.1:{port}",
                "gpus": [f"{node}/0" for node in nodes],
                "footprint": {"awake_gib": 13, "residue_gib": 1},
                **more,
            }
        )
        await eventually(lambda: self._is_up(port), what=lambda: (self.folder / f"{name}.log").read_text()[-2000:])
        if asleep:
            status, body = await self.call("POST", f"http://127.0.0.1:{port}/sleep?level=1")
            assert status == 200, body

    def _start(self, name: str, command: list[str], env: dict[str, str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **env},
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[3],
                start_new_session=True,
            )

    async def _is_up(self, port: int) -> bool:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/health") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    def processes(self, mark: str | None = None) -> set[int]:
        if mark is not None:
            return super().processes(mark)
        return {p for node in self.nodes.values() for p in super(NodesRig, self).processes(_box(node))}

    async def close(self) -> None:
        await super().close()
        await asyncio.sleep(0)
        for node in self.nodes.values():
            if node.agent is not None:
                node.agent.wait()

    async def sleeps(self, name: str) -> bool:
        """What the engine itself says, asked without the service."""
        told: Mapping[str, Any] = await self.get(f"http://127.0.0.1:{self.ports[name]}/is_sleeping")
        return bool(told["is_sleeping"])


def _box(node: Node) -> str:
    return f"ROTATOR_SIM_BOX={node.box.path}"
