"""`python -m allocator.selftest [--json]`: cycles with content checks, on the GPU or, without one, on a simulated box.

First what the machine is and allows, then a copy alone and a sleep and a wake as stock does them, then the allocator's
own, all on the same device and for the same bytes. On the simulated driver it also fails every single driver call of a
sleep and of a wake in turn, and checks that each leaves the allocator as it was and that a retry succeeds. A figure
that was not measured is null: no fault can be injected into a GPU's driver.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

from allocator._bare import BareDriver, DeviceFacts
from allocator._floor import copy_floor, stock_like
from allocator._limits import Limits, limits
from allocator.box import SimulatedBox
from allocator.core import Allocator
from allocator.errors import AllocatorError, DriverMissing, OutOfMemory
from allocator.simdriver import SimulatedDriver
from allocator.values import Segment

_SEED = 20
_MIB, _GIB = 1 << 20, 1 << 30
_GPU_BYTES, _SIMULATED_BYTES = 2 * _GIB, _GIB
_CHECK_BYTES = 64 * _MIB
# The upper bytes of bf16 values: a sign, and exponents of which each pair is half as frequent as the next.
_FEW_EXPONENTS = bytes(byte & 0x80 | (54 + (byte & 0x7F).bit_length()) for byte in range(256))
_PIECE_BYTES = 64 * _MIB  # the order of a layer's tensors; stock has one handle for each


@dataclass(slots=True)
class Findings:
    """Seconds are those of one cycle's median, bytes are shown bytes. The keys up to `stock_like_wake_s` stay."""

    driver: str
    cycles: int = 0
    faults_injected: int | None = None
    leaked_bytes: int | None = None
    content_ok: bool = True
    first_sleep_s: float | None = None
    sleep_s: float | None = None
    wake_s: float | None = None
    copy_floor_s: float | None = None
    stock_like_sleep_s: float | None = None
    stock_like_wake_s: float | None = None
    device: DeviceFacts | None = None
    limits: Limits | None = None
    bytes: int | None = None
    prepare_s: float | None = None
    copy_floor_gib_s: float | None = None
    copy_floor_to_host_s: float | None = None
    wake_gib_s: float | None = None
    stock_like_pieces: int | None = None
    packed_over_bytes: float | None = None
    packed_wake_s: float | None = None

    @property
    def ok(self) -> bool:
        return self.content_ok and not self.leaked_bytes


