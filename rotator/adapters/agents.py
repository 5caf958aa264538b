"""Other machines through their agents: memory, processes, package versions, and the way to engines there."""

import asyncio
import contextlib
import json
import logging
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import aiohttp

from rotator.adapters.host import read_host_memory
from rotator.adapters.machine import Machine, Seen
from rotator.config import ConfigError
from rotator.config_nodes import NodeConfig
from rotator.core.values import EngineName
from rotator.ports import HostMemory, LaunchError, NodeError, NodeRecord
from rotator.ports_nodes import HERE, Door, pid_of_node

_log = logging.getLogger(__name__)
CONNECTIONS_MAX = 256
ANSWER_BYTES_MAX = 4 << 20
CONNECT_S = 2.0


class AgentRefused(NodeError):
    """The agent answered with an error. ``status`` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class _Node:
    config: NodeConfig
    number: int
    door: Door
    record: NodeRecord
    instance: str = ""
    declared: dict[EngineName, int] = field(default_factory=dict)


class Agents:
    """For one event loop. Works without nodes too: then there is only this machine, node ""."""

    def __init__(self, nodes: Sequence[NodeConfig] = (), wall: Callable[[], float] = time.time) -> None:
        """Raises ConfigError where certificates or tokens cannot be read."""
        self._wall = wall
        self._here = Machine()
        self._session: aiohttp.ClientSession | None = None
        self._nodes = {
            node.name: _Node(node, number, open_door(node), NodeRecord(node.name, node.url, reason="not asked yet"))
            for number, node in enumerate(nodes, 1)
        }

    # -- the port ----------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._nodes)

    def known(self, node: str) -> NodeRecord:
        return self._nodes[node].record

    def remember(self, records: Sequence[NodeRecord]) -> None:
        for record in records:
            if (node := self._nodes.get(record.name)) is not None:
                old = replace(record, agent=node.config.url, reachable=False, reason="not asked yet")
                node.record = old if not node.record.seen_at_wall_s else node.record

    async def look(self, *, deadline_s: float) -> tuple[NodeRecord, ...]:
        changed = await asyncio.gather(*(self._look(node, deadline_s) for node in self._nodes.values()))
        return tuple(record for record in changed if record is not None)

    async def host(self, node: str, *, deadline_s: float) -> HostMemory:
        if node == HERE:
            return read_host_memory()
        told = await self.call(node, "GET", "/v1/node", deadline_s=deadline_s)
        with _understood(node):
            host = told["host"]
            return HostMemory(int(host["total_bytes"]), int(host["available_bytes"]))

    def declare(self, node: str, engine: EngineName, port: int) -> str:
        known = self._nodes[node]
        if known.declared.get(engine) != port:
            known.declared[engine] = port
            known.instance = ""  # it is told at the next look
        return f"{known.config.url}/engines/{quote(engine, safe='')}"

    def forget(self, engine: EngineName) -> None:
        for node in self._nodes.values():
            node.declared.pop(engine, None)

    # -- for launchers -----------------------------------------------------------------------------------------------

    async def processes(
        self, engine: EngineName, nodes: Sequence[str] = (HERE,), *, job: str = "", deadline_s: float
    ) -> dict[str, tuple[Seen, ...]]:
        """What is left of an engine, by node. Raises NodeError where one of them cannot tell: that is never "none"."""
        found = await asyncio.gather(*(self._processes(engine, node, job, deadline_s) for node in nodes))
        return dict(zip(nodes, found, strict=True))

    async def kill(
        self, engine: EngineName, nodes: Sequence[str] = (HERE,), *, job: str = "", grace_s: float, deadline_s: float
    ) -> dict[str, tuple[Seen, ...]]:
        """End what carries the engine's mark on these nodes, with all it started; returns what would not go."""
        left = await asyncio.gather(*(self._kill(engine, node, job, grace_s, deadline_s) for node in nodes))
        return dict(zip(nodes, left, strict=True))

    async def versions(
        self, nodes: Sequence[str], environment: str = "default", *, deadline_s: float
    ) -> dict[str, dict[str, str]]:
        """Package versions of the environment that each agent's own file names so, by node. Raises NodeError."""
        query = {"environment": environment}
        told = await asyncio.gather(
            *(self.call(node, "GET", "/v1/versions", query=query, deadline_s=deadline_s) for node in nodes)
        )
        versions: dict[str, dict[str, str]] = {}
        for node, found in zip(nodes, told, strict=True):
            with _understood(node):
                versions[node] = {str(k): str(v) for k, v in found.items()}
        return versions

    async def pids(self, engine: EngineName, nodes: Sequence[str], *, deadline_s: float) -> frozenset[int]:
        """Its process ids as readings tell them; empty where a node of it shows none, as then nobody can tell whose
        bytes those there are. Raises NodeError."""
        found = await self.processes(engine, nodes, deadline_s=deadline_s)
        if not all(found.values()):
            return frozenset()
        return frozenset(pid_of_node(self.number(node), one.pid) for node, seen in found.items() for one in seen)

    async def answers(self, engine: EngineName, node: str, *, deadline_s: float) -> str:
        """``yes``, ``refused`` or ``silent``: what a connection to its port there meets. Raises NodeError."""
        told = await self.call(node, "GET", "/v1/engine", query={"engine": engine}, deadline_s=deadline_s)
        with _understood(node):
            return str(told["answers"])

    def number(self, node: str) -> int:
        """The node's number in process ids; 0 is this machine."""
        return self._nodes[node].number if node in self._nodes else 0

    def place(self, url: str) -> str | None:
        """The node through whose agent this URL leads; None for one that needs no agent."""
        return next((n.config.name for n in self._nodes.values() if _is_below(url, n.config.url)), None)

    def door(self, url: str) -> Door | None:
        """What its agent wants to see, for URLs that lead through one."""
        return next((n.door for n in self._nodes.values() if _is_below(url, n.config.url)), None)

    # -- asking ------------------------------------------------------------------------------------------------------

    async def call(
        self,
        node: str,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        deadline_s: float,
    ) -> Any:
        """Ask a node's agent. Raises NodeError, which for an answer that is an error is AgentRefused."""
        known = self._nodes.get(node)
        if known is None:
            raise NodeError(f"there is no node '{node}' in the fleet file")
        try:
            async with asyncio.timeout(deadline_s):
                status, raw = await self._ask(known, method, path, query, body)
            told = json.loads(raw)
        except TimeoutError:
            raise NodeError(f"node {node}: its agent did not answer within {deadline_s:g} s") from None
        except (aiohttp.ClientError, OSError) as e:
            raise NodeError(f"node {node}: {_in_words(e, known.config)}") from None
        except ValueError:
            raise NodeError(
                f"node {node}: {known.config.url} answered with what is no JSON: is it its agent?"
            ) from None
        if status >= 400:
            raise AgentRefused(f"node {node}: its agent answered {status}: {_reason(told)}", status)
        return told

    async def _ask(
        self, node: _Node, method: str, path: str, query: Mapping[str, str] | None, body: Mapping[str, Any] | None
    ) -> tuple[int, bytes]:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=CONNECTIONS_MAX, keepalive_timeout=10)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        tls: ssl.SSLContext | bool = node.door.tls or True
        async with self._session.request(
            method,
            node.config.url + path,
            params=query,
            json=body,
            headers=node.door.headers,
            ssl=tls,
            allow_redirects=False,
        ) as response:
            raw = await response.content.read(ANSWER_BYTES_MAX)
            while chunk := await response.content.read(ANSWER_BYTES_MAX):
                raw += chunk
                if len(raw) > ANSWER_BYTES_MAX:
                    raise ValueError("too large")
            return response.status, raw

    async def _look(self, node: _Node, deadline_s: float) -> NodeRecord | None:
        name = node.config.name
        try:
            told = await self.call(name, "GET", "/v1/node", deadline_s=deadline_s)
            with _understood(name):
                is_named, instance = str(told["node"]), str(told["instance"])
                now = replace(
                    node.record,
                    boot_id=str(told["boot_id"]),
                    host_bytes=int(told["host"]["total_bytes"]),
                    reachable=True,
                    reason="",
                    seen_at_wall_s=self._wall(),
                )
            if is_named != name:
                raise NodeError(f"node {name}: {node.config.url} is the agent of '{is_named}': correct 'agent'")
            if instance != node.instance:
                await self._declare(node, instance, deadline_s)
        except NodeError as e:
            now = replace(node.record, reachable=False, reason=str(e))
        before, node.record = node.record, now
        return now if replace(before, seen_at_wall_s=0.0) != replace(now, seen_at_wall_s=0.0) else None

    async def _declare(self, node: _Node, instance: str, deadline_s: float) -> None:
        """Tell all engines. One that is declared meanwhile is told at the next look."""
        telling = dict(node.declared)
        for engine, port in telling.items():
            body = {"engine": engine, "port": port}
            try:
                await self.call(node.config.name, "PUT", "/v1/engines", body=body, deadline_s=deadline_s)
            except AgentRefused as e:  # its start fails for it; the node and the other engines are well
                _log.error("engine '%s' was not taken: %s", engine, e)
        if telling == node.declared:
            node.instance = instance

    async def _processes(self, engine: EngineName, node: str, job: str, deadline_s: float) -> tuple[Seen, ...]:
        if node == HERE:
            try:
                return await self._here.processes(engine, job=job)
            except LaunchError as e:
                raise NodeError(str(e)) from None
        query = {"engine": engine, "job": job}
        told = await self.call(node, "GET", "/v1/processes", query=query, deadline_s=deadline_s)
        with _understood(node):
            return _seen(told["processes"])

    async def _kill(
        self, engine: EngineName, node: str, job: str, grace_s: float, deadline_s: float
    ) -> tuple[Seen, ...]:
        if node == HERE:
            return await self._here.kill(engine, job=job, grace_s=grace_s)
        body = {"engine": engine, "job": job, "grace_s": grace_s}
        told = await self.call(node, "POST", "/v1/kill", body=body, deadline_s=deadline_s)
        with _understood(node):
            return _seen(told["left"])

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def open_door(node: NodeConfig) -> Door:
    """Read a node's certificates and token. Raises ConfigError."""
    place = f"nodes '{node.name}'"
    try:
        token = node.token_file.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as e:
        raise ConfigError([f"{place}.token_file {node.token_file}: cannot be read ({e})"]) from None
    if not token.isprintable() or not token:
        raise ConfigError([f"{place}.token_file {node.token_file}: it holds no word: copy the agent's"])
    if not node.url.startswith("https:"):
        return Door(None, token)
    try:
        tls = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=node.ca)
        tls.load_cert_chain(str(node.cert), str(node.key))
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(
            [f"{place}: ca, cert or key cannot be used ({e}): `rotator agent certs` makes them"]
        ) from None
    return Door(tls, token)


@contextlib.contextmanager
def _understood(node: str) -> Iterator[None]:
    """For taking an answer apart. Raises NodeError where it has another shape."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError):
        raise NodeError(f"node {node}: its agent is of another release: install the same") from None


def _is_below(url: str, origin: str) -> bool:
    return url == origin or url.startswith(f"{origin}/")


def _seen(rows: Any) -> tuple[Seen, ...]:
    return tuple(Seen(int(row["pid"]), str(row["name"]), str(row["state"])) for row in rows)


def _reason(told: Any) -> str:
    value = told.get("error", told.get("detail")) if isinstance(told, dict) else told
    inner = value.get("message") if isinstance(value, dict) else value
    return str(inner)[:300]


def _in_words(error: Exception, config: NodeConfig) -> str:
    match error:
        case aiohttp.ClientConnectorCertificateError() | ssl.SSLCertVerificationError():
            return f"the certificate of {config.url} is not signed by {config.ca}, or not for this address: {error}"
        case aiohttp.ClientSSLError():
            return f"no TLS with {config.url}: {error}: does its agent know this service's certificate?"
        case aiohttp.ClientConnectorError():
            return f"no connection to its agent at {config.url}: {error.os_error.strerror or error}"
    return f"its agent at {config.url} broke off: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
