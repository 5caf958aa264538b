"""Environments as a rollout exchanges them: archived, changed in place by an installer, put back."""

import fcntl
import hashlib
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rotator.ports import ArchiveError
from rotator.rollout.ports import Away, StepFailed
from rotator.rollout.records import Settings

INSTALL_S = 3600.0
_TAIL = 2000


class LocalEnvironments:
    """Implements rollout.ports.Environments: one environment, exchanged by one command.

    An installer outlives the command that began it, if that is killed: it holds a lock of the environment as long as
    it (or what it started) is at work, and nobody else installs or restores meanwhile."""

    def __init__(self, settings: Settings, rollout_id: str) -> None:
        self._prefix, self._archives = Path(settings.environment), Path(settings.archives)
        self._install = settings.install
        self._id = rollout_id

    def archive(self, engine: str) -> Mapping[str, Any]:
        from rotator.adapters.env_archive import archive, verify

        name = f"rollout-{self._id}"
        try:
            if (self._archives / name).is_dir():  # the command died after it was made
                verify(self._archives / name)
            else:
                archive(self._prefix, self._archives, name)
        except ArchiveError as e:
            raise StepFailed(str(e)) from None
        return {"name": name}

    def install(self, engine: str) -> Mapping[str, Any]:
        with self._alone() as lock:
            code, said = self._run(lock)
        if code != 0:
            raise StepFailed(f"{self._shown} ended with code {code}: {_last_line(said)}", {"said": said})
        return {"said": said}

    def restore(self, engine: str, name: str) -> Mapping[str, Any]:
        from rotator.adapters.env_restore import restore

        try:
            with self._alone():
                made = restore(self._archives, name)
        except ArchiveError as e:
            raise StepFailed(str(e)) from None
        return {"prefix": made.prefix}

    @property
    def _shown(self) -> str:
        return f"`{shlex.join(self._install)}`"

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """The lock's descriptor, for whoever is to hold it, too. Raises Away while an earlier installer holds it."""
        prefix = hashlib.sha256(str(self._prefix).encode()).hexdigest()[:16]
        try:
            self._archives.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._archives / f".installing-{prefix}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise StepFailed(f"{self._archives}: {e.strerror}: mend its rights") from None
        try:
            self._take(lock)
            yield lock
            fcntl.flock(lock, fcntl.LOCK_UN)  # whatever the installer left running in the background may keep on
        finally:
            os.close(lock)

    def _take(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(lock, 32, 0).decode().strip() or "unknown"
            raise Away(
                f"a killed command left its installer at work in {self._prefix} (process group {who}): it may end by "
                f"itself, or end it by `kill -- -{who}`"
            ) from None

    def _run(self, lock: int) -> tuple[int, str]:
        """The installer's exit code and the end of what it said: into a file, which breaks for nobody."""
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    self._install,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
            except OSError as e:
                raise StepFailed(f"{self._shown} cannot be run: {e.strerror}") from None
            os.pwrite(lock, f"{process.pid:<32}".encode(), 0)
            code = self._ended(process)
            said.seek(max(0, said.seek(0, os.SEEK_END) - _TAIL))
            return code, said.read().decode(errors="replace")

    def _ended(self, process: subprocess.Popen[bytes]) -> int:
        """It and its children end with our patience, and with us where we can still say so."""
        try:
            return process.wait(INSTALL_S)
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{self._shown} did not end in {INSTALL_S:.0f} s") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]
