"""Run by test_allocator_library.py: the plugin over doubles of vLLM and torch, and the true library below them.

The simulated driver's memory is host memory, so content is written and read at the addresses that torch would use.
"""

import ctypes
import sys
import time
from typing import Any

import pytest

from allocator import _native
from allocator.simdriver import SimulatedDriver
from allocator.vllm import register
from tests.contract.vllm.fake_vllm import Process
from tests.unit.allocator.fake_torch import FakeTensor, FakeTorch

MIB = 1 << 20


def library_functions() -> tuple[Any, Any]:
    library = _native.library()

    def malloc(name: str, nbytes: int) -> int:
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        return int(function(nbytes, 0, None) or 0)

    def free(address: int) -> None:
        library.rotator_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        library.rotator_free.restype = None
        library.rotator_free(address, 0, 0, None)

    return malloc, free


def fill(tensor: FakeTensor, byte: int) -> None:
    ctypes.memset(tensor.data_ptr(), byte, MIB)


def first_byte(tensor: FakeTensor) -> int:
    return ctypes.c_ubyte.from_address(tensor.data_ptr()).value


def main() -> None:
    version = sys.argv[1]
    torch = FakeTorch(*library_functions())
    sys.modules["torch"] = torch.module
    simulated = SimulatedDriver()
    with simulated.context(), pytest.MonkeyPatch.context() as patch:
        process = Process(patch, torch, version)
        register()
        worker = process.served()
        weights, *rest = worker.worker.model_runner.kept
        for number, tensor in enumerate([weights, *rest]):
            fill(tensor, 10 + number)
        while worker.rpc("rotator_memory")["prepare"]["running"]:
            time.sleep(0.01)
        used_awake = simulated.bytes_used(0)
        for level in (1, 2):
            worker.rpc("sleep", level)
            assert simulated.bytes_used(0) < used_awake // 20, "the device's bytes did not go back"
            worker.rpc("wake_up", None)
            assert simulated.bytes_used(0) == used_awake
            assert first_byte(weights) == (10 if level == 1 else 0)
            kept = [first_byte(tensor) for tensor in rest]
            cache = next(i for i, tensor in enumerate(rest) if tensor._nbytes == 32 * MIB)
            assert kept[cache] == 0, kept
            runtime = next(i for i, tensor in enumerate(rest) if tensor._nbytes == 2 * MIB)
            assert kept[runtime] == 11 + runtime, kept
        worker.worker.model_runner.kept.clear()
        del weights, rest, tensor
        worker.rpc("shutdown")
        instance = process.cumem.CuMemAllocator.instance
        assert instance.get_current_usage() == 0
        instance.torch.close()
        assert simulated.bytes_used(0, own=True) == 0
        assert simulated.bytes_registered() == 0
    print("whole")


if __name__ == "__main__":
    main()
