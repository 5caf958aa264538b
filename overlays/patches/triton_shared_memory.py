"""Triton tries only the configurations that fit into this GPU's shared memory (vLLM #43047).

Two kernels of the gated delta rule, which Qwen3-Next and its like use, are wired to the pruner in
`overlays/payload/shared_memory.py`; it travels in the bundle as a file of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from overlays import payload
from overlays.errors import NotHere, ShapeUnknown
from overlays.patch import Files, Patch, Target, Verdict, bug, fixed
from overlays.probing import stub
from overlays.source import Source

ADDED = "vllm/triton_utils/rotator_shared_memory.py"


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    estimate: str  # in the payload
    file: str

    @property
    def target(self) -> Target:
        folders = (
            "vllm/third_party/flash_linear_attention/ops",
            "vllm/model_executor/layers/fla/ops",
        )  # from 0.26, to 0.25
        return Target(
            paths=tuple(f"{folder}/{self.file}" for folder in folders),
            shape=lambda tree: any(isinstance(node, ast.FunctionDef) and node.name == self.name for node in tree.body),
            search=(f"vllm/*{self.file}",),
            needle=self.name.encode(),
        )


KERNELS = {
    "state": Kernel("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "chunk_delta_h_bytes", "chunk_delta_h.py"),
    "output": Kernel("chunk_fwd_kernel_o", "chunk_fwd_o_bytes", "chunk_o.py"),
}


def edit(files: Files) -> None:
    wired = [wire(files.source(role), kernel) for role, kernel in KERNELS.items()]
    if not any(wired):
        raise ShapeUnknown("both kernels are tuned in a way that nobody knows")
    files.add(ADDED, (Path(payload.__path__[0]) / "shared_memory.py").read_text())


def wire(source: Source, kernel: Kernel) -> bool:
    """Give the kernel's autotuner our pruner. False if it has none, or one of its own; the probe judges that."""
    tuner = autotune(source, kernel.name)
    if tuner is None or any(keyword.arg == "prune_configs_by" for keyword in tuner.keywords):
        return False
    last = tuner.keywords[-1].value if tuner.keywords else tuner.args[-1]
    pruner = f"_fits_{kernel.estimate}"
    source.replace(last, f"{source.text_of(last)}, prune_configs_by={{'early_config_prune': {pruner}}}")
    source.insert_after_imports(
        f"""
        from vllm.triton_utils.rotator_shared_memory import Pruner as _Pruner
        from vllm.triton_utils.rotator_shared_memory import {kernel.estimate} as _{kernel.estimate}

        {pruner} = _Pruner("{kernel.name}", _{kernel.estimate})
        """
    )
    return True


def autotune(source: Source, kernel: str) -> ast.Call | None:
    """The call of triton.autotune among the kernel's decorators."""
    for decorator in source.function(kernel).decorator_list:
        if isinstance(decorator, ast.Call) and source.text_of(decorator.func).endswith("autotune"):
            return decorator
    return None


@dataclass(frozen=True, slots=True)
class Config:
    """A fake of `triton.Config`."""

    kwargs: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.kwargs.values(), self.num_stages)


