"""One simulated box for this process. A driver belongs to its process, as a CUDA context does."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from allocator import Allocator
from allocator.box import SimulatedBox
from allocator.simdriver import SimulatedDriver
from tests.system.allocator.engine import pattern as made_pattern

GIB = 1 << 30


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedBox]:
    made = SimulatedBox.create(tmp_path_factory.mktemp("box"), devices=2, copy_gib_s=0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.env().items():
            patch.setenv(name, value)
        yield made


@pytest.fixture
def driver(box: SimulatedBox) -> Iterator[SimulatedDriver]:
    simulated = SimulatedDriver()
    yield simulated
    simulated.set_faults()
    simulated.hold(False)


@contextmanager
def _giving_all_back(driver: SimulatedDriver, **options: bool) -> Iterator[Allocator]:
    # Slabs of 64 MiB, four granules, so that a few GiB are a few dozen handles.
    # No rest between two copies in the background: nothing here is served meanwhile.
    with Allocator(slab_bytes=64 << 20, link_share=1.0, **options) as made:
        yield made
        driver.set_faults()
        driver.hold(False)
    assert driver.bytes_used(0, own=True) == 0
    assert driver.bytes_used(1, own=True) == 0
    assert driver.bytes_registered() == 0


@pytest.fixture
def allocator(driver: SimulatedDriver) -> Iterator[Allocator]:
    """One whose every byte, on the device and on the host, must be back when the test ends."""
    with _giving_all_back(driver) as made:
        yield made


@pytest.fixture
def plain(driver: SimulatedDriver) -> Iterator[Allocator]:
    """The same with masters as long as what they are of, whatever that holds."""
    with _giving_all_back(driver, pack=False) as made:
        yield made


@pytest.fixture
def pattern() -> Callable[[int, int], bytes]:
    return made_pattern


@dataclass
class Child:
    """A Python process that says a line when it gets somewhere and waits for a line to go on."""

    process: subprocess.Popen[str]

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def rest(self, timeout_s: float = 60) -> str:
        out, _ = self.process.communicate(timeout=timeout_s)
        return out.strip()


@pytest.fixture
def child(box: SimulatedBox) -> Iterator[Callable[..., Child]]:
    started: list[subprocess.Popen[str]] = []

    def start(program: str, **env: str) -> Child:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", program],
            env={**os.environ, **box.env(), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return Child(process)

    yield start
    for process in started:
        process.kill()
        process.communicate()
