"""Hand-written doubles of what vLLM's workers do around the allocator, release by release (read from the wheels).

Only the calls that reach the allocator, in their order and with their arguments, and where each release makes them.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

MIB = 1 << 20


class StockAllocator:
    """In place of vLLM's own: how much it holds, and nothing that works."""

    def __init__(self, usage: int = 0) -> None:
        self.usage = usage

    def get_current_usage(self) -> int:
        return self.usage


def stock_class() -> Any:
    """A fresh class, as a process has one."""
    made = type("CuMemAllocator", (StockAllocator,), {"instance": None})

    def get_instance() -> Any:
        if made.instance is None:
            made.instance = StockAllocator()
        return made.instance

    made.get_instance = staticmethod(get_instance)  # type: ignore[attr-defined]
    return made


class ModelRunner:
    def __init__(self, torch: Any) -> None:
        self.torch, self.kept, self.restored = torch, list[Any](), 0

    def load_model(self) -> None:
        self.kept.append(self.torch.empty(24 * MIB))
        self.torch.empty(22 * MIB)  # the higher precision that online quantization throws away

    def initialize_kv_cache(self, context: AbstractContextManager[Any]) -> None:
        self.kept.append(self.torch.empty(2 * MIB))
        with context:
            self.kept.append(self.torch.empty(32 * MIB))


class Worker:
    """One rank of release `release`, with sleep mode on or off."""

    def __init__(self, torch: Any, cumem: Any, release: tuple[int, int], sleep_mode: bool = True) -> None:
        self.torch, self.cumem, self.release, self.sleep_mode = torch, cumem, release, sleep_mode
        self.model_runner = ModelRunner(torch)
        if release in ((0, 25), (0, 26)):
            self.model_runner.post_kv_cache_wake_up = self._restored  # type: ignore[attr-defined]
        self.warmed_up = False

    def _restored(self) -> None:
        self.model_runner.restored += 1

    def _pool(self, tag: str) -> AbstractContextManager[Any]:
        if not self.sleep_mode:
            return nullcontext()
        allocator = self.cumem.CuMemAllocator.get_instance()
        if tag == "weights":
            assert allocator.get_current_usage() == 0, "one instance per process"
        pool: AbstractContextManager[Any] = allocator.use_memory_pool(tag=tag)
        return pool

    def load_model(self) -> None:
        with self._pool("weights"):
            self.model_runner.load_model()

    def initialize_from_config(self) -> None:
        if self.release < (0, 29):
            with self._pool("kv_cache"):
                self.model_runner.initialize_kv_cache(nullcontext())
            return
        if self.release < (0, 32):
            self.model_runner.initialize_kv_cache(self._pool("kv_cache"))
            return
        kv = self._pool("kv_cache")
        with self._pool("runtime"):
            self.model_runner.initialize_kv_cache(kv)
        with self._pool("workspace"):
            self.model_runner.kept.append(self.torch.empty(16 * MIB))

    def compile_or_warm_up_model(self) -> str:
        self.warmed_up = True
        if self.release >= (0, 32) and self.sleep_mode:
            with self.cumem.CuMemAllocator.get_instance().cudagraph_pool() as pool:
                assert isinstance(pool, tuple)
        return "times"

    def sleep(self, level: int = 1) -> None:
        tags: tuple[str, ...] = ("runtime", "cudagraph") if self.release >= (0, 32) else ()
        allocator = self.cumem.CuMemAllocator.get_instance()
        allocator.sleep(offload_tags=("weights", *tags) if level == 1 else tags)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.cumem.CuMemAllocator.get_instance().wake_up(tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        self.cumem.CuMemAllocator.get_instance().discard(tags)

    def shutdown(self) -> None:
        if self.release >= (0, 25) and self.cumem.CuMemAllocator.instance is not None:
            self.cumem.CuMemAllocator.instance.release_pools()


class WorkerWrapper:
    """What an executor calls by method name; hands on to the worker what it lacks."""

    def __init__(self, worker: Worker, kv_transfer_config: Any = None) -> None:
        self.worker, self.rpc_rank = worker, 0
        self.vllm_config = SimpleNamespace(kv_transfer_config=kv_transfer_config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)

    def rpc(self, method: str, *args: Any) -> Any:
        return getattr(self, method)(*args)


class Process:
    """One process of an engine: vLLM's modules in sys.modules, and the plugin's function to call."""

    def __init__(self, patch: pytest.MonkeyPatch, torch: Any, version: str, *, cuda: bool = True) -> None:
        self.version, self.torch = version, torch
        self.release = tuple(int(part) for part in version.split(".")[:2])
        self.wrapper: Any = type("WorkerWrapperBase", (WorkerWrapper,), {})
        self.cumem = _module("vllm.device_allocator.cumem", CuMemAllocator=stock_class(), __file__=__file__)
        modules = [
            _module("vllm", __version__=version, __file__="/opt/vllm/__init__.py"),
            _module("vllm.platforms", current_platform=SimpleNamespace(is_cuda=lambda: cuda)),
            _module("vllm.device_allocator", cumem=self.cumem),
            self.cumem,
            _module("vllm.v1"),
            _module("vllm.v1.worker"),
            _module("vllm.v1.worker.worker_base", WorkerWrapperBase=self.wrapper),
        ]
        for module in modules:
            patch.setitem(sys.modules, module.__name__, module)

    def worker(self, *, sleep_mode: bool = True, kv_transfer_config: Any = None) -> Any:
        worker = Worker(self.torch, self.cumem, self.release, sleep_mode)  # type: ignore[arg-type]  # two parts
        return self.wrapper(worker, kv_transfer_config)

    def served(self, **options: Any) -> Any:
        """A worker after the steps of a start, as executors take them."""
        made = self.worker(**options)
        for method in ("load_model", "initialize_from_config", "compile_or_warm_up_model"):
            made.rpc(method)
        return made


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    return module
