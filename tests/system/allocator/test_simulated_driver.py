"""The simulated driver's own promises, through its exported calls alone: what the allocator's tests rest on."""

import ctypes
import struct
from collections.abc import Callable, Iterator
from ctypes import byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p

import pytest

from allocator.box import SimulatedBox
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.driver_calls import PAGE, PTX, Calls, digest

NOT_FOUND, NOT_READY, ILLEGAL_ADDRESS, INVALID_HANDLE, OUT_OF_MEMORY = 500, 600, 700, 400, 2


@pytest.fixture
def calls(driver: SimulatedDriver) -> Iterator[Calls]:
    with driver.context():
        made = Calls(driver)
        yield made
        made.close()


# What leaves the driver unusable, or needs a box of its own, runs in a process of its own.
CHILD = """
from ctypes import *
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.driver_calls import Calls, PAGE
driver = SimulatedDriver()
with driver.context():
    calls = Calls(driver)
"""


def in_child(child: Callable[..., object], body: str, **env: str) -> list[str]:
    program = CHILD + "\n".join("    " + line for line in body.strip().splitlines())
    return child(program, **env).rest().split()  # type: ignore[attr-defined,no-any-return]


def test_the_digest_kernel_adds_the_digest_of_each_chunk(calls: Calls, pattern: Callable[[int, int], bytes]) -> None:
    data, out, nbytes = calls.memory(2 * PAGE), calls.memory(PAGE), 2 * PAGE - 40
    content = pattern(3, nbytes)
    ctypes.memmove(data, content, nbytes)
    ctypes.memset(out, 0, PAGE)
    module, function = calls.digest_kernel()
    assert calls.launch(function, None, data, nbytes, 1024, out) == 0
    calls.ok("cuCtxSynchronize")
    words = struct.unpack("<16Q", ctypes.string_at(out, 128))
    expected = [word for at in range(0, nbytes, 1024) for word in digest(content[at : at + 1024])]
    assert list(words) == expected
    calls.ok("cuModuleUnload", module)
    assert calls("cuModuleUnload", module) == INVALID_HANDLE
    assert calls.launch(function, None, data, nbytes, 1024, out) == INVALID_HANDLE


def test_the_digest_kernel_reads_when_it_runs_and_not_when_it_is_launched(calls: Calls) -> None:
    data, out = calls.memory(PAGE), calls.memory(PAGE)
    ctypes.memset(out, 0, PAGE)
    _, function = calls.digest_kernel()
    with calls.driver.stream() as raw:
        stream = c_void_p(raw)
        calls.driver.hold(True)
        calls.driver.launch(raw, data, PAGE, 7, held=True)
        assert calls.launch(function, stream, data, PAGE, PAGE, out) == 0
        calls.driver.hold(False)
        calls.ok("cuStreamSynchronize", stream)
    assert struct.unpack("<2Q", ctypes.string_at(out, 16)) == digest(b"\x07" * PAGE)


def test_an_unknown_kernel_and_an_image_that_is_no_code_are_refused(calls: Calls) -> None:
    module, function = c_void_p(), c_void_p()
    assert calls("cuModuleLoadData", byref(module), b"\x7fELF") == 200
    for image, name in ((PTX, b"other"), (PTX.replace(b"rotator_digest", b"other"), b"rotator_digest")):
        calls.ok("cuModuleLoadData", byref(module), image)
        assert calls("cuModuleGetFunction", byref(function), module, name) == NOT_FOUND


def test_kernels_and_events_of_another_device_are_refused(calls: Calls) -> None:
    _, function = calls.digest_kernel()
    event = calls.event()
    data = calls.memory(PAGE)
    with calls.driver.context(1):
        stream = calls.stream()
        assert calls.launch(function, stream, data, PAGE, PAGE, data) == INVALID_HANDLE
        assert calls("cuEventRecord", event, stream) == INVALID_HANDLE
        calls.ok("cuStreamDestroy_v2", stream)


def test_a_copy_within_the_device_moves_bytes_in_the_order_of_its_stream(calls: Calls) -> None:
    source, target, stream = calls.memory(PAGE), calls.memory(PAGE), calls.stream()
    calls.ok("cuMemsetD8Async", c_ulonglong(source), ctypes.c_ubyte(5), c_size_t(PAGE), stream)
    calls.ok("cuMemcpyDtoDAsync_v2", c_ulonglong(target), c_ulonglong(source), c_size_t(PAGE), stream)
    calls.ok("cuStreamSynchronize", stream)
    assert ctypes.string_at(target, PAGE) == b"\x05" * PAGE
    assert calls("cuMemcpyDtoDAsync_v2", c_ulonglong(target), c_ulonglong(16), c_size_t(PAGE), stream) == 1


