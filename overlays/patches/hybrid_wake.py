"""A hybrid model with a quantized cache wakes, though some of its layers keep a list of states (vLLM #41602)."""

from __future__ import annotations

import ast
from types import SimpleNamespace

from overlays.errors import NotHere, ShapeUnknown
from overlays.patch import Files, Patch, Target, Verdict, bug, fixed
from overlays.patches._states import State
from overlays.source import Function, Source

RESET = "GPUModelRunner.init_fp8_kv_scales"


def edit(files: Files) -> None:
    source = files.source("runner")
    statement, name = zeroing(source, source.function(RESET))
    source.replace(
        statement,
        f"""
        # Layers with a state (Mamba, DeltaNet) keep a list of tensors.
        for part in {name} if isinstance({name}, (list, tuple)) else ({name},):
            part.zero_()
        """,
    )


def zeroing(source: Source, function: Function) -> tuple[ast.Expr, str]:
    """The statement `cache.zero_()` on the variable of the loop over the caches, and that variable's name."""
    for loop in ast.walk(function):
        if not (isinstance(loop, ast.For) and isinstance(loop.target, ast.Name)):
            continue
        call = f"{loop.target.id}.zero_()"
        for node in ast.walk(loop):
            if isinstance(node, ast.Expr) and source.text_of(node) == call:
                return node, loop.target.id
    raise ShapeUnknown(f"{source.path}: {RESET} has no loop that zeroes one cache after the other")


def probe(files: Files) -> Verdict:
    module = files.load("runner")
    reset = getattr(module.GPUModelRunner, "init_fp8_kv_scales", None)
    if reset is None:
        raise NotHere("a wake no longer touches the caches of the model runner")
    vars(module)["is_quantized_kv_cache"] = lambda dtype: True  # earlier releases ask the name of the type instead
    attention, conv, recurrent = State(), State(), State()
    runner = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="fp8_e4m3"),
        compilation_config=SimpleNamespace(static_forward_context={}),
        kv_caches=[attention, [conv, recurrent], None],
    )
    try:
        reset(runner)
    except AttributeError as error:
        return bug(f"the wake of a hybrid model raises: {error}")
    if not (attention.zeroed and conv.zeroed and recurrent.zeroed):
        return bug("a wake leaves a cache or a state as it came back")
    return fixed("a wake takes layers with one tensor and layers with several")


PATCH = Patch(
    name="hybrid-wake",
    targets={"runner": Target(paths=("vllm/v1/worker/gpu_model_runner.py",))},
    releases=">=0.19.1,<0.34",
    why="/wake_up of a Mamba or DeltaNet hybrid with an fp8 cache fails: 'list' object has no attribute 'zero_'",
    drop_when="the oldest release in use is 0.27, which takes lists",
    upstream=("vLLM #41602", "vLLM #41564"),
    required=True,
    edit=edit,
    probe=probe,
)
__all__ = ["PATCH"]
