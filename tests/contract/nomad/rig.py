"""A launcher as the service has it, over the double."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotator.adapters.nomad import NomadLauncher, connect
from rotator.adapters.nomad_files import JobText, Render
from rotator.adapters.nomad_job import var_file
from rotator.adapters.nomad_nodes import Agents
from rotator.config_nomad import NomadConfig
from rotator.ports import JobSpec, LauncherNews, LaunchError, LaunchSpec
from tests.nomad_double import NomadDouble
from tests.nomad_double.sample import HCL, sample_job


@dataclass
class Rig:
    nomad: NomadDouble
    launcher: NomadLauncher
    folder: Path
    news: list[LauncherNews] = field(default_factory=list)

    def spec(
        self, engine: str = "a", port: int = 8001, *, note: str = "", nodes: tuple[str, ...] = ("",), **job: Any
    ) -> LaunchSpec:
        """An engine whose job the double knows. ``job`` is as for ``sample_job``."""
        path = self.folder / "engine.nomad.hcl"
        path.write_text(HCL)
        variables = {"job_id": f"vllm-{engine}", "port": str(port), "note": note}
        self.nomad.teach(HCL, var_file(variables), sample_job(f"vllm-{engine}", port=port, note=note, **job))
        log = str(self.folder / f"{engine}.log")
        made = JobSpec(file=str(path), variables=variables)
        url = f"http://127.0.0.1:{port}"
        return LaunchSpec(engine, "nomad", (), {}, url, log, job=made, nodes=nodes)

    def said(self, kind: str) -> list[str]:
        return [n.text for n in self.news if n.kind == kind]

    async def until_said(self, kind: str) -> str:
        await eventually(lambda: bool(self.said(kind)), lambda: f"{kind}: {self.news}")
        return self.said(kind)[-1]

    def alloc(self, job_id: str = "vllm-a") -> dict[str, Any]:
        return self.nomad.cluster.of_job(job_id)[-1]


def render_nothing(site: Path, name: str) -> JobText:
    raise LaunchError(f"{site} has no {name}")


@contextlib.asynccontextmanager
async def rig_up(
    folder: Path,
    *,
    token: str = "",
    agents: Agents | None = None,
    service: str = "svc",
    render: Render | None = None,
    **settings: Any,
) -> AsyncIterator[Rig]:
    async with NomadDouble(folder / "nomad", token=token, heartbeat_s=0.2) as nomad:
        news: list[LauncherNews] = []
        launcher = second(nomad, news, token=token, agents=agents, service=service, render=render, **settings)
        try:
            yield Rig(nomad, launcher, folder, news)
        finally:
            await launcher.close()


def second(
    nomad: NomadDouble,
    news: list[LauncherNews],
    *,
    token: str = "",
    agents: Agents | None = None,
    service: str = "svc",
    render: Render | None = None,
    **settings: Any,
) -> NomadLauncher:
    """A launcher of another life of the service, or of another service."""
    config = NomadConfig.model_validate(
        {"address": nomad.address, "deadline_s": 2, "place_deadline_s": 2, "resync_s": 5, **settings}
    )
    environ = {"NOMAD_TOKEN": token, "NOMAD_ADDR": "http://127.0.0.1:1"}
    return connect(config, environ, service, told=news.append, render=render or render_nothing, agents=agents)


async def eventually(
    condition: Callable[[], bool], what: Callable[[], str] = lambda: "it", within_s: float = 10.0
) -> None:
    try:
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110 - looked at from outside: nobody sets an event
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"did not happen within {within_s} s: {what()}") from None
