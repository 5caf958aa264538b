"""How a process ends: waiting for it (child or not), signalling it and no other, and saying it in words."""

import asyncio
import contextlib
import os
import signal

from rotator.adapters.proctable import Identity, Proc, is_running

POLL_S = 0.05


async def wait_gone(identity: Identity) -> None:
    """Return when the process is gone. Told by the kernel where it has process descriptors, else polled."""
    descriptor = open_descriptor(identity)
    if descriptor is None:
        while await asyncio.to_thread(is_running, identity):  # noqa: ASYNC110 - nobody sets an event for us here
            await asyncio.sleep(POLL_S)
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def open_descriptor(identity: Identity) -> int | None:
    """A descriptor of exactly this process, to be closed by the caller. None if it is gone or the system (an old
    kernel, a strict container) has no such thing."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        descriptor = os.pidfd_open(identity[0])
    except OSError:
        return None
    if is_running(identity):
        return descriptor
    os.close(descriptor)
    return None


def send(identity: Identity, number: signal.Signals) -> None:
    """Signal exactly this process; nothing happens if it is gone or not ours to signal."""
    descriptor = open_descriptor(identity)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if descriptor is not None:
            try:
                signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)
        elif is_running(identity):
            os.kill(identity[0], number)


def send_group(pgid: int, members: tuple[Proc, ...], number: signal.Signals) -> None:
    """Signal a whole group at once, if a process known as ours is in it (else its number may be another's by now)."""
    if any(proc.pgrp == pgid for proc in members):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pgid, number)


def in_words(returncode: int | None) -> str:
    """How a process ended, for operators. None: it was not our child, so nobody told us."""
    match returncode:
        case None:
            return "gone (an earlier life of the service started it, so its exit code is not known)"
        case 126:
            return "exit code 126: a program in its command may not be executed (this is no engine crash)"
        case 127:
            return "exit code 127: a program in its command was not found (this is no engine crash)"
        case code if code >= 0:
            return f"exit code {code}"
        case code if code == -signal.SIGKILL:
            return "killed by SIGKILL (if nobody did it: out of memory, see dmesg)"
        case code:
            return f"killed by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
