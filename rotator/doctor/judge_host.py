"""Judgements of the host: leftovers of engines that are gone, memory, limits, the clock. No I/O."""

from collections.abc import Iterator

from rotator.config import GIB
from rotator.core.placement import gib
from rotator.doctor.facts import Facts, GpuState, HostFacts, Process, ProcessFacts, ShmSegment
from rotator.doctor.findings import Finding, Repair, RepairKind, broken, note, risk

HELD_BY_NOBODY_BYTES = GIB  # less than this is what contexts and the display leave
SHM_AGE_S = 300.0  # a younger segment may belong to an engine that is just starting
_SHM_NAMES = ("psm_", "sem.mp-", "mp-", "nccl-", "torch_", "vllm", "cuda.shm.", "rotator", "loky-", "pym-", "wnsm_")
CLOCK_SKEW_S = 60.0
SHM = "/dev/shm"  # noqa: S108 - looked at, nothing is made there


# -- leftovers ---------------------------------------------------------------------------------------------------------


def judge_leftovers(facts: Facts) -> Iterator[Finding]:
    """Processes of engines that nobody runs, bytes on GPUs that nobody holds, shared memory that nobody maps."""
    seen = facts.processes
    if seen is None:
        return
    yield from _stuck(seen)
    yield from _orphans(facts, seen)
    for state in facts.gpus.gpus if facts.gpus else ():
        yield from _vram(facts, seen, state)
    yield from _shm(seen)


def _stuck(seen: ProcessFacts) -> Iterator[Finding]:
    """Threads that hang in the kernel hold their memory, and no signal reaches them."""
    for p in seen.processes:
        if p.gpus and p.state in ("D", "Z"):
            yield broken(
                "leftovers.stuck",
                f"process {p.pid} ({p.name}) hangs in the kernel with a GPU in its hands: nothing can end it",
                f"state {p.state}, holds /dev/nvidia{', /dev/nvidia'.join(map(str, p.gpus))} open",
                f"`sudo cat /proc/{p.pid}/stack` for the driver's maker; then reboot: first see `rotator doctor "
                "--only kernel`",
            )


def _orphans(facts: Facts, seen: ProcessFacts) -> Iterator[Finding]:
    known = {e.name for e in facts.engines}
    groups: dict[str, list[Process]] = {}
    for p in seen.processes:
        ours = p.service in ("", seen.service_id)  # another service on this machine has engines of its own
        if p.engine and p.engine not in known and ours and p.state not in ("D", "Z"):
            groups.setdefault(p.engine, []).append(p)
    for engine, members in groups.items() if facts.fleet else ():
        pids = sorted(p.pid for p in members)
        yield risk(
            "leftovers.engine",
            f"engine '{engine}' runs, but the fleet file has no such engine",
            f"processes {', '.join(f'{p.pid} ({p.name})' for p in sorted(members, key=lambda p: p.pid)[:6])}",
            f"`kill {' '.join(map(str, pids))}`, or add the engine to the fleet file again",
        )


def _vram(facts: Facts, seen: ProcessFacts, state: GpuState) -> Iterator[Finding]:
    if state.used_bytes is None:
        return
    gpu, by_pid = state.info, state.by_pid or {}
    table = {p.pid: p for p in seen.processes}
    known = {e.name for e in facts.engines}
    ours = {p.pid for p in seen.processes if p.engine in known and p.service in ("", seen.service_id)}
    foreign = {pid: size for pid, size in by_pid.items() if size > GIB and pid not in ours}
    for pid, size in sorted(foreign.items()):
        yield _foreign(facts, gpu.index, pid, size, table.get(pid))
    if state.by_pid is None or not seen.sees_all or gpu.unified_memory:
        return  # nobody here can tell whose bytes they are
    unowned = state.used_bytes - sum(by_pid.values())
    if unowned <= HELD_BY_NOBODY_BYTES:
        return
    holders = [p for p in seen.processes if gpu.index in p.gpus and p.pid not in by_pid]
    evidence = f"{gib(state.used_bytes)} in use, {gib(sum(by_pid.values()))} by {len(by_pid)} processes that NVML lists"
    if holders:
        pids = " ".join(str(p.pid) for p in holders)
        named = ", ".join(f"{p.pid} ({p.name}, state {p.state})" for p in holders[:6])
        fix = f"`kill -9 {pids}`, then wait until `nvidia-smi` shows the bytes gone"
        evidence = f"{evidence}; {named} have it open"
    else:
        fix = (
            "nobody has it open, so the driver keeps what a dead process left: `sudo nvidia-smi --gpu-reset -i "
            f"{gpu.index}` "
            "with nothing running on it, else reboot; before a reboot see `rotator doctor --only kernel`"
        )
    yield broken(
        "leftovers.vram",
        f"{gib(unowned)} on GPU {gpu.index} are held by nobody: no engine can have them",
        evidence,
        fix,
    )