class Subject:
    """An allocator with a few segments whose content is known: noise, or as bf16 weights are, which can be packed."""

    def __init__(self, allocator: Allocator, weights_bytes: int, *, packable: bool = False) -> None:
        self.allocator, self.packable = allocator, packable
        draw = random.Random(_SEED)
        self.contents: dict[Segment, bytes] = {}
        for share in (0.5, 0.3, 0.2):
            segment = allocator.alloc(max(1, int(weights_bytes * share)))
            self.contents[segment] = self._pattern(draw, segment.content_nbytes)
        for segment, content in self.contents.items():
            allocator.write(segment, content)
        self.cache = allocator.alloc(max(1, weights_bytes // 4), tag="kv_cache")

    def _pattern(self, draw: random.Random, nbytes: int) -> bytes:
        block = bytearray(draw.randbytes(min(nbytes, _MIB)))
        if self.packable:
            block[1::2] = block[1::2].translate(_FEW_EXPONENTS)
        return (bytes(block) * (nbytes // len(block) + 1))[:nbytes]

    def intact(self) -> bool:
        return all(self._same(segment, at) for segment, pieces in self._pieces() for at in pieces)

    def sample_intact(self, number: int) -> bool:
        """One piece of each segment, the next one with the next number: all of 2 GiB takes seconds to read."""
        return all(self._same(segment, pieces[number % len(pieces)]) for segment, pieces in self._pieces())

    def _pieces(self) -> list[tuple[Segment, range]]:
        return [(segment, range(0, len(content), _CHECK_BYTES)) for segment, content in self.contents.items()]

    def _same(self, segment: Segment, at: int) -> bool:
        # Piece by piece: a whole segment more than once in host memory is too much on a small host.
        expected = self.contents[segment][at : at + _CHECK_BYTES]
        return self.allocator.read(segment, at, len(expected)) == expected

    def free(self) -> None:
        for segment in (*self.contents, self.cache):
            self.allocator.free(segment)
        self.allocator.collect()
        self.allocator.release_masters()


def _fails(operation: Callable[[], object]) -> bool:
    try:
        operation()
    except AllocatorError:
        return True
    return False


def _calls_of(simulated: SimulatedDriver, operation: Callable[[], object]) -> int:
    before = simulated.calls()
    operation()
    return simulated.calls() - before


def _sleep_with_faults(subject: Subject, simulated: SimulatedDriver, calls: int) -> bool:
    allocator, ok = subject.allocator, True
    for n in range(1, calls + 1):
        allocator.release_masters()
        with simulated.faults(f"*@{n}=999"):
            refused = _fails(allocator.sleep)
        ok = ok and (not refused or bool(allocator.asleep_tags()) or subject.intact())
        if not allocator.asleep_tags():
            allocator.sleep()
        allocator.collect()
        allocator.wake()
        ok = ok and subject.intact()
    return ok


def _wake_with_faults(subject: Subject, simulated: SimulatedDriver, calls: int) -> bool:
    allocator, ok = subject.allocator, True
    for n in range(1, calls + 1):
        allocator.sleep()
        asleep_bytes = simulated.bytes_used()
        with simulated.faults(f"*@{n}=2"):
            refused = _fails(allocator.wake)
        ok = ok and (not refused or simulated.bytes_used() == asleep_bytes)
        if allocator.asleep_tags():
            allocator.wake()
        ok = ok and subject.intact()
    return ok


def _inject(subject: Subject, simulated: SimulatedDriver) -> tuple[int, bool]:
    """Fail each call of a sleep and of a wake once. Returns how many faults, and whether every retry was intact."""
    before = simulated.faults_injected
    subject.allocator.release_masters()
    sleep_calls = _calls_of(simulated, subject.allocator.sleep)
    wake_calls = _calls_of(simulated, subject.allocator.wake)
    slept = _sleep_with_faults(subject, simulated, sleep_calls)
    woke = _wake_with_faults(subject, simulated, wake_calls)
    return simulated.faults_injected - before, slept and woke


def _median(values: list[float]) -> float:
    return round(sorted(values)[len(values) // 2], 6)


def _cycle(subject: Subject, findings: Findings, cycles: int) -> None:
    findings.prepare_s = round(subject.allocator.prepare().seconds, 6)
    sleeps, wakes, speeds = [], [], []
    for number in range(cycles):
        sleeps.append(subject.allocator.sleep().seconds)
        woken = subject.allocator.wake()
        wakes.append(woken.seconds)
        speeds.append(woken.gib_s)
        findings.content_ok = findings.content_ok and subject.sample_intact(number)
    findings.content_ok = findings.content_ok and subject.intact()
    findings.cycles = cycles
    findings.first_sleep_s = round(sleeps[0], 6)
    findings.sleep_s, findings.wake_s, findings.wake_gib_s = _median(sleeps), _median(wakes), _median(speeds)


def _packing(allocator: Allocator, findings: Findings, weights_bytes: int) -> None:
    """What masters of weights take, and their wake beside that of noise."""
    subject = Subject(allocator, weights_bytes, packable=True)
    allocator.prepare()
    allocator.sleep()
    findings.packed_over_bytes = round(allocator.host_memory().bytes_used / weights_bytes, 3)
    findings.packed_wake_s = round(allocator.wake().seconds, 6)
    findings.content_ok = findings.content_ok and subject.intact()
    subject.free()


def _survey(findings: Findings, bare: BareDriver) -> None:
    findings.device = bare.facts()
    findings.limits = limits(findings.device.bus_id, findings.device.attributes["numa_node"])


def _measure(findings: Findings, bare: BareDriver, shown_bytes: int, scale: int) -> None:
    """The floor and stock's way, before the allocator holds anything. `shown_bytes`: what the cycles will copy."""
    nbytes = shown_bytes // scale
    floor = copy_floor(bare, nbytes)
    piece_nbytes = max(bare.granularity(), _PIECE_BYTES // scale)
    stock = stock_like(bare, nbytes, piece_nbytes)
    findings.bytes = shown_bytes
    findings.copy_floor_s = round(floor.to_device_s, 6)
    findings.copy_floor_to_host_s = round(floor.to_host_s, 6)
    findings.copy_floor_gib_s = round(shown_bytes / _GIB / floor.to_device_s, 3)
    findings.stock_like_sleep_s, findings.stock_like_wake_s = round(stock.sleep_s, 6), round(stock.wake_s, 6)
    findings.stock_like_pieces = stock.pieces


def _once(allocator: Allocator, weights_bytes: int) -> None:
    """Everything that the cycles do, before anything counts: a driver keeps what it took to load a kernel, and a wake
    right behind a sleep uses other ones than a wake that had to wait."""
    for packable in (False, True):
        subject = Subject(allocator, weights_bytes, packable=packable)
        for _ in range(2):
            allocator.sleep()
            allocator.wake()
        subject.free()


def _held(allocator: Allocator) -> int:
    memory = allocator.device_memory()
    return memory.bytes_total - memory.bytes_free + allocator.host_memory().bytes_registered


def on_gpu(cycles: int) -> Findings:
    """Raises DriverMissing without a driver, or any other AllocatorError without a usable device."""
    with BareDriver().open() as bare, Allocator() as allocator:
        findings = Findings(driver="simulated" if allocator.simulated else "cuda")
        _survey(findings, bare)
        free = allocator.device_memory().bytes_free
        weights_bytes = min(_GPU_BYTES, free // 3)
        if weights_bytes < _GIB // 64:
            raise OutOfMemory("the device is too full for a self-test", bytes_wanted=_GIB // 16, bytes_free=free)
        _measure(findings, bare, weights_bytes, allocator.scale)
        _once(allocator, weights_bytes)
        before = _held(allocator)
        subject = Subject(allocator, weights_bytes)
        _cycle(subject, findings, cycles)
        subject.free()
        _packing(allocator, findings, weights_bytes)
        findings.leaked_bytes = max(0, _held(allocator) - before)
    return findings


def on_simulated_box(cycles: int, folder: str) -> Findings:
    box = SimulatedBox.create(folder, devices=1)
    os.environ.update(box.env())
    simulated, findings = SimulatedDriver(), Findings(driver="simulated")
    with BareDriver().open() as bare:
        _survey(findings, bare)
        _measure(findings, bare, _SIMULATED_BYTES, box.scale)
    with Allocator() as allocator:
        subject = Subject(allocator, _SIMULATED_BYTES)
        _cycle(subject, findings, cycles)
        subject.free()
        _packing(allocator, findings, _SIMULATED_BYTES)
        victim = Subject(allocator, _SIMULATED_BYTES // 8, packable=True)
        findings.faults_injected, intact = _inject(victim, simulated)
        findings.content_ok = findings.content_ok and intact
    findings.leaked_bytes = (simulated.bytes_used(0) + simulated.bytes_registered()) * box.scale
    return findings


def run(cycles: int) -> Findings:
    try:
        return on_gpu(cycles)
    except DriverMissing:
        with tempfile.TemporaryDirectory() as folder:
            return on_simulated_box(cycles, folder)


def _print(values: dict[str, object], indent: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
        else:
            print(f"{indent}{name:{24 - len(indent)}} {'not measured' if value is None and not indent else value}")


def _report(findings: Findings) -> None:
    """The machine first, then what was measured on it."""
    values = asdict(findings)
    machine = {name: values.pop(name) for name in ("driver", "device", "limits")}
    _print(machine)
    _print(values)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m allocator.selftest", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--cycles", type=int, default=20, help="at least 1")
    options = parser.parse_args()
    if options.cycles < 1:
        parser.error("--cycles must be at least 1")
    try:
        findings = run(options.cycles)
    except AllocatorError as error:
        print(f"the self-test cannot run here: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(asdict(findings)))
    else:
        _report(findings)
    return 0 if findings.ok else 1


if __name__ == "__main__":
    sys.exit(main())
