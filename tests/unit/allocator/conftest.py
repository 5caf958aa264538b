from collections.abc import Callable, Iterator
from typing import Any

import pytest

from allocator import TorchAllocator
from tests.unit.allocator.fake_memory import FakeMemory
from tests.unit.allocator.fake_torch import FakeTorch


class Bench:
    """A torch double over a memory double, and the allocator under test over both."""

    def __init__(self, install: Callable[[Any], None], **torch: Any) -> None:
        self.memory = FakeMemory()
        self.torch = FakeTorch(self.memory.malloc, self.memory.free, **torch)
        install(self.torch.module)
        self.allocator = TorchAllocator(self.memory)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**torch: Any) -> Bench:
        made.append(Bench(lambda module: monkeypatch.setitem(__import__("sys").modules, "torch", module), **torch))
        return made[-1]

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    yield build
    for bench in made:
        bench.allocator.close()
        assert not bench.torch.aborted, "torch would have aborted the process"
