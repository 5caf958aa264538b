"""The process launcher on real processes."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import uvloop

from rotator.adapters import exits, process
from rotator.adapters.process import ProcessLauncher
from rotator.adapters.proctable import read_marks, read_proc
from rotator.ports import Handle, LaunchError
from tests.system.adapters.conftest import SERVICE, Engines, eventually, is_gone, is_same, marks, pid_of

WAITS = "import signal; signal.pause()"
SAY = "import os; say = lambda name, text: open(os.environ['FOLDER'] + '/' + name, 'w').write(str(text) + '\\n')\n"
IGNORES_TERM = SAY + "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); say('ready', 1); signal.pause()"
# A worker in a session of its own with a child of its own, as engines start theirs; all ignore SIGTERM.
WITH_WORKERS = SAY + (
    "import subprocess, sys, signal\n"
    "grandchild = 'import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()'\n"
    "worker = ('import os, subprocess, sys, signal; signal.signal(15, signal.SIG_IGN)\\n'\n"
    "  'p = subprocess.Popen([sys.executable, \"-c\", sys.argv[1]], stdout=subprocess.PIPE)\\n'\n"
    "  'p.stdout.readline(); print(p.pid, flush=True); signal.pause()')\n"
    "p = subprocess.Popen([sys.executable, '-c', worker, grandchild], stdout=subprocess.PIPE, start_new_session=True,\n"
    "  env={'PATH': os.environ['PATH']} if 'FORGET' in os.environ else None)\n"
    "grand = p.stdout.readline().decode().strip()\n"
    "say('workers', f'{p.pid} {grand}')\n"
    "signal.pause()\n"
)


async def test_an_engine_gets_its_own_session_its_marks_and_no_terminal(launcher: ProcessLauncher, engines: Engines):
    handle = await launcher.start(engines.spec(SAY + "say('stdin', os.readlink('/proc/self/fd/0')); " + WAITS))
    proc = read_proc(pid_of(handle))
    assert proc is not None
    assert (proc.session, proc.pgrp) == (proc.pid, proc.pid)
    assert await engines.written("stdin") == "/dev/null"
    assert read_marks(proc.pid) == marks()
    assert await launcher.is_alive(handle)
    assert await launcher.pids(handle) == {proc.pid}


async def test_an_engine_inherits_no_open_file_of_the_service(launcher: ProcessLauncher, engines: Engines):
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    await launcher.start(engines.spec(SAY + f"say('open', os.path.exists('/proc/self/fd/{write_end}')); " + WAITS))
    os.close(read_end)
    os.close(write_end)
    assert await engines.written("open") == "False"


async def test_what_an_engine_prints_goes_to_its_log_below_a_header(launcher: ProcessLauncher, engines: Engines):
    spec = engines.spec("import sys; print('to stdout'); print('to stderr', file=sys.stderr)")
    await launcher.wait_exit(await launcher.start(spec))
    header, *lines = engines.log().splitlines()
    assert header.startswith("=== rotator: 2")
    assert sys.executable in header
    assert sorted(lines) == ["to stderr", "to stdout"]


async def test_a_large_log_is_rotated_at_start_and_the_last_five_are_kept(tmp_path: Path, engines: Engines):
    small = ProcessLauncher(tmp_path, SERVICE, log_rotate_bytes=10)
    for number in range(8):
        await small.wait_exit(await small.start(engines.spec(f"print('launch', {number})")))
    kept = sorted(path.name for path in tmp_path.glob("dsv4-flash.log*"))  # noqa: ASYNC240 - a test has time
    assert kept == ["dsv4-flash.log", *(f"dsv4-flash.log.{n}" for n in range(1, 6))]
    assert engines.log().endswith("launch 7\n")
    assert (tmp_path / "dsv4-flash.log.1").read_text().endswith("launch 6\n")
    assert (tmp_path / "dsv4-flash.log.5").read_text().endswith("launch 2\n")


async def test_a_small_log_is_appended_to(launcher: ProcessLauncher, engines: Engines):
    for number in range(2):
        await launcher.wait_exit(await launcher.start(engines.spec(f"print('launch', {number})")))
    assert [line for line in engines.log().splitlines() if line.startswith("launch")] == ["launch 0", "launch 1"]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            "print('first'); print('no such model'); raise SystemExit(3)",
            "exit code 3; last log lines: first | no such model",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV; it logged nothing"),
    ],
)
async def test_an_engine_that_exits_at_once_is_told_with_its_code_and_last_lines(
    launcher: ProcessLauncher, engines: Engines, program: str, words: str
):
    handle = await launcher.start(engines.spec(program))
    async with asyncio.timeout(20):
        assert await launcher.wait_exit(handle) == words
    assert not await launcher.is_alive(handle)
    assert await launcher.wait_exit(handle) == words


async def test_the_last_lines_are_those_of_this_launch(launcher: ProcessLauncher, engines: Engines):
    await launcher.wait_exit(await launcher.start(engines.spec("print('an older failure')")))
    assert await launcher.wait_exit(await launcher.start(engines.spec("pass"))) == "exit code 0; it logged nothing"


async def test_a_wrapper_that_cannot_find_its_program_is_no_engine_crash(launcher: ProcessLauncher, engines: Engines):
    handle = await launcher.start(engines.spec("", command=("/bin/sh", "-c", "no-such-program-here")))
    assert (await launcher.wait_exit(handle)).startswith("exit code 127: a program in its command was not found")


async def test_no_zombie_stays_even_if_nobody_waits(launcher: ProcessLauncher, engines: Engines):
    handle = await launcher.start(engines.spec("pass"))
    await eventually(lambda: read_proc(pid_of(handle)) is None, what="reaping")
    assert not await launcher.is_alive(handle)


async def test_the_exit_of_a_child_is_seen_within_100_ms(launcher: ProcessLauncher, engines: Engines):
    took_s = []
    for _ in range(3):
        handle = await launcher.start(engines.spec(WAITS))
        took_s.append(await _seconds_to_notice(launcher, handle))
    assert median(took_s) < 0.1


async def test_the_exit_of_an_adopted_engine_is_seen_within_100_ms(tmp_path: Path, engines: Engines):
    starter, later = ProcessLauncher(tmp_path, SERVICE), ProcessLauncher(tmp_path, SERVICE)
    took_s = []
    for _ in range(3):
        spec = engines.spec(WAITS)
        handle = await later.find(spec, (await starter.start(spec)).ref)
        assert handle is not None
        took_s.append(await _seconds_to_notice(later, handle))
        assert "its exit code is not known" in await later.wait_exit(handle)
    assert median(took_s) < 0.1


def test_exits_are_seen_on_uvloop_too(tmp_path: Path, engines: Engines):
    async def on_uvloop() -> str:
        launcher = ProcessLauncher(tmp_path, SERVICE)
        handle = await launcher.start(engines.spec("raise SystemExit(7)"))
        async with asyncio.timeout(20):
            return await launcher.wait_exit(handle)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(on_uvloop()) == "exit code 7; it logged nothing"


async def _seconds_to_notice(watcher: ProcessLauncher, handle: Handle) -> float:
    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(watcher.wait_exit(handle))
    await asyncio.wait([waiting], timeout=0.2)
    assert not waiting.done()
    begun_s = loop.time()
    os.kill(pid_of(handle), signal.SIGKILL)
    async with asyncio.timeout(10):
        await waiting
    return loop.time() - begun_s


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("no-such-program-here", "serve"), "'no-such-program-here' not found .*exit 127.*no engine crash.*PATH"),
        (("/nowhere/vllm", "serve"), "'/nowhere/vllm' not found .*exit 127.*no engine crash.*correct the path"),
        (("/etc/hostname",), "'/etc/hostname' is not executable .*chmod"),
        (("/tmp",), "'/tmp' is not executable"),
        ((), "has no command"),
    ],
)
async def test_a_program_that_cannot_run_is_refused_with_what_to_do(
    launcher: ProcessLauncher, engines: Engines, command: tuple[str, ...], says: str
):
    spec = engines.spec("")
    wrong = type(spec)(spec.engine, spec.launcher, command, spec.env, spec.url, spec.log_path)
    with pytest.raises(LaunchError, match=says):
        await launcher.start(wrong)
    assert await launcher.find(wrong, None) is None


async def test_a_script_whose_interpreter_is_missing_is_told_apart(launcher: ProcessLauncher, engines: Engines):
    script = engines.folder / "serve"
    script.write_text("#!/nowhere/python\n")
    script.chmod(0o755)
    with pytest.raises(LaunchError, match="interpreter in its first line does not exist"):
        await launcher.start(engines.spec("", command=(str(script),)))


async def test_a_missing_workdir_is_refused_and_a_present_one_used(launcher: ProcessLauncher, engines: Engines):
    with pytest.raises(LaunchError, match="workdir /nowhere is no directory"):
        await launcher.start(engines.spec(WAITS, workdir="/nowhere"))
    (engines.folder / "w").mkdir()
    await launcher.start(engines.spec(SAY + "say('cwd', os.getcwd())", workdir=str(engines.folder / "w")))
    assert await engines.written("cwd") == str(engines.folder / "w")


async def test_a_log_that_cannot_be_written_is_told(launcher: ProcessLauncher, engines: Engines):
    (engines.folder / "dsv4-flash.log").mkdir()
    with pytest.raises(LaunchError, match=r"cannot write its log .*dsv4-flash\.log: Is a directory"):
        await launcher.start(engines.spec(WAITS))


async def test_sigterm_lets_an_engine_end_in_order(launcher: ProcessLauncher, engines: Engines):
    program = SAY + (
        "import signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "say('ready', 1); signal.sigwait({signal.SIGTERM}); print('bye')"
    )
    handle = await launcher.start(engines.spec(program))
    await engines.written("ready")
    await launcher.stop(handle, grace_s=10)
    assert is_gone(pid_of(handle))
    assert await launcher.wait_exit(handle) == "exit code 0; last log lines: bye"


async def test_an_engine_that_ignores_sigterm_is_killed_after_its_grace(launcher: ProcessLauncher, engines: Engines):
    handle = await launcher.start(engines.spec(IGNORES_TERM))
    await engines.written("ready")
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    await launcher.stop(handle, grace_s=0.3)
    assert loop.time() - begun_s >= 0.3
    assert is_gone(pid_of(handle))
    assert "SIGKILL" in await launcher.wait_exit(handle)


async def test_no_grace_kills_at_once_even_a_stopped_engine(launcher: ProcessLauncher, engines: Engines):
    handle = await launcher.start(engines.spec(IGNORES_TERM))
    await engines.written("ready")
    os.kill(pid_of(handle), signal.SIGSTOP)
    async with asyncio.timeout(10):
        await launcher.stop(handle, grace_s=0)
    assert is_gone(pid_of(handle))


@pytest.mark.parametrize("env", [{}, {"FORGET": "1"}], ids=["marked", "unmarked"])
async def test_workers_in_sessions_of_their_own_end_with_their_engine(
    launcher: ProcessLauncher, engines: Engines, env: dict[str, str]
):
    handle = await launcher.start(engines.spec(WITH_WORKERS, env=env))
    workers = [int(pid) for pid in (await engines.written("workers")).split()]
    assert await launcher.pids(handle) == {pid_of(handle), *workers}
    await launcher.stop(handle, grace_s=0.1)
    assert [pid for pid in (pid_of(handle), *workers) if not is_gone(pid)] == []


async def test_workers_without_their_engine_do_not_use_up_its_whole_grace(
    launcher: ProcessLauncher, engines: Engines, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(process, "STRAGGLER_GRACE_S", 0.2)
    handle = await launcher.start(engines.spec(WITH_WORKERS))
    workers = [int(pid) for pid in (await engines.written("workers")).split()]
    async with asyncio.timeout(20):
        await launcher.stop(handle, grace_s=300)
    assert all(is_gone(pid) for pid in workers)


async def test_workers_that_outlive_their_engine_are_found_and_ended(launcher: ProcessLauncher, engines: Engines):
    handle = await launcher.start(engines.spec(WITH_WORKERS))
    workers = {int(pid) for pid in (await engines.written("workers")).split()}
    os.kill(pid_of(handle), signal.SIGKILL)
    await launcher.wait_exit(handle)
    left = await launcher.find(engines.spec(WITH_WORKERS), handle.ref)
    assert left is not None
    assert pid_of(left) in workers
    assert await launcher.pids(left) == workers
    await launcher.stop(handle, grace_s=0.1)
    assert all(is_gone(pid) for pid in workers)


async def test_stopping_what_is_gone_already_is_no_error(launcher: ProcessLauncher, engines: Engines):
    handle = await launcher.start(engines.spec("pass"))
    await launcher.wait_exit(handle)
    await launcher.stop(handle, grace_s=5)
    assert await launcher.pids(handle) == frozenset()


async def test_stopping_one_engine_leaves_the_others(launcher: ProcessLauncher, engines: Engines):
    one = await launcher.start(engines.spec(WAITS, engine="one"))
    other = await launcher.start(engines.spec(WAITS, engine="other"))
    await launcher.stop(one, grace_s=5)
    assert is_gone(pid_of(one))
    assert await launcher.is_alive(other)


async def test_an_engine_is_found_by_its_reference(launcher: ProcessLauncher, engines: Engines, tmp_path: Path):
    spec = engines.spec(WAITS)
    started = await launcher.start(spec)
    found = await ProcessLauncher(tmp_path, SERVICE).find(spec, started.ref)
    assert found == started


async def test_an_engine_whose_reference_was_lost_is_found_by_its_mark(
    launcher: ProcessLauncher, engines: Engines, tmp_path: Path
):
    spec = engines.spec(WITH_WORKERS)
    started = await launcher.start(spec)
    await engines.written("workers")
    later = ProcessLauncher(tmp_path, SERVICE)
    found = await later.find(spec, None)
    assert found is not None
    assert found.ref == started.ref
    assert await later.find(engines.spec(WAITS, engine="another"), None) is None
    assert await ProcessLauncher(tmp_path, "another service").find(spec, None) is None


async def test_a_reused_pid_is_not_taken_for_the_engine(launcher: ProcessLauncher, engines: Engines):
    stranger = subprocess.Popen([sys.executable, "-c", WAITS])  # noqa: ASYNC220 - a test has time
    try:
        spec = engines.spec("pass")
        dead = await launcher.start(spec)
        await launcher.wait_exit(dead)
        now = read_proc(stranger.pid)
        assert now is not None
        # The number is the stranger's by now; the engine that had it started a tick earlier.
        earlier = {**dead.ref, "pid": now.pid, "pgid": now.pid, "start_ticks": now.start_ticks - 1}
        reused = Handle(dead.engine, dead.launcher, dead.url, earlier)
        assert await launcher.find(spec, reused.ref) is None
        assert not await launcher.is_alive(reused)
        assert await launcher.pids(reused) == frozenset()
        await launcher.stop(reused, grace_s=1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_a_reference_from_before_a_reboot_is_not_believed(launcher: ProcessLauncher, engines: Engines):
    spec = engines.spec(WAITS)
    started = await launcher.start(spec)
    old = type(started)(started.engine, started.launcher, started.url, {**started.ref, "boot_id": "an earlier one"})
    assert not await launcher.is_alive(old)
    found = await launcher.find(spec, old.ref)
    assert found is not None
    assert found.ref["boot_id"] == started.ref["boot_id"]


async def test_a_reference_to_another_services_engine_is_refused(
    launcher: ProcessLauncher, engines: Engines, tmp_path: Path
):
    spec = engines.spec(WAITS)
    started = await launcher.start(spec)
    assert await ProcessLauncher(tmp_path, "another service").find(spec, started.ref) is None


STARTER = """
import asyncio, json, os, sys, signal
from pathlib import Path
from rotator.adapters.process import ProcessLauncher
from rotator.ports import LaunchSpec

