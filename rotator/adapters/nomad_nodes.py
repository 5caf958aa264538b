"""Before an engine starts over several nodes: nothing of it is left on any, and what its ranks share is alike."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rotator.ports import LaunchError, NodeError

LOOK_S = 15.0
ALIKE = ("nccl", "flashinfer")  # ranks of different ones hang or answer wrongly


class Agents(Protocol):
    """The nodes' agents; the node "" is this machine."""

    async def processes(
        self, engine: str, nodes: Sequence[str] = ("",), *, job: str = "", deadline_s: float
    ) -> Mapping[str, Sequence[Any]]: ...

    async def kill(
        self, engine: str, nodes: Sequence[str] = ("",), *, job: str = "", grace_s: float, deadline_s: float
    ) -> Mapping[str, Sequence[Any]]: ...

    async def versions(self, nodes: Sequence[str], *, deadline_s: float) -> Mapping[str, Mapping[str, str]]: ...

    async def pids(self, engine: str, nodes: Sequence[str], *, deadline_s: float) -> frozenset[int]: ...


async def check_nodes(agents: Agents | None, engine: str, job_id: str, nodes: Sequence[str]) -> None:
    """Raises LaunchError where an engine that spans these nodes must not start. One node needs no agreement."""
    if len(nodes) < 2:
        return
    if agents is None:
        raise LaunchError(f"engine '{engine}' spans {', '.join(nodes)}, which nobody can look at: give each its agent")
    try:
        left = await agents.processes(engine, nodes, job=job_id, deadline_s=LOOK_S)
        versions = await agents.versions(nodes, deadline_s=LOOK_S)
    except NodeError as e:
        raise LaunchError(f"engine '{engine}' was not started: {e}") from None
    if problems := [*_leftovers(left), *_unequal(versions, nodes)]:
        raise LaunchError(f"engine '{engine}' was not started: {'; '.join(problems)}")


def in_words(left: Mapping[str, Sequence[Any]]) -> str:
    """Processes by node; empty where there are none."""
    return "; ".join(_leftovers(left))


def _leftovers(left: Mapping[str, Sequence[Any]]) -> list[str]:
    return [
        f"on {_named(node)} processes of it are left: {', '.join(f'{p.pid} ({p.name})' for p in seen)}: end them"
        for node, seen in left.items()
        if seen
    ]


def _unequal(versions: Mapping[str, Mapping[str, str]], nodes: Sequence[str]) -> list[str]:
    problems = []
    for library in ALIKE:
        found = {node: _version(versions.get(node) or {}, library) for node in nodes}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{_named(node)} has {version or 'none'}" for node, version in found.items())
            problems.append(f"{library} differs: {said}: install the same everywhere")
    return problems


def _version(packages: Mapping[str, str], library: str) -> str:
    """Packages are named for what they are built against (nvidia-nccl-cu13, flashinfer-python)."""
    return next((version for name, version in sorted(packages.items()) if library in name.lower()), "")


def _named(node: str) -> str:
    return node or "this machine"
