import asyncio
import threading
from collections.abc import Callable

import pynvml
import pytest

from rotator.adapters.devices import NvmlDevices
from rotator.ports import DeviceError, DeviceTimeout, HostMemory
from tests.unit.adapters.nvml_fake import GIB, FakeGpu, FakeNvml


def devices(
    nvml: FakeNvml, *, sees_all_pids: bool = True, pid_exists: Callable[[int], bool] = lambda pid: True
) -> NvmlDevices:
    return NvmlDevices(
        nvml,
        host_memory=lambda: HostMemory(128 * GIB, 100 * GIB),
        pid_exists=pid_exists,
        sees_all_pids=lambda: sees_all_pids,
    )


async def test_the_inventory_names_each_gpu_and_the_bytes_that_processes_can_hold():
    first, second = await devices(FakeNvml(FakeGpu("GPU-a"), FakeGpu("GPU-b"))).inventory(deadline_s=5)
    assert (first.id, first.index, first.name, first.total_bytes) == ("GPU-a", 0, "Fake GPU", 95 * GIB)
    assert (first.compute_capability, first.pci_bus_id, first.unified_memory) == ((12, 0), "00000000:01:00.0", False)
    assert (second.id, second.index) == ("GPU-b", 1)


async def test_a_gpu_is_read_without_an_inventory_before():
    gpu = FakeGpu("GPU-a")
    gpu.used, gpu.compute = 7 * GIB, [(41, 4 * GIB), (42, 3 * GIB)]
    reading = await devices(FakeNvml(gpu)).read("GPU-a", deadline_s=5)
    assert (reading.used_bytes, reading.total_bytes) == (7 * GIB, 95 * GIB)
    assert reading.by_pid == {41: 4 * GIB, 42: 3 * GIB}
    assert reading.utilization is None


async def test_a_process_that_computes_and_draws_is_counted_once_and_one_on_two_slices_twice():
    gpu = FakeGpu("GPU-a")
    gpu.compute, gpu.graphics = [(41, 4 * GIB), (42, GIB), (42, GIB)], [(41, 4 * GIB), (43, GIB)]
    reading = await devices(FakeNvml(gpu)).read("GPU-a", deadline_s=5)
    assert reading.by_pid == {41: 4 * GIB, 42: 2 * GIB, 43: GIB}


async def test_bytes_by_process_are_unknown_where_the_driver_gives_no_size():
    gpu = FakeGpu("GPU-a")
    gpu.compute = [(41, 4 * GIB), (42, None)]
    assert (await devices(FakeNvml(gpu)).read("GPU-a", deadline_s=5)).by_pid is None


async def test_bytes_by_process_are_unknown_where_pids_are_of_another_namespace():
    gpu = FakeGpu("GPU-a")
    gpu.used, gpu.compute = 4 * GIB, [(41, 2 * GIB), (42, 2 * GIB)]
    watched = devices(FakeNvml(gpu), sees_all_pids=False, pid_exists=lambda pid: pid == 41)
    assert (await watched.read("GPU-a", deadline_s=5)).by_pid is None


async def test_a_process_that_ends_during_a_reading_is_not_taken_for_one_of_another_namespace():
    gpu = FakeGpu("GPU-a")
    gpu.used, gpu.compute = 4 * GIB, [(41, 2 * GIB), (42, 2 * GIB)]
    gpu.on_list = lambda: gpu.compute.__setitem__(slice(None), [(41, 2 * GIB)])
    watched = devices(FakeNvml(gpu), sees_all_pids=False, pid_exists=lambda pid: pid == 41)
    assert (await watched.read("GPU-a", deadline_s=5)).by_pid == {41: 2 * GIB}


async def test_an_empty_list_beside_bytes_in_use_is_no_answer_in_a_container_and_an_answer_on_the_machine():
    gpu = FakeGpu("GPU-a")
    gpu.used = 40 * GIB
    assert (await devices(FakeNvml(gpu), sees_all_pids=False).read("GPU-a", deadline_s=5)).by_pid is None
    assert (await devices(FakeNvml(gpu), sees_all_pids=True).read("GPU-a", deadline_s=5)).by_pid == {}
    gpu.used = 0
    assert (await devices(FakeNvml(gpu), sees_all_pids=False).read("GPU-a", deadline_s=5)).by_pid == {}


