"""Converted MXFP4 weights do not leave their originals in torch's cache, layer after layer.

On unified memory that cache is the host's memory: two GB10 hung in their firmware while an MXFP4 model loaded, until
the field freed each layer's originals by hand. vLLM's loader does it itself from 0.24 (vLLM #45179).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from overlays.errors import NotHere, ShapeUnknown
from overlays.patch import Files, Patch, Target, Verdict, bug, fixed
from overlays.probing import Anything, ProbeModule, stub
from overlays.source import Function, Source

HOOK = "process_weights_after_loading"
GIB = 1 << 30
NAMES = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale", "w13_bias", "w2_bias")


def edit(files: Files) -> None:
    source = files.source("method")
    found = False
    for function in ast.walk(source.tree):
        if isinstance(function, ast.FunctionDef) and function.name == HOOK:
            for statement, names in conversions(source, function):
                found = True
                source.insert_after(
                    statement,
                    f"""
                    # The originals go back to the driver before the next layer is converted.
                    del {", ".join(names)}
                    torch.cuda.empty_cache()
                    """,
                )
    if not found:
        raise ShapeUnknown(f"{source.path}: no {HOOK} ends with self._setup_kernel(layer, weights...)")


def conversions(source: Source, function: Function) -> Iterator[tuple[ast.stmt, list[str]]]:
    """Statements that convert weights which are local names here, as last of the function: nobody reads them later."""
    last = function.body[-1]
    if not (isinstance(last, ast.Expr) and isinstance(last.value, ast.Call)):
        return
    if source.text_of(last.value.func) != "self._setup_kernel":
        return
    bound = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names = [part.id for part in last.value.args if isinstance(part, ast.Name) and part.id in bound]
    if names:
        yield last, names


class Memory:
    """Device memory as torch manages it: what nobody refers to any longer is kept until the cache is emptied.
    Converted weights have other sizes than their originals, so nothing is taken out of the cache again."""

    def __init__(self) -> None:
        self.allocated = self.cached = self.cached_max = 0

    def empty_cache(self) -> None:
        self.cached = 0

    def settle(self) -> None:
        self.cached_max = max(self.cached_max, self.cached)


class Weight:
    """A tensor of a GiB; its memory is free as soon as the last reference goes."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        memory.allocated += GIB

    def __del__(self) -> None:
        self._memory.allocated -= GIB
        self._memory.cached += GIB


class QuantMethod:
    """Takes the place of vLLM's QuantizeMethodBase; its hook is that of the file under probe."""

    requires_device_loading = True

    def __init__(self, hook: Any, memory: Memory) -> None:
        self._hook, self._memory = hook, memory

    def process_weights_after_loading(self, layer: Any) -> None:
        def convert(layer: Any, *weights: Weight) -> None:
            for name in NAMES:
                setattr(layer, name, Weight(self._memory))

        self._memory.settle()  # what earlier layers left there while this one is converted
        self._hook(stub("method", _setup_kernel=convert), layer)


def probe(files: Files) -> Verdict:
    """Let the loader convert three layers on a GB10 that is short of memory, and look into torch's cache."""
    hooks = hooks_of(files.load("method"))
    if not hooks:
        raise NotHere("no MXFP4 method converts weights after loading")
    for hook in range(len(hooks)):
        left = left_over_bytes(files, hook)
        if left:
            return bug(
                f"when the third layer is converted, {left // GIB} GiB of the others' originals are in the cache"
            )
    return fixed("a layer's originals are back at the driver before the next layer is converted")


def left_over_bytes(files: Files, which: int) -> int:
    memory = Memory()
    modules = machine(memory)
    if files.read("vllm/utils/mem_utils.py") is not None:
        modules["vllm.utils.mem_utils"] = files.load("vllm/utils/mem_utils.py", modules)
    loader = files.load("loader", modules)
    vars(loader)["QuantizeMethodBase"] = QuantMethod
    hook = hooks_of(files.load("method", modules))[which]
    layers = [new_layer(memory, hook) for _ in range(3)]
    model = stub("model", named_modules=lambda: [(f"layers.{index}", layer) for index, layer in enumerate(layers)])
    device = SimpleNamespace(type="cuda", index=0)
    loader.process_weights_after_loading(model, stub("model_config", quantization="mxfp4"), device)
    return memory.cached_max


def hooks_of(module: ProbeModule) -> list[Any]:
    """What the file's methods do after loading, of those that convert weights."""
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and "_setup_kernel" in vars(kind)]
    return [vars(kind)[HOOK] for kind in kinds if HOOK in vars(kind)]


def new_layer(memory: Memory, hook: Any) -> Anything:
    weights = {name: Weight(memory) for name in NAMES}
    method = QuantMethod(hook, memory)
    return stub("layer", quant_method=method, named_parameters=list, parameters=list, **weights)


def machine(memory: Memory) -> dict[str, object]:
    accelerator = stub(
        "torch.accelerator",
        empty_cache=memory.empty_cache,
        memory_allocated=lambda device=None: memory.allocated,
        memory_reserved=lambda device=None: memory.allocated + memory.cached,
    )
    cuda = stub("torch.cuda", empty_cache=memory.empty_cache)
    short = SimpleNamespace(available=1 * GIB, total=128 * GIB)
    platform = stub("current_platform", is_integrated_gpu=lambda *_: True)
    return {
        "torch": stub("torch", accelerator=accelerator, cuda=cuda),
        "psutil": stub("psutil", virtual_memory=lambda: short),
        "vllm.platforms": stub("platforms", current_platform=platform),
        "vllm.utils.mem_constants": stub("mem_constants", KiB_bytes=1 << 10, MiB_bytes=1 << 20, GiB_bytes=GIB),
    }


PATCH = Patch(
    name="mxfp4-loader",
    targets={
        "method": Target(paths=("vllm/model_executor/layers/quantization/mxfp4.py",)),
        "loader": Target(paths=("vllm/model_executor/model_loader/utils.py",)),
    },
    releases=">=0.19.1,<0.34",
    why="loading an MXFP4 model fills a GB10's memory with weights that nobody needs, until its firmware hangs",
    drop_when="the oldest release in use is 0.24, whose loader gives cached memory back under pressure",
    upstream=("vLLM #45179",),
    required=False,
    edit=edit,
    probe=probe,
)
__all__ = ["PATCH"]
