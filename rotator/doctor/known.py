"""What the known-broken table says of an engine, from what was read of its environment."""

from collections.abc import Mapping
from typing import Literal, cast, get_args

from rotator.check.vllm import flag
from rotator.config import EngineConfig
from rotator.doctor.facts import KnownTrouble, Software
from rotator.jobs.known_broken import KnownBroken, Situation, match
from rotator.jobs.recipe import Arch, Family
from rotator.ports import GpuInfo

_FAMILIES: Mapping[str, str] = {
    "deepseek_v4": "deepseek-v4",
    "glm_moe_dsa": "glm-5",
    "mimo": "mimo-v2.5",
    "qwen3_next": "qwen3-next",
    "qwen3_5": "qwen3.6",
    "qwen3_vl": "qwen3-vl",
    "gemma4": "gemma-4",
    "nemotron": "nemotron-omni",
}


def known_troubles(
    engine: EngineConfig, seen: Software, infos: tuple[GpuInfo, ...], environ: Mapping[str, str]
) -> tuple[KnownTrouble, ...]:
    """Rows that fit. What is not known (no version, no GPU) fits no row that asks for it."""
    rows = match(situation(engine, seen, infos, environ))
    return tuple(KnownTrouble(row.id, row.problem, row.fix, row.source, _is_certain(row)) for row in rows)


def situation(
    engine: EngineConfig, seen: Software, infos: tuple[GpuInfo, ...], environ: Mapping[str, str]
) -> Situation:
    command = engine.command
    allocator: Literal["rotator", "stock"] | None = None
    if seen.packages:
        allocator = "rotator" if "rotator" in seen.packages else "stock"
    return Situation(
        vllm=seen.packages.get("vllm"),
        arch=_arch(infos),
        family=_family(seen.model_type),
        ranks=_size(command, "--tensor-parallel-size", "-tp") * _size(command, "--pipeline-parallel-size", "-pp"),
        pipeline=_size(command, "--pipeline-parallel-size", "-pp"),
        levels=engine.sleep_levels,
        allocator=allocator,
        settings={**environ, **_flags(command)},
    )


def _arch(infos: tuple[GpuInfo, ...]) -> Arch | None:
    found = {f"sm{major}{minor}" for major, minor in (info.compute_capability for info in infos)}
    name = found.pop() if len(found) == 1 else ""
    return cast("Arch", name) if name in get_args(Arch) else None


def _family(model_type: str) -> Family | None:
    name = next((family for prefix, family in _FAMILIES.items() if model_type.startswith(prefix)), None)
    return cast("Family", name) if name in get_args(Family) else None


def _size(command: tuple[str, ...], *names: str) -> int:
    text = flag(command, *names) or "1"
    return int(text) if text.isdecimal() else 1


def _flags(command: tuple[str, ...]) -> dict[str, str]:
    """Every flag by its name, a bare one with ''."""
    names = {word.partition("=")[0] for word in command if word.startswith("--")}
    return {name: flag(command, name.replace("_", "-")) or "" for name in names}


def _is_certain(row: KnownBroken) -> bool:
    return row.severity == "error" and row.at_start
