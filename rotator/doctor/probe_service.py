"""The ledger, ports, Nomad and the other nodes. Blocking where not async."""

import asyncio
import contextlib
import os
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy

from rotator.adapters import ledger_file
from rotator.adapters.agents import Agents
from rotator.adapters.ledger_database import head_revision, parse
from rotator.adapters.loopback import listeners, process_name
from rotator.adapters.nomad_access import access_of
from rotator.adapters.nomad_client import NomadClient
from rotator.adapters.nomad_words import diff_lines
from rotator.adapters.proctable import read_marks
from rotator.check.planned import ledger_url
from rotator.config import EngineConfig, FleetConfig
from rotator.doctor.facts import LedgerFacts, NodeFacts, NomadFacts, NomadNode, Port, PortFacts, is_here
from rotator.jobs.findings import JobsError
from rotator.jobs.render import render_text
from rotator.ports import LaunchError, LedgerError, NodeError

NODE_S = 8.0
_NS = 1e9


# -- ledger ------------------------------------------------------------------------------------------------------------


def read_ledger(fleet: FleetConfig) -> LedgerFacts:
    url = ledger_url(fleet)
    folders = tuple(_folders(fleet))
    try:
        path = ledger_file.sqlite_path(url)
    except LedgerError as e:
        return LedgerFacts(url, is_file=False, unreadable=str(e), folders=folders)
    if path is None:
        return LedgerFacts(_without_password(url), is_file=False, folders=folders, unreadable=_database_problem(url))
    state = ledger_file.look(path)
    return LedgerFacts(
        str(path),
        exists=state.exists,
        bytes=state.bytes,
        schema=state.schema,
        schema_known=state.schema_known,
        schema_head=head_revision(),
        held_by=state.held_by,
        damage=state.damage,
        unreadable=state.unreadable,
        newest_wall_s=state.newest_wall_s,
        free_bytes=_free(path.parent),
        folders=folders,
    )


def _folders(fleet: FleetConfig) -> list[tuple[str, str]]:
    found = []
    for folder in (fleet.state_dir, fleet.state_dir / "logs"):
        if not folder.exists():
            found.append((str(folder), "missing"))
        elif not folder.is_dir():
            found.append((str(folder), "it is no folder"))
        elif not os.access(folder, os.W_OK | os.X_OK):
            found.append((str(folder), "nothing can be written there by this user"))
    return found


def _free(folder: Path) -> int | None:
    """Of the nearest folder that is there already."""
    with contextlib.suppress(OSError, StopIteration):
        return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    return None


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url


def _database_problem(url: str) -> str:
    try:
        engine = sqlalchemy.create_engine(parse(url))
        with engine.connect():
            return ""
    except (LedgerError, sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError, OSError) as e:
        return str(e).splitlines()[0]


# -- ports -------------------------------------------------------------------------------------------------------------


def read_ports(fleet: FleetConfig, service_pid: int | None) -> PortFacts:
    """The service's port, those that engines are given by the file, and those that the ledger keeps for them."""
    found = [_port(fleet.bind.port, "bind")] if fleet.bind.port else []
    kept = kept_ports(fleet)
    own = (e for e in fleet.engines if is_here(e) and e.launcher == "process")
    found += [_port(port, e.name, kept=e.port is None) for e in own if (port := e.port or kept.get(e.name))]
    return PortFacts(tuple(found), service_pid)


def _port(port: int, of: str, *, kept: bool = False) -> Port:
    pid = min(listeners(port), default=None)
    if pid is None:
        return Port(port, of, kept=kept)
    marks = read_marks(pid)
    return Port(port, of, f"process {pid} ({process_name(pid) or '?'})", marks.engine if marks else "", kept)


def kept_ports(fleet: FleetConfig) -> Mapping[str, int]:
    """Ports of engines' URLs in a SQLite ledger."""
    with contextlib.suppress(LedgerError, sqlite3.Error, OSError):
        path = ledger_file.sqlite_path(ledger_url(fleet))
        if path is not None and path.is_file():
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0)) as db:
                rows = db.execute("SELECT engine, url FROM engines WHERE launcher = 'process' AND url != ''").fetchall()
            return {str(name): port for name, url in rows if (port := urlsplit(str(url)).port)}
    return {}


