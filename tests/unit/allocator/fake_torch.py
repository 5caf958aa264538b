"""A hand-written double of the part of torch that regions use, with torch's rules about pools:

- a pool whose object was dropped gives back what it cached, at once and on every later empty_cache;
- dropping one while any pool is in use or a graph is captured aborts the process (here: `torch.aborted`);
- routing is per thread; `innermost=False` is a release that uses the outermost of nested pools;
- a settings string resets every option that it lacks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

SEGMENT = 2 << 20


@dataclass
class PoolState:
    id: tuple[int, int]
    function: Any
    cached: list[tuple[int, int]] = field(default_factory=list)
    live: dict[int, int] = field(default_factory=dict)
    dropped: bool = False

    def empty(self) -> None:
        while self.cached:
            address, nbytes = self.cached.pop()
            self.function.free(address, nbytes)


class FakeTensor:
    def __init__(self, torch: FakeTorch, address: int, nbytes: int, state: PoolState | None) -> None:
        self._torch, self._address, self._nbytes, self._state = torch, address, nbytes, state

    def data_ptr(self) -> int:
        return self._address

    @property
    def function(self) -> str:
        return self._state.function.malloc_name if self._state else "default"

    def __del__(self) -> None:
        if self._state is not None:
            self._state.cached.append((self._address, self._state.live.pop(self._address)))


class FakeTorch:
    """`module` goes into sys.modules as `torch`. `malloc` and `free` stand for the library's functions."""

    uint8 = "uint8"

    def __init__(
        self,
        malloc: Callable[[str, int], int],
        free: Callable[[int], None],
        *,
        version: str = "2.11.0",
        innermost: bool = True,
        settings: str = "",
    ) -> None:
        self.malloc, self.free, self.innermost = malloc, free, innermost
        self.settings, self.writes = settings, list[str]()
        self.stuck = False  # expandable segments stay on whatever is written
        self.pools: list[PoolState] = []
        self.open: list[tuple[int, PoolState]] = []
        self.capturing, self.aborted, self.synchronized = 0, False, 0
        self.backend, self.available = "native", True
        torch = self

        class CUDAPluggableAllocator:
            def __init__(self, path: str, malloc_name: str, free_name: str) -> None:
                assert free_name == "rotator_free"
                self.path, self.malloc_name = path, malloc_name

            def allocator(self) -> CUDAPluggableAllocator:
                return self

            def free(self, address: int, nbytes: int) -> None:
                torch.free(address)

        class MemPool:
            def __init__(self, function: Any) -> None:
                self._state = PoolState((0, len(torch.pools) + 1), function)
                torch.pools.append(self._state)

            @property
            def id(self) -> tuple[int, int]:
                return self._state.id

            def snapshot(self) -> list[dict[str, int]]:
                held = [*self._state.cached, *self._state.live.items()]
                return [{"address": address, "total_size": nbytes} for address, nbytes in held]

            def __del__(self) -> None:
                torch.aborted = torch.aborted or bool(torch.open) or torch.capturing > 0
                self._state.dropped = True
                self._state.empty()

        class CUDAGraph:
            def __init__(self, *, refuses: bool = False) -> None:
                self._refuses = refuses

            def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
                if self._refuses:
                    raise RuntimeError("this capture is refused")
                torch.capturing += 1

            def capture_end(self) -> None:
                torch.capturing -= 1

        memory = SimpleNamespace(
            CUDAPluggableAllocator=CUDAPluggableAllocator,
            get_allocator_backend=lambda: self.backend,
            _snapshot=self._snapshot,
        )
        cuda = SimpleNamespace(
            MemPool=MemPool,
            CUDAGraph=CUDAGraph,
            use_mem_pool=self._use_mem_pool,
            memory=memory,
            is_available=lambda: self.available,
            is_initialized=lambda: True,
            synchronize=self._synchronize,
            empty_cache=self._empty_cache,
            current_device=lambda: 0,
            is_current_stream_capturing=lambda: self.capturing > 0,
        )
        self.module: Any = SimpleNamespace(
            __version__=version,
            version=SimpleNamespace(cuda="13.0"),
            uint8="uint8",
            cuda=cuda,
            empty=self.empty,
            _C=SimpleNamespace(_accelerator_setAllocatorSettings=self._write),
        )

    def empty(self, nbytes: int, dtype: str = "uint8", device: str = "cuda") -> FakeTensor:
        mine = [state for thread, state in self.open if thread == threading.get_ident()]
        if not mine:
            return FakeTensor(self, -1, nbytes, None)
        state = mine[-1 if self.innermost else 0]
        size = -(-nbytes // SEGMENT) * SEGMENT
        found = next((entry for entry in state.cached if entry[1] == size), None)
        if found is not None:
            state.cached.remove(found)
        address = found[0] if found else self.malloc(state.function.malloc_name, size)
        if address == 0:
            raise RuntimeError("CUDA out of memory")
        state.live[address] = size
        return FakeTensor(self, address, size, state)

    @contextmanager
    def _use_mem_pool(self, pool: Any, device: Any = None) -> Iterator[None]:
        entry = (threading.get_ident(), next(state for state in self.pools if state.id == pool.id))
        self.open.append(entry)
        try:
            yield
        finally:
            self.open.remove(entry)

    def _synchronize(self, device: int | None = None) -> None:
        self.synchronized += 1

    def _empty_cache(self) -> None:
        for state in self.pools:
            if state.dropped:
                state.empty()

    def _snapshot(self) -> dict[str, Any]:
        expandable = "expandable_segments:True" in self.settings or self.stuck
        return {"allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": self.settings, "expandable_segments": expandable}}

    def _write(self, settings: str) -> None:
        self.settings = settings
        self.writes.append(settings)
