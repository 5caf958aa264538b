"""Drop the Triton configurations that cannot be launched on this GPU, and only those.

A bundle carries this file as `vllm/triton_utils/rotator_shared_memory.py`. vLLM's autotune lists are made for the
227 KiB of shared memory of an H100; on a GPU with less, Triton raises OutOfResources for the larger configurations
when the first request comes, and the worker dies (vLLM #43047). A `Pruner` is what
`triton.autotune(prune_configs_by={"early_config_prune": ...})` takes.

The estimators say what Triton's compiler reports for these kernels (`python -m bench.shared_memory` asks it again).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger("vllm.rotator_shared_memory")

KIB = 1024

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": shared memory a block can opt in to.
OPTIN_KIB = {
    (7, 0): 96,
    (7, 5): 64,
    (8, 0): 163,  # A100
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,  # H100, H200
    (10, 0): 227,
    (10, 3): 227,
    (12, 0): 99,  # RTX PRO 6000, RTX 5090
    (12, 1): 99,  # GB10
}
ANY_GPU_KIB = 48  # what a block has without opting in, on every GPU


class Config(Protocol):
    """What is used of a `triton.Config`."""

    @property
    def kwargs(self) -> Mapping[str, Any]: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Gpu:
    """`optin_bytes` as the driver says; None where nobody could ask it."""

    capability: tuple[int, int] | None = None
    optin_bytes: int | None = None

    @property
    def budget_bytes(self) -> int:
        if self.optin_bytes:
            return self.optin_bytes
        return OPTIN_KIB.get(self.capability or (0, 0), ANY_GPU_KIB) * KIB


Estimate = Callable[[Config, Mapping[str, Any], Gpu], int]
"""Bytes of shared memory that a launch with these arguments takes. May raise: the configuration is kept then."""


def read_gpu() -> Gpu | None:
    """The GPU that launches go to. None where there is no CUDA: the sizes here say nothing about other makers' GPUs."""
    try:
        import torch

        if torch.version.cuda is None:
            return None
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        capability = (int(properties.major), int(properties.minor))
    except Exception as error:
        logger.debug("the GPU could not be asked: %s", error)
        return Gpu()
    optin = getattr(properties, "shared_memory_per_block_optin", None)  # older torch does not tell
    return Gpu(capability, optin if isinstance(optin, int) and optin > 0 else None)


class Pruner:
    """Triton's `early_config_prune` for one kernel. Order is kept; what an estimate cannot judge is kept."""

    def __init__(self, kernel: str, estimate: Estimate, read: Callable[[], Gpu | None] = read_gpu) -> None:
        self._kernel = kernel
        self._estimate = estimate
        self._read = read
        self._warned = False

    def __call__(self, configs: Sequence[Config], named: Mapping[str, Any], /, **kwargs: Any) -> list[Config]:
        gpu = self._read()
        if gpu is None:
            return list(configs)
        needed = [self._needed_bytes(config, {**named, **kwargs}, gpu) for config in configs]
        fitting = [config for config, size in zip(configs, needed, strict=True) if size <= gpu.budget_bytes]
        if fitting or not configs:
            return fitting
        smallest = min(range(len(configs)), key=needed.__getitem__)
        self._warn(needed[smallest], gpu)
        return [configs[smallest]]

    def _needed_bytes(self, config: Config, arguments: Mapping[str, Any], gpu: Gpu) -> int:
        try:
            return self._estimate(config, arguments, gpu)
        except Exception as error:
            logger.debug("%s: no estimate for %s: %s", self._kernel, config, error)
            return 0

    def _warn(self, smallest_bytes: int, gpu: Gpu) -> None:
        if self._warned:
            return
        self._warned = True
        logger.warning(
            "%s: no configuration fits into the %d bytes of shared memory that a block has here; trying the smallest,"
            " which is estimated at %d bytes",
            self._kernel,
            gpu.budget_bytes,
            smallest_bytes,
        )


def chunk_delta_h_bytes(config: Config, arguments: Mapping[str, Any], gpu: Gpu) -> int:
    """Shared memory of FLA's `chunk_gated_delta_rule_fwd_kernel_h_blockdim64`.

    A stage holds a chunk of w and of k ([BT, K] each, in tiles of 64), of v ([BT, BV]) and of the gates; there is one
    stage fewer than `num_stages`. The state is turned over in a [BV, 64] scratch, in float32 where keys have gates.
    Hopper's asynchronous products keep w and k once more.
    """
    time, key, value = int(arguments["BT"]), 64 * -(-int(arguments["K"]) // 64), int(config.kwargs["BV"])
    element = _element_bytes(arguments)
    products = 2 * time * key * element
    gates = 4 * time + 4 if arguments.get("g") is not None else 0
    scratch = value * 64 * (4 if arguments.get("gk") is not None else element)
    once_more = products if _asynchronous(config, gpu, {9}) else 0
    stage = products + time * value * element + gates
    return _staged(config, gpu) * stage + once_more + scratch + _barrier_bytes(gpu)


def chunk_fwd_o_bytes(config: Config, arguments: Mapping[str, Any], gpu: Gpu) -> int:
    """Shared memory of FLA's `chunk_fwd_kernel_o`.

    A stage holds tiles of q and k ([BT, BK] each) and of h ([BV, BK]); with one step over K nothing is staged. The
    scores [BT, BT] and v [BT, BV] take its place afterwards. Asynchronous products keep one stage more.
    """
    time, block_k, block_v = int(arguments["BT"]), int(config.kwargs["BK"]), int(config.kwargs["BV"])
    element = _element_bytes(arguments)
    stages = _staged(config, gpu) if int(arguments["K"]) > block_k else 0
    if time >= 64 and _asynchronous(config, gpu, {9, 10, 11}):  # they take 64 rows
        stages += 1
    tiles = stages * (2 * time * block_k + block_k * block_v) * element
    afterwards = (time * time + time * block_v) * element * 9 // 8  # rows are padded by an eighth at most
    turned = time * (block_k + 16) * element  # an operand between two register layouts
    return max(tiles + _barrier_bytes(gpu), afterwards, turned)


def _element_bytes(arguments: Mapping[str, Any]) -> int:
    """Of the keys; all tensors that are staged have their type."""
    return int(arguments["k"].element_size())


def _staged(config: Config, gpu: Gpu) -> int:
    """Stages that lie in shared memory. GPUs before Ampere cannot copy ahead, so Triton stages nothing there."""
    return 0 if gpu.capability is not None and gpu.capability[0] < 8 else config.num_stages - 1


def _asynchronous(config: Config, gpu: Gpu, majors: set[int]) -> bool:
    """Whether Triton multiplies out of shared memory: on these GPUs, and with the four warps it takes."""
    return gpu.capability is not None and gpu.capability[0] in majors and config.num_warps >= 4


def _barrier_bytes(gpu: Gpu) -> int:
    """B200 and Thor keep the barriers of their tensor memory in shared memory."""
    return 32 if gpu.capability is not None and gpu.capability[0] in {10, 11} else 0