def test_a_wait_is_for_the_recording_that_was_there_when_it_was_queued(calls: Calls) -> None:
    """A ring of two buffers records the same event again while waits for its first recording are still queued."""
    event = calls.event()
    with calls.driver.stream() as first, calls.driver.stream() as second:
        calls.ok("cuEventRecord", event, c_void_p(first))
        calls.ok("cuStreamWaitEvent", c_void_p(second), event, c_uint(0))
        calls.driver.hold(True)
        address = calls.memory(PAGE)
        calls.driver.launch(first, address, PAGE, 1, held=True)
        calls.ok("cuEventRecord", event, c_void_p(first))
        assert calls("cuEventQuery", event) == NOT_READY
        assert calls("cuStreamQuery", c_void_p(second)) == 0
        calls.ok("cuStreamWaitEvent", c_void_p(second), event, c_uint(0))
        assert calls("cuStreamQuery", c_void_p(second)) == NOT_READY
        calls.driver.hold(False)
        calls.ok("cuStreamSynchronize", c_void_p(second))
        calls.ok("cuEventSynchronize", event)


def test_priorities_have_a_range_and_a_stream_stays_within_it(calls: Calls) -> None:
    least, greatest = c_int(), c_int()
    calls.ok("cuCtxGetStreamPriorityRange", byref(least), byref(greatest))
    assert least.value > greatest.value
    for priority in (least.value, greatest.value, 99, -99):
        calls.ok("cuStreamDestroy_v2", calls.stream(priority))


def test_memory_unmapped_under_the_digest_kernel_is_an_illegal_address(child) -> None:  # type: ignore[no-untyped-def]
    body = """
data, out = calls.memory(PAGE), calls.memory(PAGE)
_, function = calls.digest_kernel()
with driver.stream() as stream:
    driver.hold(True)
    driver.launch(stream, data, PAGE, 1, held=True)
    print(calls.launch(function, c_void_p(stream), data, PAGE, PAGE, out))
    print(calls.unmap(out, PAGE))
    driver.hold(False)
    print(driver.synchronize())
"""
    assert in_child(child, body) == ["0", "0", str(ILLEGAL_ADDRESS)]


def test_host_memory_unregistered_under_a_copy_is_an_illegal_address(child, tmp_path) -> None:  # type: ignore[no-untyped-def]
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=1)
    body = """
data, host = calls.memory(PAGE), create_string_buffer(PAGE)
calls.ok("cuMemHostRegister_v2", host, c_size_t(PAGE), c_uint(1))
stream = calls.stream(-1)
calls.ok("cuMemcpyDtoHAsync_v2", host, c_ulonglong(data), c_size_t(PAGE), stream)
calls("cuMemHostUnregister", host)
print(driver.synchronize())
"""
    assert in_child(child, body, **box.env()) == [str(ILLEGAL_ADDRESS)]


def test_a_copy_from_memory_that_a_kernel_writes_is_torn(child, tmp_path) -> None:  # type: ignore[no-untyped-def]
    box = SimulatedBox.create(tmp_path / "box", devices=1, copy_gib_s=1)
    body = """
data, host = calls.memory(PAGE), create_string_buffer(PAGE)
calls.ok("cuMemHostRegister_v2", host, c_size_t(PAGE), c_uint(1))
with driver.stream() as writer:
    driver.write_for(writer, data, PAGE, 200, 400)
    copier, torn = calls.stream(), 0
    for _ in range(8):
        calls.ok("cuMemcpyDtoHAsync_v2", host, c_ulonglong(data), c_size_t(PAGE), copier)
        calls.ok("cuStreamSynchronize", copier)
        torn += host.raw[0] != host.raw[-1]
    print(torn > 0)
    calls.ok("cuStreamSynchronize", c_void_p(writer))
    print(string_at(data, PAGE) == bytes([200]) * PAGE)
"""
    assert in_child(child, body, **box.env()) == ["True", "True"]


def test_on_unified_memory_pinned_pages_and_device_pages_come_out_of_one_pool(child, tmp_path) -> None:  # type: ignore[no-untyped-def]
    box = SimulatedBox.create(tmp_path / "box", devices=1, memory_bytes=1 << 30, integrated=True)
    assert SimulatedBox.open(box.path) == box
    body = """
integrated, host = c_int(), create_string_buffer(40 * PAGE)
calls.ok("cuDeviceGetAttribute", byref(integrated), c_int(18), c_int(0))
print(integrated.value)
address = calls.memory(32 * PAGE)
print(calls("cuMemHostRegister_v2", host, c_size_t(40 * PAGE), c_uint(1)))
print(calls("cuMemHostRegister_v2", host, c_size_t(32 * PAGE), c_uint(1)))
print(driver.bytes_used() // PAGE)
calls.ok("cuMemHostUnregister", host)
print(driver.bytes_used() // PAGE)
"""
    assert in_child(child, body, **box.env()) == ["1", str(OUT_OF_MEMORY), "0", "64", "32"]
