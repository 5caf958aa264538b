"""A tensor as the probes of the wake see it: garbage when its pages come back, until somebody zeroes it."""

from __future__ import annotations

import itertools

_addresses = itertools.count(1 << 20, 1 << 12)


class State:
    """A block of device memory with a shape. Touching it while it is not mapped is what a GPU would crash on."""

    def __init__(self, shape: tuple[int, ...] = (4, 8), mapped: bool = True) -> None:
        self.shape = shape
        self.mapped = mapped
        self.zeroed = 0
        self._address = next(_addresses)

    def zero_(self) -> State:
        if not self.mapped:
            raise RuntimeError("illegal address: the block is not mapped")
        self.zeroed += 1
        return self

    def data_ptr(self) -> int:
        return self._address

    def stride(self) -> tuple[int, ...]:
        return (self.shape[-1], 1)

    def numel(self) -> int:
        return self.shape[0] * self.shape[-1]
