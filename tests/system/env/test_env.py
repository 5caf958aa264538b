"""Python environments archived and put back: whole, in one step, or left as they were."""

import os
import shutil
import signal
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from rotator.adapters import env_archive, env_restore
from rotator.adapters.env_archive import archive, list_archives, verify
from rotator.adapters.env_manifest import CONTENT, Manifest
from rotator.adapters.env_restore import restore
from rotator.ports import ArchiveError


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """An environment with a package, a program of its own, and what else environments hold."""
    made = tmp_path / "opt/vllm"
    venv.create(made, symlinks=True, with_pip=False)
    site = next(made.glob("lib/python3*/site-packages"))
    (site / "vllm").mkdir()
    (site / "vllm/__init__.py").write_text("RELEASE = 'old'\n")
    (site / "vllm/large.bin").write_bytes(os.urandom(3 << 20))
    (site / "vllm-0.19.1.dist-info").mkdir()
    (site / "vllm-0.19.1.dist-info/METADATA").write_text("Name: vllm\nVersion: 0.19.1\n")
    (made / "bin/vllm").write_text(f"#!{made}/bin/python\nimport vllm\nprint(vllm.RELEASE)\n")
    (made / "bin/vllm").chmod(0o755)
    return made


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    return tmp_path / "archives"


def upgrade(prefix: Path) -> None:
    """What an upgrade that went wrong leaves: another package, and no program."""
    (next(prefix.glob("lib/python3*/site-packages")) / "vllm/__init__.py").write_text("RELEASE = 'new'\n")
    (prefix / "bin/vllm").unlink()
    (prefix / "bin/left-over").write_text("of the upgrade")


def says(prefix: Path) -> str:
    """What the environment's program answers; ``127`` where a shell would not find it."""
    if not (prefix / "bin/vllm").exists():
        return "127"
    return subprocess.run([prefix / "bin/vllm"], capture_output=True, text=True, check=True).stdout.strip()


