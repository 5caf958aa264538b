"""What the patches on vLLM's sleep allocator share: the target, and a rig that runs the file over a fake driver."""

from __future__ import annotations

import ast
import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from overlays.errors import ShapeUnknown
from overlays.patch import Files, Target
from overlays.probing import stub

GRANULARITY = 2 * 1024 * 1024  # of cuMemCreate on every card that vLLM supports


def _is_cumem(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.ClassDef)
        and node.name == "CuMemAllocator"
        and {"sleep", "wake_up", "_python_free_callback"}
        <= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        for node in tree.body
    )


CUMEM = Target(
    paths=("vllm/device_allocator/cumem.py",),
    shape=_is_cumem,
    search=("vllm/*.py",),
    needle=b"class CuMemAllocator",
)


class DriverError(RuntimeError):
    """What the C extension raises in Python."""


class FakeDriver:
    """cuMem* with real bytes and the C extension's habits: one error code for the process, no undo.

    `fail[call]` is how many calls of that name succeed before one fails, `lasting[call]` before all do. Addresses are
    numbers; what is mapped has bytes, filled with 0xFF when it is new.
    """

    def __init__(self, order: list[str]) -> None:
        self.order = order
        self.fail: dict[str, int] = {}
        self.lasting: dict[str, int] = {}
        self.error = ""  # the process-wide error code
        self.handles: dict[int, int] = {}  # physical memory: handle -> bytes
        self.mapped: dict[int, list[int]] = {}  # address -> [bytes, handle]
        self.data: dict[int, bytearray] = {}
        self.reserved: dict[int, int] = {}
        self._next = 0x7_0000_0000
        self._next_handle = 0x100
        self._cells: dict[int, ctypes.c_ulonglong] = {}

    def check(self, call: str, good: bool = True, why: str = "invalid argument") -> bool:
        """One driver call: whether it works."""
        self.order.append(call)
        if call in self.lasting:
            self.lasting[call] -= 1
            if self.lasting[call] < 0:
                return False
        if call in self.fail:
            self.fail[call] -= 1
            if self.fail[call] < 0:
                del self.fail[call]
                return False
        return good

    def _note(self, good: bool, why: str) -> bool:
        if not good:
            self.error = why
        return not self.error

    # The C extension's two entries.

    def python_create_and_map(self, device: int, size: int, address: int, cell: int) -> None:
        self._create_and_map(size, address, cell)
        self._raise()

    def python_unmap_and_release(self, device: int, size: int, address: int, cell: int) -> None:
        self._unmap_and_release(size, address, cell)
        self._raise()

    def _raise(self) -> None:
        if self.error:
            text, self.error = f"CUDA Error: {self.error}", ""
            raise DriverError(text)

    def _create_and_map(self, size: int, address: int, cell: int) -> None:
        created = self.check("create")
        if created:
            self._next_handle += 1
            self.handles[self._next_handle] = size
            ctypes.c_ulonglong.from_address(cell).value = self._next_handle
        if not self._note(created, "out of memory"):
            return
        handle = ctypes.c_ulonglong.from_address(cell).value
        if not self._note(self.map(address, size, handle), "invalid argument"):
            return
        self._note(self.check("set_access"), "invalid argument")

    def _unmap_and_release(self, size: int, address: int, cell: int) -> None:
        if not self._note(self.unmap(address, size), "invalid argument"):
            return
        handle = ctypes.c_ulonglong.from_address(cell).value
        self._note(self.release(handle), "invalid argument")

    # The driver itself.

    def map(self, address: int, size: int, handle: int) -> bool:
        free = not any(start < address + size and address < start + held[0] for start, held in self.mapped.items())
        if not self.check("map", free and handle in self.handles):
            return False
        self.mapped[address] = [size, handle]
        self.data[address] = bytearray(b"\xff" * min(size, 64))
        return True

    def unmap(self, address: int, size: int) -> bool:
        inside = [start for start in self.mapped if address <= start < address + size]
        whole = size > 0 and sum(self.mapped[start][0] for start in inside) == size
        if not self.check("unmap", whole):
            return False
        for start in inside:
            del self.mapped[start], self.data[start]
        return True

    def release(self, handle: int) -> bool:
        if not self.check("release", handle in self.handles):
            return False
        del self.handles[handle]
        return True

    def physical_bytes(self) -> int:
        """Memory that is held, by handles or by what is mapped."""
        mapped = {handle: size for size, handle in self.mapped.values()}
        return sum({**mapped, **self.handles}.values())

    # my_malloc and my_free.

    def malloc(self, size: int, callback: Callable[[tuple[int, int, int, int]], None]) -> int:
        """An address, or 0 as torch sees an out of memory."""
        if self.error:
            return 0
        address, self._next = self._next, self._next + size
        self.reserved[address] = size
        cell = ctypes.c_ulonglong(0)
        place = ctypes.addressof(cell)
        self._cells[place] = cell
        callback((0, size, address, place))
        self._create_and_map(size, address, place)
        return 0 if self.error else address

    def free(self, address: int, size: int, callback: Callable[[int], Any]) -> None:
        """Raises what the callback raises: the real one returns holding the interpreter's lock then."""
        answer = callback(address)
        if not isinstance(answer, tuple) or len(answer) != 4:
            raise TypeError("Expected a tuple of size 4")
        _, _, place, cell = answer
        self._unmap_and_release(size, place, cell)
        self.reserved.pop(place, None)
        self._cells.pop(cell, None)