async def main():
    folder = sys.argv[1]
    spec = LaunchSpec("dsv4-flash", "process", (sys.executable, "-c", sys.argv[3]), {"FOLDER": folder}, "http://x:1",
                      folder + "/dsv4-flash.log")
    handle = await ProcessLauncher(Path(folder), sys.argv[2]).start(spec)
    print(json.dumps(dict(handle.ref)), flush=True)
    signal.pause()

asyncio.run(main())
"""


async def test_an_engine_survives_the_death_of_its_service_and_is_found_again(
    launcher: ProcessLauncher, engines: Engines, tmp_path: Path
):
    talks = SAY + "import time\nsay('up', 1)\nwhile True: print('still here', flush=True); time.sleep(0.01)"
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTER, str(tmp_path), SERVICE, talks, stdout=subprocess.PIPE, cwd=Path.cwd()
    )
    assert service.stdout is not None
    ref = json.loads(await service.stdout.readline())
    await engines.written("up")
    service.kill()
    await service.wait()
    before = len(engines.log())
    await eventually(lambda: len(engines.log()) > before, what="the engine's writing after its service's death")
    spec = engines.spec(talks)
    by_ref, by_mark = await launcher.find(spec, ref), await launcher.find(spec, None)
    assert by_ref is not None
    assert by_mark is not None
    assert by_ref.ref == by_mark.ref == ref
    assert is_same(by_ref)
    await launcher.stop(by_ref, grace_s=5)
    assert is_gone(ref["pid"])


async def test_an_engine_that_takes_no_signal_of_its_services_group_lives_on(
    launcher: ProcessLauncher, engines: Engines, tmp_path: Path
):
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTER, str(tmp_path), SERVICE, WAITS, stdout=subprocess.PIPE, start_new_session=True
    )
    assert service.stdout is not None
    ref = json.loads(await service.stdout.readline())
    os.killpg(service.pid, signal.SIGKILL)
    await service.wait()
    found = await launcher.find(engines.spec(WAITS), ref)
    assert found is not None
    assert await launcher.is_alive(found)
    await launcher.stop(found, grace_s=5)


async def test_processes_are_listed_from_one_reading_for_all_engines(launcher: ProcessLauncher, engines: Engines):
    handles = [await launcher.start(engines.spec(WAITS, engine=f"e{n}")) for n in range(4)]
    listed = await asyncio.gather(*(launcher.pids(handle) for handle in handles))
    assert listed == [{pid_of(handle)} for handle in handles]
    await asyncio.gather(*(launcher.stop(handle, grace_s=5) for handle in handles))
    assert all(is_gone(pid_of(handle)) for handle in handles)


async def test_exits_are_seen_where_the_system_has_no_process_descriptors(
    launcher: ProcessLauncher, engines: Engines, monkeypatch: pytest.MonkeyPatch
):
    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    handle = await launcher.start(engines.spec(WAITS))
    waiting = asyncio.create_task(launcher.wait_exit(handle))
    await asyncio.wait([waiting], timeout=0.2)
    assert not waiting.done()
    await launcher.stop(handle, grace_s=5)
    async with asyncio.timeout(10):
        assert "SIGTERM" in await waiting


async def test_a_launch_that_outlasts_its_deadline_leaves_nothing_running(
    launcher: ProcessLauncher, engines: Engines, monkeypatch: pytest.MonkeyPatch
):
    late: list[int] = []
    kill_late = process._kill_late

    def note(spawning: asyncio.Future[tuple[process._Child, process.ProcessRef]]) -> None:
        kill_late(spawning)
        late.append(spawning.result()[1].pid)

    monkeypatch.setattr(process, "SPAWN_DEADLINE_S", 0.0)
    monkeypatch.setattr(process, "_kill_late", note)
    with pytest.raises(LaunchError, match="did not open in 0 s"):
        await launcher.start(engines.spec(WAITS))
    await eventually(lambda: late != [], what="the late launch")
    assert is_gone(late[0])


async def test_processes_that_will_not_go_are_named(
    launcher: ProcessLauncher, engines: Engines, monkeypatch: pytest.MonkeyPatch
):
    handle = await launcher.start(engines.spec(WAITS))
    with monkeypatch.context() as patch:
        patch.setattr(process, "KILL_DEADLINE_S", 0.1)
        patch.setattr(exits, "send", lambda identity, number: None)
        patch.setattr(exits, "send_group", lambda pgid, members, number: None)
        with pytest.raises(LaunchError, match=rf"still there 0\.1 s after SIGKILL: {pid_of(handle)} \(python"):
            await launcher.stop(handle, grace_s=0)
    await launcher.stop(handle, grace_s=0)
    assert is_gone(pid_of(handle))


STOPS = """
import asyncio, os, sys
from pathlib import Path
from rotator.adapters.process import ProcessLauncher
from rotator.ports import LaunchSpec

async def main():
    folder = sys.argv[1]
    spec = LaunchSpec("dsv4-flash", "process", (sys.executable, "-c", sys.argv[3]), {}, "http://x:1", folder + "/log")
    launcher = ProcessLauncher(Path(folder), sys.argv[2])
    handle = await launcher.start(spec)
    assert await launcher.pids(handle) == {handle.ref["pid"]}
    await launcher.stop(handle, grace_s=0)
    print("lives on")

asyncio.run(main())
"""


async def test_a_service_that_carries_an_engines_mark_does_not_end_itself(launcher: ProcessLauncher, tmp_path: Path):
    marked = {**os.environ, "ROTATOR_ENGINE": "dsv4-flash", "ROTATOR_SERVICE": SERVICE}
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STOPS, str(tmp_path), SERVICE, WAITS, stdout=subprocess.PIPE, env=marked
    )
    said, _ = await service.communicate()
    assert said == b"lives on\n"


def test_a_descriptor_is_of_exactly_the_process_that_is_meant():
    own = read_proc(os.getpid())
    assert own is not None
    descriptor = exits.open_descriptor(own.identity)
    assert descriptor is not None
    os.close(descriptor)
    assert exits.open_descriptor((own.pid, own.start_ticks - 1)) is None
