"""One engine's task as the rules see it, whoever wrote the job. None is what cannot be known from the text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rotator.jobs.known_broken import Situation
from rotator.jobs.render import Rendered


@dataclass(frozen=True, slots=True)
class View:
    """``words``: program and arguments. ``is_partial``: expressions hide some, so nothing is said to be missing."""

    place: str
    words: tuple[str, ...]
    env: Mapping[str, str]
    image: str | None
    is_partial: bool = False
    gpus: tuple[str, ...] | None = None
    nodes: int = 1
    has_device: bool = False
    memory_mib: int | None = None
    kill_timeout_s: float | None = None
    logs_mb: int | None = None  # of the whole group, both streams
    disk_mb: int | None = None
    restart: Mapping[str, Any] | None = None
    reschedule: Mapping[str, Any] | None = None
    update: Mapping[str, Any] | None = None
    count: int | None = 1
    has_check_restart: bool = False
    change_modes: tuple[str, ...] = ()
    is_readonly: bool = True
    writable: tuple[str, ...] = ()
    memlock: str | None = "-1"
    is_ours: bool = False
    why: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """What recipe and site know of an engine beyond its job."""

    situation: Situation = field(default_factory=Situation)
    is_multimodal: bool | None = None
    is_hybrid: bool | None = None
    masters_mib: int | None = None
    max_kill_timeout_s: float | None = None
    host_memory_mib: int | None = None
    unified_memory: bool = False


def of_rendered(rendered: Rendered) -> View:
    """Our own templates hold what concerns restarts, templates and logs: the tests say so of their text."""
    values = rendered.values
    two = rendered.template == "engine-two-node"
    return View(
        place=f"engine '{rendered.name}'",
        words=command(rendered),
        env={**values["env"], **values.get("head_env", {}), "VLLM_SERVER_DEV_MODE": "1"},
        image=values["image"],
        gpus=(values["head_gpu"], values["worker_gpu"]) if two else tuple(values["gpu_uuids"]),
        nodes=2 if two else 1,
        memory_mib=values["memory_mb"],
        kill_timeout_s=float(values["kill_timeout"].removesuffix("s")),
        writable=("/root/.cache", "/tmp"),  # noqa: S108 - paths inside the container
        is_ours=True,
        why=rendered.why,
    )


def command(rendered: Rendered, *, rank: int = 0) -> tuple[str, ...]:
    """The words that the job's template makes of its variables, on the node of this rank."""
    values = rendered.values
    begins = [*values["entrypoint"], "/models/current", "--served-model-name", values["served_name"]]
    fixed = [
        *("--tensor-parallel-size", str(values["tensor_parallel"])),
        *("--pipeline-parallel-size", str(values["pipeline_parallel"])),
        "--enable-sleep-mode",
    ]
    if rendered.template == "engine-two-node":
        fixed += ["--nnodes", "2", "--master-addr", values["master_address"]]
        fixed += ["--master-port", str(values["master_port"]), "--node-rank", str(rank)]
    ends = ["--headless"] if rank else ["--host", "127.0.0.1", "--port", str(values["port"])]
    return (*begins, *values["args"], *fixed, *ends)


def settings(view: View) -> dict[str, str]:
    """Arguments by flag (a bare one with '') and environment variables by name. The last of a flag wins, as in vLLM."""
    found = dict(view.env)
    for i, word in enumerate(view.words):
        if not word.startswith("-") or _is_number(word):
            continue
        name, has_value, value = word.partition("=")
        following = view.words[i + 1] if i + 1 < len(view.words) else ""
        if not has_value:
            value = "" if following.startswith("-") and not _is_number(following) else following
        found[_LONG.get(name, name if "." in name else name.replace("_", "-"))] = value
    return found


_LONG = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size"}


def _is_number(word: str) -> bool:
    return word.lstrip("-").replace(".", "", 1).isdigit()