class FakeTensor:
    """A host tensor of bytes; of large ones only the first 64 bytes exist."""

    def __init__(self, size: int) -> None:
        self.size_bytes = size
        self.bytes = bytearray(b"\xee" * min(size, 64))

    def data_ptr(self) -> int:
        return id(self)

    def numel(self) -> int:
        return self.size_bytes

    def element_size(self) -> int:
        return 1

    def nbytes(self) -> int:
        return self.size_bytes


class Rig:
    """CuMemAllocator of the build under probe, over a fake driver and a fake torch."""

    def __init__(self, files: Files, extra: dict[str, object] | None = None) -> None:
        self.order: list[str] = []
        self.driver = FakeDriver(self.order)
        self.tensors: dict[int, FakeTensor] = {}
        self.segments: list[dict[str, int]] = []  # what a pool's snapshot() says
        torch = self._torch()
        modules: dict[str, object] = {
            "torch": torch,
            "vllm.cumem_allocator": SimpleNamespace(
                init_module=lambda malloc, free: None,
                python_create_and_map=self.driver.python_create_and_map,
                python_unmap_and_release=self.driver.python_unmap_and_release,
            ),
            "vllm.distributed.device_communicators.cuda_wrapper": SimpleNamespace(CudaRTLibrary=self._cudart),
            "ctypes": self._ctypes(),
            "gc": stub("gc"),
        }
        shared = "vllm/device_allocator/__init__.py"
        if b"AllocationData" in (files.read(shared) or b""):
            modules["vllm.device_allocator"] = files.load(shared, {"torch": torch})
        modules.update(extra or {})
        self.module = files.load("cumem", modules)
        if not getattr(self.module, "cumem_available", False):
            raise ShapeUnknown("the file does not find its C extension under probe")
        self.allocator = self.module.CuMemAllocator.get_instance()

    def allocate(self, tag: str, size: int = GRANULARITY, fill: int = 0x11) -> int:
        """One block with bytes in it, made as torch makes one in a region."""
        before = self.allocator.current_tag
        self.allocator.current_tag = tag
        address = self.driver.malloc(size, self.allocator.python_malloc_callback)
        self.allocator.current_tag = before
        if address:
            self.driver.data[address][:] = bytes([fill]) * len(self.driver.data[address])
        return address

    def free(self, address: int) -> None:
        self.driver.free(address, self.driver.reserved.get(address, GRANULARITY), self.allocator.python_free_callback)

    def content(self, address: int) -> int | None:
        """The byte that fills a block; None if it is not mapped or not of one byte."""
        data = self.driver.data.get(address, bytearray())
        return data[0] if data and len(set(data)) == 1 else None

    def _torch(self) -> Any:
        def log(name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: self.order.append(name)

        both = {"synchronize": log("synchronize"), "empty_cache": log("empty_cache")}
        memory = stub("torch.cuda.memory", MemPool=self._pool)
        return stub(
            "torch",
            empty=self._empty,
            cuda=stub("torch.cuda", memory=memory, **both),
            accelerator=stub("torch.accelerator", **both),
        )

    def _pool(self, *args: object) -> Any:
        return SimpleNamespace(id=(0, 1), snapshot=lambda: [dict(segment) for segment in self.segments])

    def _empty(self, size: int, **_: object) -> FakeTensor:
        if not self.driver.check("pin"):
            raise DriverError("cannot pin host memory")
        tensor = FakeTensor(size)
        self.tensors[tensor.data_ptr()] = tensor
        return tensor

    def _cudart(self) -> Any:
        return stub("cudart", cudaMemcpy=self._copy, cudaMemset=self._set)

    def _copy(self, to: int, source: int, size: int) -> None:
        ours = to in self.tensors
        call = "copy_out" if ours else "copy_in"
        device = source if ours else to
        if not self.driver.check(call, device in self.driver.data):
            raise DriverError(f"CUDART error: {call} failed")
        if ours:
            self.tensors[to].bytes[:] = self.driver.data[source]
        else:
            self.driver.data[to][:] = self.tensors[source].bytes

    def _set(self, to: int, value: int, size: int) -> None:
        self.driver.data[to][:] = bytes([value]) * len(self.driver.data[to])

    def _ctypes(self) -> Any:
        """ctypes as it is, but for libcuda, which is the fake."""
        return stub(
            "ctypes", **{**{n: getattr(ctypes, n) for n in dir(ctypes)}, "CDLL": lambda *a, **k: self._libcuda()}
        )

    def _libcuda(self) -> Any:
        def plain(value: Any) -> int:
            return int(getattr(value, "value", value))

        def retain(cell: Any, address: Any) -> int:
            held = self.driver.mapped.get(plain(address))
            if held is None:
                return 1
            ctypes.cast(cell, ctypes.POINTER(ctypes.c_ulonglong))[0] = held[1]
            return 0

        def put(address: Any, size: Any, offset: Any, handle: Any, flags: Any) -> int:
            return 0 if self.driver.map(plain(address), plain(size), plain(handle)) else 1

        return SimpleNamespace(
            cuMemRetainAllocationHandle=retain,
            cuMemRelease=lambda handle: 0 if self.driver.release(plain(handle)) else 1,
            cuMemMap=put,
            cuMemUnmap=lambda address, size: 0 if self.driver.unmap(plain(address), plain(size)) else 1,
        )