Sizes = Mapping[tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Case:
    """What Triton 3.6 reports for a kernel (bf16, chunks of 64): bytes by block sizes and stages. Configurations that
    are not listed are smaller than every GPU's limit here."""

    kernel: str
    gpu: str
    capability: tuple[int, int]
    limit_bytes: int
    head: int
    large_blocks: bool  # what check_shared_mem() of these files says there
    bytes_by_shape: Sizes
    told: bool = True  # whether torch tells the limit


SMALL: Sizes = {(32, 2): 41220, (32, 3): 78344, (32, 4): 115468, (64, 2): 49412, (64, 3): 90632, (64, 4): 131852}
HOPPER: Sizes = {(32, 2): 73988, (32, 3): 111112, (32, 4): 148236, (64, 2): 82180, (64, 3): 123400, (64, 4): 164620}
WIDE: Sizes = {
    (64, 64, 4): 73728,
    (64, 128, 4): 98304,
    (128, 64, 4): 147456,
    (128, 128, 3): 131072,
    (128, 128, 4): 196608,
}
CASES = (
    Case("state", "an RTX PRO 6000", (12, 0), 101376, 128, False, SMALL),
    Case("state", "a GB10 behind an old torch", (12, 1), 101376, 128, False, SMALL, told=False),
    Case("state", "an H100", (9, 0), 232448, 128, True, HOPPER),
    Case("output", "an A100", (8, 0), 166912, 256, True, WIDE),
    Case("output", "an RTX PRO 6000", (12, 0), 101376, 256, False, WIDE),
)


def probe(files: Files) -> Verdict:
    """Ask both kernels what they would try, on GPUs where Triton's own reports are known."""
    judged = False
    for case in CASES:
        name = KERNELS[case.kernel].name
        listed, tried = configurations(files, case)
        judged = judged or bool(listed)
        large = [config.shape for config in tried if case.bytes_by_shape.get(config.shape, 0) > case.limit_bytes]
        if large:
            needed = case.bytes_by_shape[large[0]]
            return bug(f"{name} tries {large[0]} of {needed} bytes on {case.gpu}, which has {case.limit_bytes}")
        if tried != [config for config in listed if case.bytes_by_shape.get(config.shape, 0) <= case.limit_bytes]:
            return bug(f"{name} does not try all that fits {case.gpu}, in the given order")
    if not judged:
        raise NotHere("the kernels are not autotuned any more")
    return fixed("the kernels try what fits, and all of it")


def configurations(files: Files, case: Case) -> tuple[list[Config], list[Config]]:
    """What the kernel lists, and what its autotuner tries on the case's GPU. Nothing if it is not tuned."""
    tuned: dict[str, tuple[list[Config], Mapping[str, Any]]] = {}

    def autotune(configs: list[Config], key: object = None, **options: Any) -> Any:
        def keep(function: Any) -> Any:
            tuned[function.__name__] = (configs, options.get("prune_configs_by") or {})
            return function

        return keep

    path = files.path(case.kernel)
    utilities = path.rpartition("/")[0].replace("/", ".") + ".utils"
    modules = {
        "torch": torch(case),
        "vllm.triton_utils": stub("triton_utils", triton=stub("triton", autotune=autotune, Config=Config)),
        utilities: stub("utils", check_shared_mem=lambda *args: case.large_blocks),
    }
    if files.read(ADDED) is not None:
        modules["vllm.triton_utils.rotator_shared_memory"] = files.load(ADDED, {"torch": modules["torch"]})
    files.load(case.kernel, modules)
    listed, options = tuned.get(KERNELS[case.kernel].name, ([], {}))
    prune = options.get("early_config_prune")
    arguments = {"k": stub("k", element_size=lambda: 2), "g": stub("g"), "gk": None}
    tried = prune(listed, arguments, BT=64, K=case.head) if prune else listed
    return list(listed), list(tried)


def torch(case: Case) -> object:
    major, minor = case.capability
    properties = SimpleNamespace(major=major, minor=minor)
    if case.told:
        properties.shared_memory_per_block_optin = case.limit_bytes
    cuda = stub("torch.cuda", get_device_properties=lambda device: properties, current_device=lambda: 0)
    return stub("torch", cuda=cuda, version=SimpleNamespace(cuda="13.0", hip=None))


PATCH = Patch(
    name="triton-shared-memory",
    targets={role: kernel.target for role, kernel in KERNELS.items()},
    releases=">=0.19.1,<0.34",
    why="gated delta rule models die on GPUs with less shared memory than an H100: triton OutOfResources in a request",
    drop_when="vLLM prunes these kernels' configurations by the device's own limit",
    upstream=("vLLM #43047", "vLLM #36598"),
    required=False,
    edit=edit,
    probe=probe,
)
__all__ = ["PATCH"]
