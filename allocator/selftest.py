"""`python -m allocator.selftest [--json]`: cycles with content checks, on the GPU or, without one, on a simulated box.

On the simulated driver it also fails every single driver call of a sleep and of a wake in turn, and checks that each
leaves the allocator as it was and that a retry succeeds. A figure that was not measured is null.
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

from allocator.box import SimulatedBox
from allocator.core import Allocator
from allocator.errors import AllocatorError, DriverMissing, OutOfMemory
from allocator.simdriver import SimulatedDriver
from allocator.values import Segment

_SEED = 20
_GIB = 1 << 30


@dataclass(slots=True)
class Findings:
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

    @property
    def ok(self) -> bool:
        return self.content_ok and not self.leaked_bytes


class Subject:
    """An allocator with a few segments whose content is known."""

    def __init__(self, allocator: Allocator, weights_bytes: int) -> None:
        self.allocator = allocator
        draw = random.Random(_SEED)
        shares = [0.5, 0.3, 0.2]
        self.contents: dict[Segment, bytes] = {}
        for share in shares:
            segment = allocator.alloc(max(1, int(weights_bytes * share)))
            self.contents[segment] = self._pattern(draw, segment.content_nbytes)
        for segment, content in self.contents.items():
            allocator.write(segment, content)
        self.cache = allocator.alloc(max(1, weights_bytes // 4), tag="kv_cache")

    @staticmethod
    def _pattern(draw: random.Random, nbytes: int) -> bytes:
        block = draw.randbytes(min(nbytes, 1 << 20))
        return (block * (nbytes // len(block) + 1))[:nbytes]

    def intact(self) -> bool:
        return all(self.allocator.read(segment) == content for segment, content in self.contents.items())


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


def _inject(subject: Subject, simulated: SimulatedDriver) -> tuple[int, bool]:
    """Fail each call of a sleep and of a wake once. Returns how many faults, and whether every retry was intact."""
    allocator, ok = subject.allocator, True
    allocator.release_masters()
    sleep_calls = _calls_of(simulated, allocator.sleep)
    wake_calls = _calls_of(simulated, allocator.wake)
    for n in range(1, sleep_calls + 1):
        allocator.release_masters()
        with simulated.faults(f"*@{n}=999"):
            refused = _fails(allocator.sleep)
        ok = ok and (not refused or subject.intact())
        if not allocator.asleep_tags():
            allocator.sleep()
        allocator.collect()
        allocator.wake()
        ok = ok and subject.intact()
    for n in range(1, wake_calls + 1):
        allocator.sleep()
        with simulated.faults(f"*@{n}=2"):
            _fails(allocator.wake)
        if allocator.asleep_tags():
            allocator.wake()
        ok = ok and subject.intact()
    return sleep_calls + wake_calls, ok


def _cycle(subject: Subject, findings: Findings, cycles: int) -> None:
    subject.allocator.prepare()
    sleeps, wakes = [], []
    for _ in range(cycles):
        sleeps.append(subject.allocator.sleep().seconds)
        wakes.append(subject.allocator.wake().seconds)
        findings.content_ok = findings.content_ok and subject.intact()
    findings.cycles = cycles
    findings.first_sleep_s = round(sleeps[0], 6)
    findings.sleep_s = round(sorted(sleeps)[len(sleeps) // 2], 6)
    findings.wake_s = round(sorted(wakes)[len(wakes) // 2], 6)


def _once(allocator: Allocator) -> None:
    segment = allocator.alloc(_GIB // 64)
    allocator.sleep()
    allocator.wake()
    allocator.free(segment)
    allocator.collect()


def on_gpu(cycles: int) -> Findings:
    """Raises DriverMissing without a driver, or any other AllocatorError without a usable device."""
    allocator = Allocator()
    findings = Findings(driver="simulated" if allocator.simulated else "cuda")
    with allocator:
        # A first cycle opens the device and lets the driver take what it keeps for itself.
        _once(allocator)
        before = allocator.device_memory().bytes_free
        weights_bytes = min(2 * _GIB, before // 3)
        if weights_bytes < _GIB // 64:
            raise OutOfMemory("the device is too full for a self-test", bytes_wanted=_GIB // 16, bytes_free=before)
        subject = Subject(allocator, weights_bytes)
        _cycle(subject, findings, cycles)
        for segment in [*subject.contents, subject.cache]:
            allocator.free(segment)
        allocator.collect()
        findings.leaked_bytes = max(0, before - allocator.device_memory().bytes_free)
    return findings


def on_simulated_box(cycles: int, folder: str) -> Findings:
    box = SimulatedBox.create(folder, devices=1, copy_gib_s=0)
    os.environ.update(box.env())
    simulated, findings = SimulatedDriver(), Findings(driver="simulated")
    with Allocator() as allocator:
        subject = Subject(allocator, 8 * _GIB)
        _cycle(subject, findings, cycles)
        findings.faults_injected, intact = _inject(subject, simulated)
        findings.content_ok = findings.content_ok and intact
    findings.leaked_bytes = (simulated.bytes_used(0) + simulated.bytes_registered()) * box.scale
    return findings


def run(cycles: int) -> Findings:
    try:
        return on_gpu(cycles)
    except DriverMissing:
        with tempfile.TemporaryDirectory() as folder:
            return on_simulated_box(cycles, folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m allocator.selftest", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--cycles", type=int, default=20)
    options = parser.parse_args()
    findings = run(options.cycles)
    if options.json:
        print(json.dumps(asdict(findings)))
    else:
        for name, value in asdict(findings).items():
            print(f"{name:20} {'not measured' if value is None else value}")
    return 0 if findings.ok else 1


if __name__ == "__main__":
    sys.exit(main())