def killed(work: Callable[[], object]) -> None:
    """Run in a child that is expected to kill itself."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(3)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the child was to be killed on its way"


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_upgrade_that_took_the_entry_point_is_undone_by_one_command(prefix: Path, archives: Path) -> None:
    made = archive(prefix, archives, "before")
    assert made.packages == {"vllm": "0.19.1"}
    assert made.scripts == ("vllm",)
    upgrade(prefix)
    assert says(prefix) == "127"
    restore(archives, "before")
    assert says(prefix) == "old"
    assert os.access(prefix / "bin/vllm", os.X_OK)
    assert (prefix / "bin/python").is_symlink()
    assert not (prefix / "bin/left-over").exists()
    assert [p.name for p in prefix.parent.iterdir()] == ["vllm"], "nothing is left beside it"


def test_an_environment_that_was_removed_altogether_comes_back(prefix: Path, archives: Path) -> None:
    archive(prefix, archives, "before")
    shutil.rmtree(prefix)
    restore(archives, "before")
    assert says(prefix) == "old"


@pytest.mark.parametrize(("moment", "expected"), [("unpacking", "127"), ("unpacked", "127"), ("exchanged", "old")])
def test_a_restore_that_is_killed_leaves_the_old_whole_or_the_new(
    prefix: Path, archives: Path, monkeypatch: pytest.MonkeyPatch, moment: str, expected: str
) -> None:
    archive(prefix, archives, "before")
    upgrade(prefix)
    synced: list[Path] = []

    def sync(path: Path) -> None:
        synced.append(path)
        if len(synced) == {"unpacked": 1, "exchanged": 2}[moment]:
            die()

    with monkeypatch.context() as patch:
        if moment != "unpacking":
            patch.setattr(env_restore, "sync_folder", sync)
        progress = die if moment == "unpacking" else lambda _: None
        killed(lambda: restore(archives, "before", progress=progress))
    assert says(prefix) == expected
    assert (prefix / "bin/left-over").exists() == (expected == "127")
    restore(archives, "before")
    assert says(prefix) == "old"
    assert [p.name for p in prefix.parent.iterdir()] == ["vllm"]


def test_an_archive_that_is_killed_was_never_there(prefix: Path, archives: Path) -> None:
    killed(lambda: archive(prefix, archives, "half", progress=die))
    assert list_archives(archives) == []
    archive(prefix, archives, "half")
    assert [name for name, _ in list_archives(archives)] == ["half"]
    assert not list(archives.glob(".partial-*"))


def test_a_damaged_archive_is_told_and_touches_nothing(prefix: Path, archives: Path) -> None:
    archive(prefix, archives, "before")
    content = bytearray((archives / "before" / CONTENT).read_bytes())
    content[len(content) // 2] ^= 1
    (archives / "before" / CONTENT).write_bytes(content)
    upgrade(prefix)
    for act in (lambda: verify(archives / "before"), lambda: restore(archives, "before")):
        with pytest.raises(ArchiveError, match="damaged"):
            act()
    assert says(prefix) == "127"
    assert [p.name for p in prefix.parent.iterdir()] == ["vllm"]
    (archives / "before/manifest.json").write_text("{")
    ((name, found),) = list_archives(archives)
    assert not isinstance(found, Manifest)
    assert (name, "damaged" in found) == ("before", True)


def test_an_environment_that_something_runs_from_is_left_alone_unless_told(prefix: Path, archives: Path) -> None:
    archive(prefix, archives, "before")
    command = [prefix / "bin/python", "-c", "print(flush=True); input()"]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert running.stdout is not None
        running.stdout.readline()
        with pytest.raises(ArchiveError, match=rf"in use by {running.pid} \(python"):
            restore(archives, "before")
        restore(archives, "before", even_in_use=True)
        assert running.poll() is None
    finally:
        running.kill()
        running.communicate()


def test_what_cannot_be_archived_is_refused_with_what_to_do(prefix: Path, archives: Path, tmp_path: Path) -> None:
    archive(prefix, archives, "before")
    with pytest.raises(ArchiveError, match="already: choose another name"):
        archive(prefix, archives, "before")
    with pytest.raises(ArchiveError, match="no name for an archive"):
        archive(prefix, archives, "../before")
    with pytest.raises(ArchiveError, match="would hold itself"):
        archive(prefix, prefix / "archives", "inside")
    with pytest.raises(ArchiveError, match="is no virtual environment"):
        archive(tmp_path, archives, "other")
    with pytest.raises(ArchiveError, match="there is no such folder"):
        archive(tmp_path / "nowhere", archives, "other")
    with pytest.raises(ArchiveError, match="there is no archive"):
        restore(archives, "../archives/before")
    os.mkfifo(prefix / "bin/pipe")
    with pytest.raises(ArchiveError, match="neither file, link nor folder"):
        archive(prefix, archives, "pipe")
    assert [name for name, _ in list_archives(archives)] == ["before"]


def test_an_interpreter_that_has_gone_or_changed_is_told_before_anything_moves(
    prefix: Path, archives: Path, tmp_path: Path
) -> None:
    base = tmp_path / "python"
    shutil.copy(os.path.realpath(prefix / "bin/python"), base)
    (prefix / "bin/python").unlink()
    (prefix / "bin/python").symlink_to(base)
    archive(prefix, archives, "before")
    base.write_text("#!/bin/sh\necho 3.99\n")
    with pytest.raises(ArchiveError, match=r"is no longer Python 3\.\d+ \(it says '3\.99'\)"):
        restore(archives, "before")
    base.unlink()
    with pytest.raises(ArchiveError, match="no longer there: install it again"):
        restore(archives, "before")
    assert (prefix / "bin/vllm").exists()


def test_a_disk_without_room_is_told_before_anything_is_written(
    prefix: Path, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive(prefix, archives, "before")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(ArchiveError, match="make room"):
        restore(archives, "before")
    assert [p.name for p in prefix.parent.iterdir()] == ["vllm"]


def test_a_file_that_changes_while_it_is_archived_fails_the_archive(
    prefix: Path, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = next(prefix.glob("lib/python3*/site-packages")) / "vllm/large.bin"
    before = env_archive._Hashing.read

    def grow(self: env_archive._Hashing, size: int = -1) -> bytes:
        with large.open("ab") as file:
            file.write(b"more")
        return before(self, size)

    monkeypatch.setattr(env_archive._Hashing, "read", grow)
    with pytest.raises(ArchiveError, match="changed while it was archived"):
        archive(prefix, archives, "before")
    assert list_archives(archives) == []
