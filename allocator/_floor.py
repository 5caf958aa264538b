"""What the self-test compares the allocator with, measured on the same device in the same run: the copy itself, and a
sleep and a wake as stock does them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from ctypes import c_size_t, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import TypeVar

from allocator._bare import BareDriver

T = TypeVar("T")
_TIMES = 3  # a floor is the best of so many


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of one copy of `nbytes` between pinned memory and the device, nothing else running: the best of three."""

    nbytes: int
    to_device_s: float
    to_host_s: float


@dataclass(frozen=True, slots=True)
class StockLike:
    """Seconds to sleep and to wake `pieces` allocations one after the other, each with a pinned buffer of its own."""

    pieces: int
    piece_nbytes: int
    sleep_s: float
    wake_s: float


def _timed(action: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def copy_floor(driver: BareDriver, nbytes: int) -> Floor:
    """Raises OutOfMemory where `nbytes` do not fit the device or cannot be pinned, DriverError."""
    with ExitStack() as stack:
        host, size = driver.pin(nbytes), c_size_t(nbytes)
        stack.callback(driver.unpin, host)
        address = c_ulonglong(stack.enter_context(driver.plain(nbytes)))
        stream = stack.enter_context(driver.stream())

        def best(name: str, to: object, source: object) -> float:
            def copy() -> None:
                driver.call(name, to, source, size, stream)
                driver.call("cuStreamSynchronize", stream)

            return min(_timed(copy)[0] for _ in range(_TIMES))

        to_device_s = best("cuMemcpyHtoDAsync_v2", address, host)
        return Floor(nbytes, to_device_s, best("cuMemcpyDtoHAsync_v2", host, address))


class _Stock:
    """Allocations that sleep and wake as stock's do. Knows at each moment what there is to give back."""

    def __init__(self, driver: BareDriver, addresses: list[int], piece_nbytes: int) -> None:
        self.driver, self.addresses, self.nbytes = driver, addresses, piece_nbytes
        self.handles: dict[int, int] = {}
        self.masters: list[c_void_p] = []

    def load(self) -> None:
        for address in self.addresses:
            self.handles[address] = self.driver.back(address, self.nbytes)

    def sleep(self) -> None:
        for address in self.addresses:
            # torch rounds the size of a pinned buffer up to a power of two.
            self.masters.append(self.driver.pin(1 << (self.nbytes - 1).bit_length()))
            self.driver.call("cuMemcpyDtoH_v2", self.masters[-1], c_ulonglong(address), c_size_t(self.nbytes))
            self.drop(address)

    def wake(self) -> None:
        for address, master in zip(self.addresses, self.masters, strict=True):
            self.handles[address] = self.driver.back(address, self.nbytes)
            self.driver.call("cuMemcpyHtoD_v2", c_ulonglong(address), master, c_size_t(self.nbytes))

    def drop(self, address: int) -> None:
        self.driver.drop(address, self.handles.pop(address), self.nbytes)

    def close(self) -> None:
        for address in list(self.handles):
            self.drop(address)
        while self.masters:
            self.driver.unpin(self.masters.pop())


def stock_like(driver: BareDriver, nbytes: int, piece_nbytes: int) -> StockLike:
    """Raises OutOfMemory where `nbytes` do not fit the device or cannot be pinned, DriverError."""
    pieces = max(1, nbytes // piece_nbytes)
    with ExitStack() as stack:
        addresses = [stack.enter_context(driver.reserved(piece_nbytes)) for _ in range(pieces)]
        stock = _Stock(driver, addresses, piece_nbytes)
        stack.callback(stock.close)
        stock.load()
        sleep_s, _ = _timed(stock.sleep)
        wake_s, _ = _timed(stock.wake)
    return StockLike(pieces, piece_nbytes, sleep_s, wake_s)