def _foreign(facts: Facts, index: int, pid: int, size: int, process: Process | None) -> Finding:
    words = f"process {pid}" + (f" ({process.name})" if process else "")
    looks = process is not None and any(
        w in f"{process.name} {process.command}".lower() for w in ("vllm", "enginecore")
    )
    orphan = process is not None and process.ppid in (0, 1)
    evidence = f"NVML lists it with {gib(size)}" + (f"; {process.command[:120]}" if process and process.command else "")
    if looks and orphan:
        return broken(
            "leftovers.worker",
            f"{words} is what is left of an engine that died, and holds {gib(size)} on GPU {index}",
            f"{evidence}; its parent is gone",
            f"`kill -9 {pid}`, then wait until `nvidia-smi` shows the bytes gone",
        )
    fix = f"every plan has that much less: `kill {pid}` if it is not needed, or keep GPU {index} out of 'devices.gpus'"
    return risk("leftovers.foreign", f"{words}, none of this fleet's, holds {gib(size)} on GPU {index}", evidence, fix)


def _shm(seen: ProcessFacts) -> Iterator[Finding]:
    stale = [s for s in seen.shm if is_stale(s)]
    if stale and seen.sees_all:
        total = sum(s.bytes for s in stale)
        for segment in stale:
            owned = seen.own_uid in (0, segment.uid)
            yield risk(
                "leftovers.shm",
                f"{SHM}/{segment.name} ({gib(segment.bytes)}) was left behind: no process has it open",
                f"{segment.age_s / 3600:.1f} h old; {len(stale)} such segments hold {gib(total)} of RAM",
                f"`rm /dev/shm/{segment.name}`" if owned else f"`sudo rm /dev/shm/{segment.name}`",
                repair=_removal(segment) if owned else None,
            )
    if seen.shm_total_bytes and seen.shm_free_bytes is not None and seen.shm_free_bytes < 0.1 * seen.shm_total_bytes:
        largest = sorted(seen.shm, key=lambda s: -s.bytes)[:3]
        yield risk(
            "leftovers.shm-full",
            f"shared memory (/dev/shm) is nearly full: {gib(seen.shm_free_bytes)} of {gib(seen.shm_total_bytes)} left",
            "largest: " + ", ".join(f"{s.name} {gib(s.bytes)}" for s in largest),
            "remove what nobody needs, or `sudo mount -o remount,size=75% /dev/shm`",
        )


def is_stale(segment: ShmSegment) -> bool:
    return not segment.held_by and segment.age_s > SHM_AGE_S and segment.name.startswith(_SHM_NAMES)


def _removal(segment: ShmSegment) -> Repair:
    return Repair(RepairKind.REMOVE_SHM, segment.name, f"remove /dev/shm/{segment.name}")


# -- host --------------------------------------------------------------------------------------------------------------


