"""Host memory as laid out in files, and on this machine."""

from pathlib import Path

import psutil
import pytest

from rotator.adapters.host import read_host_memory
from rotator.ports import HostMemory

GIB = 1 << 30


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_machines_memory_is_what_another_reader_says():
    found = read_host_memory()
    assert 0 < found.available_bytes <= found.total_bytes <= psutil.virtual_memory().total


def test_without_control_groups_the_machines_memory_counts(tmp_path: Path):
    assert read_host_memory(lay_out(tmp_path, {})) == HostMemory(64 * GIB, 32 * GIB)


def test_a_containers_limit_is_that_of_the_root_it_sees(tmp_path: Path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": str(16 * GIB),
        "sys/fs/cgroup/memory.current": str(10 * GIB),
        "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {4 * GIB}\n",
    }
    assert read_host_memory(lay_out(tmp_path, files)) == HostMemory(16 * GIB, 10 * GIB)


@pytest.mark.parametrize(("own", "above"), [("max", str(8 * GIB)), (str(8 * GIB), "max"), (str(8 * GIB), str(9 * GIB))])
def test_the_tightest_limit_of_our_group_and_those_above_counts(tmp_path: Path, own: str, above: str):
    files = {
        "proc/self/cgroup": "0::/a.slice/b.service\n",
        "sys/fs/cgroup/a.slice/b.service/memory.max": own,
        "sys/fs/cgroup/a.slice/b.service/memory.current": str(GIB),
        "sys/fs/cgroup/a.slice/memory.max": above,
        "sys/fs/cgroup/a.slice/memory.current": str(GIB),
    }
    assert read_host_memory(lay_out(tmp_path, files)) == HostMemory(8 * GIB, 7 * GIB)


def test_a_group_outside_what_can_be_seen_limits_nothing(tmp_path: Path):
    files = {"proc/self/cgroup": "0::/../other\n", "sys/fs/cgroup/memory.max": "max"}
    assert read_host_memory(lay_out(tmp_path, files)) == HostMemory(64 * GIB, 32 * GIB)
