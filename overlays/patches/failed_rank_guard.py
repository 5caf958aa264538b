"""After a sleep or wake that failed on any rank, the executor refuses every further one (vLLM #57846, #45622)."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import Any

from overlays.errors import ShapeUnknown
from overlays.patch import Files, Patch, Target, Verdict, bug, fixed
from overlays.source import Source

EXECUTOR = "Executor"
ENGINE = "EngineCore"
MOVES = ("sleep", "wake_up", "discard")  # discard exists from 0.28

CHECK = '''
def overlay_check_ranks(self) -> None:
    """Raise if an earlier transition failed: ranks may differ then, and only a restart makes them alike."""
    failed = getattr(self, "overlay_failed", None)
    if failed is not None:
        raise RuntimeError(f"{failed}; ranks may be in different states: stop this engine and start it again")

'''


def edit(files: Files) -> None:
    executor = files.source("executor")
    first = executor.function(f"{EXECUTOR}.sleep")
    executor.insert_before(first, CHECK)
    for name in MOVES:
        if executor.has(f"{EXECUTOR}.{name}"):
            _guard(executor, name)
    engine = files.source("engine")
    engine.insert_before(
        engine.first_statement(engine.function(f"{ENGINE}.wake_up")),
        """
        overlay_check = getattr(self.model_executor, "overlay_check_ranks", None)
        if overlay_check is not None:
            overlay_check()
        """,
    )


def _guard(source: Source, name: str) -> None:
    function = source.function(f"{EXECUTOR}.{name}")
    call = source.only(
        function,
        lambda node: (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and source.text_of(node.value.func) == "self.collective_rpc"
        ),
        f"the call of the ranks in {name}",
    )
    if name not in source.text_of(call):
        raise ShapeUnknown(f"{source.path}: {name} asks the ranks for something else")
    source.insert_before(source.first_statement(function), "self.overlay_check_ranks()")
    source.replace(
        call,
        f"""
        try:
            {source.text_of(call)}
        except BaseException as overlay_error:
            self.overlay_failed = f"{name} failed: {{overlay_error!r}}"
            raise
        """,
    )


class _Ranks:
    """Ranks of which one may fail the next call."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failing = ""

    def collective_rpc(self, method: str, *args: object, **kwargs: object) -> list[None]:
        self.asked.append(method)
        if method == self.failing:
            raise RuntimeError(f"rank 1: {method} failed")
        return [None]


def probe(files: Files) -> Verdict:
    for failing, then in (("sleep", "wake_up"), ("wake_up", "wake_up"), ("sleep", "sleep")):
        executor, ranks = _executor(files)
        if failing == "wake_up":
            executor.sleep(1)
        ranks.failing = failing
        if not _raises(getattr(executor, failing)):
            return bug(f"a rank's failed {failing} is not told")
        ranks.failing = ""
        if not _raises(getattr(executor, then)):
            return bug(f"after a {failing} that failed on one rank, {then} says nothing")
    if found := _resumes(files):
        return bug(found)
    return fixed("after a sleep or wake that failed on a rank every further one is refused")


def _executor(files: Files) -> tuple[Any, _Ranks]:
    ranks = _Ranks()
    cls = files.load("executor").Executor
    concrete = type("Probed", (cls,), dict.fromkeys(getattr(cls, "__abstractmethods__", ())))
    executor: Any = object.__new__(concrete)
    executor.__dict__.update(collective_rpc=ranks.collective_rpc, sleeping_tags=set())
    if not isinstance(getattr(type(executor), "is_sleeping", None), property):
        executor.is_sleeping = False
    return executor, ranks


def _resumes(files: Files) -> str:
    """What happens if the engine is woken, whole or its scheduler alone, after a sleep that failed."""
    for tags in (None, ["scheduling"]):
        executor, ranks = _executor(files)
        ranks.failing = "sleep"
        _raises(lambda executor=executor: executor.sleep(1))
        ranks.failing = ""
        resumed: list[str] = []
        engine = SimpleNamespace(
            model_executor=executor,
            resume_scheduler=lambda resumed=resumed: resumed.append("resumed"),
            _set_kv_connector_handshake_metadata=lambda: None,
        )
        wake = files.load("engine").EngineCore.wake_up
        if not _raises(lambda wake=wake, engine=engine, tags=tags: wake(engine, tags)) or resumed:
            return f"after a sleep that failed on one rank, a wake of {tags or 'all'} lets requests run on lost memory"
    return ""


def _raises(call: Any) -> bool:
    try:
        call()
    except RuntimeError:
        return True
    return False


def _has(cls: str, *methods: str) -> Any:
    def shape(tree: ast.Module) -> bool:
        return any(
            isinstance(node, ast.ClassDef)
            and node.name == cls
            and set(methods) <= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            for node in tree.body
        )

    return shape


PATCH = Patch(
    name="failed-rank-guard",
    targets={
        "executor": Target(
            paths=("vllm/v1/executor/abstract.py",),
            shape=_has(EXECUTOR, "sleep", "wake_up"),
            search=("vllm/v1/*.py",),
            needle=b"class Executor",
        ),
        "engine": Target(
            paths=("vllm/v1/engine/core.py",),
            shape=_has(ENGINE, "sleep", "wake_up"),
            search=("vllm/v1/*.py",),
            needle=b"class EngineCore",
        ),
    },
    releases=">=0.19.1,<0.34",
    why="after a sleep that failed on one rank /wake_up sends nothing and serves from memory that is gone",
    drop_when="a release refuses to wake over a transition that failed on any rank",
    upstream=("vLLM #57846", "vLLM #45622"),
    required=True,
    edit=edit,
    probe=probe,
)
__all__ = ["PATCH"]