def judge_host(facts: Facts) -> Iterator[Finding]:
    """Limits and memory that masters need, and the clock that leases and the calendar go by."""
    host = facts.host
    if host is None:
        return
    yield from _memlock(facts, host)
    yield from _huge_pages(host)
    yield from _page_cache(facts, host)
    yield from _clock(facts, host)
    if host.files_max is not None and host.files_max < 4096:
        yield risk(
            "host.files",
            f"a process may open {host.files_max} files: each waiting client is one",
            f"ulimit -n is {host.files_max}",
            "set LimitNOFILE=65536 for the service (`ulimit -n 65536` in a shell)",
        )


def _memlock(facts: Facts, host: HostFacts) -> Iterator[Finding]:
    level_1 = [e for e in facts.engines if 1 in e.sleep_levels]
    given = [e.footprint.host_gib for e in level_1 if e.footprint and e.footprint.host_gib]
    need = int(max(given, default=1.0) * GIB)
    if level_1 and host.memlock_bytes is not None and host.memlock_bytes < need:
        yield risk(
            "host.memlock",
            f"a process may lock {gib(host.memlock_bytes)}, and masters are locked memory: {gib(need)} are needed",
            f"ulimit -l is {host.memlock_bytes // 1024} KiB",
            "set LimitMEMLOCK=infinity for the service (`ulimit -l unlimited` in a shell; --ulimit memlock=-1 "
            "for a container)",
        )


def _huge_pages(host: HostFacts) -> Iterator[Finding]:
    if host.huge_free_bytes > 0.02 * host.total_bytes:
        yield risk(
            "host.huge-pages",
            f"{gib(host.huge_free_bytes)} of RAM are reserved as huge pages that nobody uses: masters cannot have them",
            f"HugePages_Free in /proc/meminfo; {gib(host.huge_reserved_bytes)} are reserved",
            "`sudo sysctl vm.nr_hugepages=0`, and take it out of /etc/sysctl.d",
        )
    if host.thp == "never":
        yield note(
            "host.thp",
            "transparent huge pages are off: locking masters walks 512 times as many pages",
            "/sys/kernel/mm/transparent_hugepage/enabled: [never]",
            "`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`",
        )


def _page_cache(facts: Facts, host: HostFacts) -> Iterator[Finding]:
    """Where CPU and GPU share their memory CUDA sees only what is free, not what the kernel could drop."""
    unified = [g.info for g in (facts.gpus.gpus if facts.gpus else ()) if g.info.unified_memory]
    if unified and host.cached_bytes > host.free_bytes and host.cached_bytes > 0.1 * host.total_bytes:
        yield risk(
            "host.page-cache",
            f"{gib(host.cached_bytes)} are page cache and {gib(host.free_bytes)} free: on unified memory an "
            "engine may not start",
            f"{unified[0].name} shares its memory with the host; MemFree and Cached in /proc/meminfo",
            "`sync && echo 3 | sudo tee /proc/sys/vm/drop_caches`",
        )


def _clock(facts: Facts, host: HostFacts) -> Iterator[Finding]:
    if host.clock_synchronized is False:
        yield risk(
            "host.clock",
            "the clock is not synchronized: windows of the calendar and times of nodes drift apart",
            "the kernel says STA_UNSYNC",
            "`sudo timedatectl set-ntp true` (or start chronyd), then `timedatectl`",
        )
    newest = facts.ledger.newest_wall_s if facts.ledger else None
    if newest is not None and newest > host.now_wall_s + CLOCK_SKEW_S:
        yield risk(
            "host.clock-back",
            f"the clock was set back: the ledger has entries {newest - host.now_wall_s:.0f} s in the future",
            f"its newest entry is of {newest:.0f}, it is {host.now_wall_s:.0f} now (Unix seconds)",
            "`timedatectl` and set it right before the service starts: retention and the calendar go by it",
        )
    if host.rtc_wall_s is not None and abs(host.rtc_wall_s - host.now_wall_s) > 300:
        yield note(
            "host.rtc",
            f"the hardware clock is {host.rtc_wall_s - host.now_wall_s:+.0f} s off: the time jumps at the next boot",
            "/sys/class/rtc/rtc0/since_epoch beside the system's clock (one kept in local time looks so too)",
            "`sudo hwclock --systohc --utc`",
        )