# -- Nomad -------------------------------------------------------------------------------------------------------------


def nomad_node(node: Mapping[str, Any]) -> NomadNode:
    """A node as ``GET /v1/node/<id>`` tells it."""
    attributes: Mapping[str, Any] = node.get("Attributes") or {}
    drivers: Mapping[str, Any] = node.get("Drivers") or {}
    docker = drivers.get("docker") or {}
    volumes = attributes.get("driver.docker.volumes.enabled")
    runtimes = str(attributes.get("driver.docker.runtimes") or "")
    kill = (node.get("NodeMaxKillTimeout") or attributes.get("client.max_kill_timeout")) or None
    return NomadNode(
        name=str(node.get("Name") or ""),
        id=str(node.get("ID") or ""),
        status=str(node.get("Status") or "unknown"),
        eligible=node.get("SchedulingEligibility") != "ineligible",
        docker=bool(docker.get("Healthy")) if docker else str(attributes.get("driver.docker", "")) in ("1", "true"),
        volumes=None if volumes is None else str(volumes).lower() in ("1", "true"),
        runtimes=tuple(r.strip() for r in runtimes.split(",") if r.strip()),
        host_networks=tuple(sorted(node.get("HostNetworks") or {})),
        max_kill_timeout_s=float(kill) / _NS if isinstance(kill, int | float) else None,
    )


async def read_nomad(fleet: FleetConfig) -> NomadFacts | None:
    """None where no engine is Nomad's."""
    jobs = [e for e in fleet.engines if e.launcher == "nomad"]
    if not jobs:
        return None
    access = access_of(fleet.nomad, os.environ)
    client = NomadClient(access, deadline_s=fleet.nomad.deadline_s)
    try:
        await client.leader()
        stubs = await client.nodes()
        whole = await asyncio.gather(*(client.node(str(stub["ID"])) for stub in stubs))
        drifts = await asyncio.gather(*(_drift(client, e) for e in jobs if e.job is not None and e.job.site))
    except LaunchError as e:
        return NomadFacts(access.address, str(e))
    finally:
        await client.close()
    nodes = tuple(nomad_node(node) for node in whole if node is not None)
    return NomadFacts(access.address, "", nodes, max(e.stop_grace_s for e in jobs), tuple(drifts))


async def _drift(client: NomadClient, engine: EngineConfig) -> tuple[str, tuple[str, ...], str]:
    """How the registered job differs from what its recipe makes now. One that is not registered differs in nothing."""
    if engine.job is None or engine.job.site is None:
        return engine.name, (), ""
    try:
        hcl, variables = await asyncio.to_thread(render_text, engine.job.name or engine.name, engine.job.site)
        job = await client.parse(hcl, variables)
        if await client.job(str(job["ID"])) is None:
            return engine.name, (), ""
        return engine.name, diff_lines((await client.plan(job)).diff), ""
    except (LaunchError, JobsError) as e:
        return engine.name, (), str(e)


# -- nodes -------------------------------------------------------------------------------------------------------------


async def read_nodes(fleet: FleetConfig) -> NodeFacts | None:
    """Versions that each node's agent tells. None where the fleet is one machine."""
    if not fleet.nodes:
        return None
    agents = Agents(fleet.nodes)
    names = [node.name for node in fleet.nodes]
    try:
        told = await asyncio.gather(*(_versions(agents, name) for name in names))
    finally:
        await agents.close()
    versions = {name: found for name, found in zip(names, told, strict=True) if isinstance(found, dict)}
    errors = {name: found for name, found in zip(names, told, strict=True) if isinstance(found, str)}
    return NodeFacts(versions, errors)


async def _versions(agents: Agents, node: str) -> dict[str, str] | str:
    """What it says, or why it does not."""
    try:
        return (await agents.versions((node,), deadline_s=NODE_S))[node]
    except NodeError as e:
        return str(e)
