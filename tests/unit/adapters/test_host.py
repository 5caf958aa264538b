import pytest

from rotator.adapters.host import (
    parse_limit_bytes,
    parse_meminfo,
    parse_own_group,
    parse_reclaimable_bytes,
    within,
)
from rotator.ports import HostMemory


def test_meminfo_is_read_in_bytes():
    text = "MemTotal:       24682416 kB\nMemFree:         100 kB\nMemAvailable:   24373112 kB\nHugePages_Total:  0\n"
    assert parse_meminfo(text) == HostMemory(24682416 * 1024, 24373112 * 1024)


def test_meminfo_without_available_memory_is_refused():
    with pytest.raises(ValueError, match="no MemAvailable"):
        parse_meminfo("MemTotal: 1 kB\n")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("0::/user.slice/a.scope\n", "/user.slice/a.scope"),
        ("4:memory:/x\n0::/\n", "/"),
        ("4:memory:/x\n", None),
        ("", None),
    ],
)
def test_our_own_group_is_that_of_the_second_version(text: str, path: str | None):
    assert parse_own_group(text) == path


def test_a_limit_may_be_absent():
    assert parse_limit_bytes("max\n") is None
    assert parse_limit_bytes("") is None
    assert parse_limit_bytes("1073741824\n") == 1 << 30


def test_page_cache_that_the_kernel_drops_is_reclaimable():
    assert parse_reclaimable_bytes("anon 5\ninactive_file 4096\nactive_file 7\n") == 4096
    assert parse_reclaimable_bytes("anon 5\n") == 0


def test_a_limit_bounds_total_and_available_memory_and_never_below_nothing():
    machine = HostMemory(100, 60)
    assert within(machine, 50, 20) == HostMemory(50, 30)
    assert within(machine, 50, 70) == HostMemory(50, 0)
    assert within(machine, 500, 20) == machine