async def test_unified_memory_is_read_from_the_host():
    gpu = FakeGpu("GPU-a")
    gpu.memory_fails = pynvml.NVML_ERROR_NOT_SUPPORTED
    watched = devices(FakeNvml(gpu))
    (info,) = await watched.inventory(deadline_s=5)
    reading = await watched.read("GPU-a", deadline_s=5)
    assert info.unified_memory
    assert info.total_bytes == reading.total_bytes == 128 * GIB
    assert reading.used_bytes == 28 * GIB


async def test_a_driver_without_the_second_memory_query_is_asked_the_first():
    gpu, nvml = FakeGpu("GPU-a"), FakeNvml()
    gpu.used, nvml.gpus, nvml.knows_v2 = 5 * GIB, [gpu], False
    reading = await devices(nvml).read("GPU-a", deadline_s=5)
    assert (reading.used_bytes, reading.total_bytes) == (6 * GIB, 96 * GIB)


async def test_a_machine_without_a_driver_is_told_so_with_what_to_do():
    nvml = FakeNvml()
    nvml.init_fails = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    with pytest.raises(DeviceError, match=r"no NVIDIA driver library found.*install the NVIDIA driver"):
        await devices(nvml).inventory(deadline_s=5)


async def test_a_lost_gpu_is_told_in_nvmls_words_and_read_again_when_it_is_back():
    gpu = FakeGpu("GPU-a")
    watched = devices(FakeNvml(gpu))
    gpu.fails = pynvml.NVML_ERROR_GPU_IS_LOST
    with pytest.raises(DeviceError, match="GPU-a: NVML says: GPU is lost: it fell off the bus"):
        await watched.read("GPU-a", deadline_s=5)
    gpu.fails = None
    assert (await watched.read("GPU-a", deadline_s=5)).used_bytes == 0


async def test_a_gpu_that_nobody_knows_is_an_error():
    with pytest.raises(DeviceError, match="GPU-x: NVML says: Not Found: no GPU of that name"):
        await devices(FakeNvml(FakeGpu("GPU-a"))).read("GPU-x", deadline_s=5)


async def test_the_inventory_leaves_a_broken_gpu_out_and_has_it_again_later():
    broken, sound = FakeGpu("GPU-a"), FakeGpu("GPU-b")
    broken.fails = pynvml.NVML_ERROR_GPU_IS_LOST
    watched = devices(FakeNvml(broken, sound))
    assert [info.id for info in await watched.inventory(deadline_s=5)] == ["GPU-b"]
    broken.fails = None
    assert [info.id for info in await watched.inventory(deadline_s=5)] == ["GPU-a", "GPU-b"]


async def test_an_inventory_of_broken_gpus_only_is_an_error():
    broken = FakeGpu("GPU-a")
    broken.fails = pynvml.NVML_ERROR_GPU_IS_LOST
    with pytest.raises(DeviceError, match="GPU 0: NVML says: GPU is lost"):
        await devices(FakeNvml(broken)).inventory(deadline_s=5)


async def test_a_hung_gpu_holds_up_itself_only_and_is_not_piled_upon():
    hung, sound = FakeGpu("GPU-a"), FakeGpu("GPU-b")
    watched = devices(FakeNvml(hung, sound))
    await watched.inventory(deadline_s=5)
    hung.gate = threading.Event()
    hung.calls = 0
    with pytest.raises(DeviceTimeout, match=r"GPU 0: the driver did not answer within 0\.05 s"):
        await watched.read("GPU-a", deadline_s=0.05)
    for _ in range(100):
        with pytest.raises(DeviceTimeout, match="a driver call still hangs, since"):
            await watched.read("GPU-a", deadline_s=60)
    assert hung.calls == 1
    assert (await watched.read("GPU-b", deadline_s=5)).used_bytes == 0
    hung.gate.set()
    hung.gate, hung.used = None, GIB
    async with asyncio.timeout(5):
        assert await _read_when_back(watched) == GIB


async def _read_when_back(watched: NvmlDevices) -> int:
    while True:
        try:
            return (await watched.read("GPU-a", deadline_s=5)).used_bytes
        except DeviceTimeout:
            await asyncio.sleep(0)
