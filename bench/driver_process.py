"""Processes that call the driver's memory functions and take the time, for benchmarks below the allocator.

Needs cuda-bindings and GPUs, but not to be imported.
"""

import gc
import importlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

GIB, MIB = 1 << 30, 1 << 20
SLAB = 256 * MIB
ANSWER_S = 90.0
LEAK_BYTES = 64 * MIB


class CannotRunError(Exception):
    """A driver call or a process failed; the text says which."""


class Steps(dict[str, float]):
    """Seconds by step."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + time.perf_counter() - begun


class Driver:
    """The driver's calls in the primary context of one device."""

    def __init__(self, device: int) -> None:
        gc.disable()  # one full collection with torch loaded takes 0.06 s
        self.api: Any = importlib.import_module("cuda.bindings.driver")
        self.device = device
        self("cuInit", 0)
        ordinal = self("cuDeviceGet", device)
        self.context = self("cuDevicePrimaryCtxRetain", ordinal)
        self("cuCtxSetCurrent", self.context)
        api = self.api
        rdma = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
        self.rdma = int(self("cuDeviceGetAttribute", rdma, ordinal))
        self.fd_type = api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self.access = api.CUmemAccessDesc()
        owner = self.properties(rdma=False, exportable=False)  # a location points into its owner
        self.access.location = owner.location
        self.access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def __call__(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self.api, name)(*arguments)
        if int(code) != 0:
            raise CannotRunError(f"{name} answered {getattr(code, 'name', code)} on device {self.device}")
        return values[0] if len(values) == 1 else tuple(values)

    def properties(self, rdma: bool, exportable: bool) -> Any:
        made = self.api.CUmemAllocationProp()
        made.type = self.api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        made.location.type = self.api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        made.location.id = self.device
        if exportable:
            made.requestedHandleTypes = self.fd_type
        if rdma:
            made.allocFlags.gpuDirectRDMACapable = self.rdma
        return made

    def free_bytes(self) -> int:
        self("cuCtxSynchronize")
        return int(self("cuMemGetInfo")[0])


class Region:
    """One tag: a reservation, and the handles to map there."""

    def __init__(self, driver: Driver, nbytes: int, handle_bytes: int = SLAB) -> None:
        self.driver, self.nbytes, self.handle_bytes = driver, nbytes, handle_bytes
        self.address = int(driver("cuMemAddressReserve", nbytes, 0, 0, 0))
        self.handles: list[Any] = []

    def offsets(self) -> range:
        return range(0, self.nbytes, self.handle_bytes)

    def create(self, properties: Any) -> None:
        self.handles = [self.driver("cuMemCreate", self.handle_bytes, properties, 0) for _ in self.offsets()]

    def map(self) -> None:
        for at, handle in zip(self.offsets(), self.handles, strict=True):
            self.driver("cuMemMap", self.address + at, self.handle_bytes, 0, handle, 0)

    def allow(self) -> None:
        self.driver("cuMemSetAccess", self.address, self.nbytes, [self.driver.access], 1)

    def unmap(self) -> None:
        self.driver("cuMemUnmap", self.address, self.nbytes)


def map_all(regions: Sequence[Region], steps: Steps) -> None:
    with steps.step("map"):
        for region in regions:
            region.map()
    with steps.step("access"):
        for region in regions:
            region.allow()


def serve(kind: Callable[..., Any], pipe: Any, arguments: tuple[Any, ...]) -> None:
    """A child: calls methods as it is told, and answers."""
    try:
        worker = kind(*arguments)
        while True:
            name, given = pipe.recv()
            pipe.send((True, getattr(worker, name)(*given)))
    except EOFError:
        return
    except Exception as problem:
        pipe.send((False, f"{type(problem).__name__}: {problem}"))


class Child:
    """One process, seen from the command."""

    def __init__(self, name: str, kind: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(kind, theirs, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, method: str, *arguments: Any) -> None:
        with suppress(BrokenPipeError):  # the answer tells why
            self.pipe.send((method, arguments))

    def answer(self) -> Any:
        if not self.pipe.poll(ANSWER_S):
            raise CannotRunError(f"{self.name} did not answer in {ANSWER_S:.0f} s")
        try:
            well, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise CannotRunError(f"{self.name} ended early") from None
        if not well:
            raise CannotRunError(f"{self.name}: {value}")
        return value

    def ask(self, method: str, *arguments: Any) -> Any:
        self.tell(method, *arguments)
        return self.answer()


def together(children: Sequence[Child], method: str, *arguments: Any) -> list[Any]:
    for child in children:
        child.tell(method, *arguments)
    answers, failures = [], []
    for child in children:
        try:
            answers.append(child.answer())
        except CannotRunError as problem:
            failures.append(str(problem))
    if failures:
        raise CannotRunError("; ".join(failures))
    return answers


def end(children: Sequence[Child]) -> None:
    for child in children:
        child.process.kill()
        child.process.join()


def middle(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {step: round(statistics.median(row[step] for row in rows), 5) for step in rows[0]}


def table(rows: Sequence[tuple[str, dict[str, float]]], steps: Sequence[str]) -> None:
    print(f"{'':34}" + "".join(f"{step:>9}" for step in steps))
    for label, values in rows:
        print(f"{label:34}" + "".join(f"{values[step]:9.4f}" if step in values else f"{'-':>9}" for step in steps))


def tell(phase: str, label: str, values: dict[str, Any], **more: Any) -> None:
    print(json.dumps({"phase": phase, "variant": label, **values, **more}), flush=True)


def no_leak(lost_bytes: Sequence[int]) -> bool:
    well = max(lost_bytes) <= LEAK_BYTES
    lost = ", ".join(f"{one / MIB:.0f}" for one in lost_bytes)
    print(f"{'no leak' if well else 'LEAK'}: {lost} MiB less free than before")
    return well
