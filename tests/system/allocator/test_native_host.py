"""The host parts of the library, tested in C++: limits, shared budget, arena, spilling. See tests/native."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from allocator.box import driver_path

ROOT = Path(__file__).parents[3]
LIBRARY = ("limits", "forks", "budget", "ranges", "host", "spill", "vmm", "kernels", "driver")
TESTS = ("main", "limits_test", "budget_test", "host_test", "spill_test")
FLAGS = ("-std=c++17", "-O0", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-Iallocator", "-Itests/native")


def _run(*command: str | os.PathLike[str], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def native_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test program, built by the compiler alone: cmake is not part of what a test run needs."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    folder = tmp_path_factory.mktemp("native")
    sources = [
        *(ROOT / f"tests/native/{name}.cpp" for name in TESTS),
        *(ROOT / f"allocator/csrc/{name}.cpp" for name in LIBRARY),
    ]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def build(source: Path, made: Path) -> None:
        _run(compiler, *FLAGS, "-c", "-o", made, source)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, sources, objects))
    program = folder / "native_tests"
    _run(compiler, "-o", program, *objects, "-pthread", "-ldl")
    return program


@pytest.mark.parametrize("group", ["limits", "budget", "host", "spill"])
def test_the_host_parts_do_what_their_native_tests_say(native_tests: Path, group: str) -> None:
    out = _run(native_tests, group, env={**os.environ, "ROTATOR_CUDA_DRIVER": str(driver_path())})
    assert out.endswith("tests, 0 failed\n")
