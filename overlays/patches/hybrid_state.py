"""A woken hybrid model starts from zeroed states, not from what was in the pages before (vLLM #44972)."""

from __future__ import annotations

import ast

from overlays.errors import ShapeUnknown
from overlays.patch import Files, Patch, Target, Verdict, bug, fixed
from overlays.patches._states import State
from overlays.probing import stub
from overlays.source import Function, Source


def edit(files: Files) -> None:
    source = files.source("worker")
    source.insert_after(
        woken(source, source.function("Worker.wake_up")),
        """
        if tags is None or "kv_cache" in tags:
            # New pages hold what was there before; layers with a state (Mamba, DeltaNet) may read it before they write.
            done = set()
            layers = self.vllm_config.compilation_config.static_forward_context.values()
            with torch.inference_mode():
                for layer in layers:
                    parts = getattr(layer, "kv_cache", None)
                    parts = parts if isinstance(parts, (list, tuple)) else ()
                    for part in (part for part in parts if isinstance(part, torch.Tensor)):
                        view = (part.data_ptr(), tuple(part.shape), tuple(part.stride()))
                        if view not in done:  # groups of layers share pages
                            done.add(view)
                            part.zero_()
        """,
    )


def woken(source: Source, function: Function) -> ast.stmt:
    """The statement that gives the memory back: the allocator's wake_up, or the backend's resume."""
    for statement in function.body:
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)):
            continue
        called = statement.value.func
        if isinstance(called, ast.Attribute) and called.attr in {"wake_up", "resume"}:
            return statement
    raise ShapeUnknown(f"{source.path}: Worker.wake_up neither wakes an allocator nor resumes a backend")


def probe(files: Files) -> Verdict:
    for tags, expected in ((None, 1), (["kv_cache"], 1), (["weights"], 0)):
        attention, parts = wake(files, tags)
        times = [part.zeroed for part in parts]
        if expected == 0 and any([*times, attention.zeroed]):
            return bug("a wake of the weights alone zeroes the cache")
        if expected and not all(times):
            return bug(f"after a wake of {tags or 'everything'} the states hold what was in their pages before")
    return fixed("a wake that brings the cache back zeroes every state")


def wake(files: Files, tags: list[str] | None) -> tuple[State, list[State]]:
    """Wake a model with an attention layer and two layers with a state, one of them on the other's pages."""
    attention, conv, recurrent = State(mapped=False), State(mapped=False), State(mapped=False)
    blocks = [attention, conv, recurrent]

    def map_back(*_: object) -> None:
        for block in blocks:
            block.mapped = tags is None or "kv_cache" in tags

    allocator = stub("allocator", wake_up=map_back, resume=map_back)
    layers = {
        "model.layers.0.attn": stub("attention", kv_cache=attention),
        "model.layers.1.mixer": stub("mixer", kv_cache=(conv, recurrent)),
        "model.layers.2.mixer": stub("mixer", kv_cache=[conv, recurrent, None]),
        "model.layers.3.norm": stub("norm", kv_cache=None),
    }
    compilation = stub("compilation_config", static_forward_context=layers)
    worker = stub(
        "worker",
        _sleep_saved_buffers={},
        vllm_config=stub("vllm_config", compilation_config=compilation),
        sleep_mode_backend=allocator,
        _get_sleep_mode_backend=lambda: allocator,
    )
    cumem = stub("cumem", CuMemAllocator=stub("CuMemAllocator", get_instance=lambda: allocator))
    torch = stub("torch", Tensor=State)
    module = files.load("worker", modules={"torch": torch, "vllm.device_allocator.cumem": cumem})
    vars(module)["get_mem_allocator_instance"] = lambda: allocator  # 0.23 and 0.24
    module.Worker.wake_up(worker, tags)
    return attention, [conv, recurrent]


PATCH = Patch(
    name="hybrid-state",
    targets={"worker": Target(paths=("vllm/v1/worker/gpu_worker.py",))},
    releases=">=0.19.1,<0.34",
    why="with vLLM's own allocator a woken hybrid model can start from stale or NaN states and answer '!!!!'",
    drop_when="vLLM zeroes states after a wake on CUDA too (0.33 does on ROCm), or every engine uses our allocator",
    upstream=("vLLM #44972", "vLLM #41602"),
    required=False,
    edit=edit,
    probe=probe,
)
__all__ = ["PATCH"]
