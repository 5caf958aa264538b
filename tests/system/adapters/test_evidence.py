"""Evidence of real processes: what is collected, what is told as missing, how it is bounded, kept and given out."""

import asyncio
import io
import json
import os
import signal
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rotator.adapters import flight_recorder
from rotator.adapters.evidence import FileEvidence
from rotator.adapters.evidence_store import BundleStore, Retention
from rotator.adapters.evidence_tools import ToolFailed, run_tool
from rotator.adapters.logwatch import WARNING, FileLogWatch
from rotator.app import open_evidence
from rotator.config import FleetConfig
from rotator.config_watchdog import EvidenceConfig
from rotator.ports_watchdog import BundleGone, Case


@pytest.fixture
async def stopped() -> AsyncIterator[int]:
    """A process that stands still, as one that hangs in its driver does."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    os.kill(child.pid, signal.SIGSTOP)
    yield child.pid
    child.kill()
    await child.wait()


def collector(folder: Path, **settings: Any) -> FileEvidence:
    return FileEvidence(folder, lambda: EvidenceConfig(**settings), environ={"A_TOKEN": "word-from-environ"})


async def packed(evidence: FileEvidence, id: str) -> dict[str, bytes]:
    whole = b"".join([piece async for piece in evidence.bundle(id)])
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        files = {m.name: archive.extractfile(m) for m in archive.getmembers() if m.isfile()}
        return {name.removeprefix(f"{id}/"): f.read() for name, f in files.items() if f is not None}


async def test_a_bundle_holds_what_could_be_had_and_names_the_rest(tmp_path: Path, stopped: int) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/m.log").write_text("one\nkey is word-from-environ\n" + "last\n" * 3)
    evidence = collector(tmp_path, log_lines=4)
    case = Case("i1", "m", frozenset({stopped, 999_999}), (0,), "logs/m.log", {"incident.json": '{"a": 1}'})
    size = await evidence.collect(case, deadline_s=10)
    files = await packed(evidence, "i1")
    assert size == sum(map(len, files.values()))
    kernel = files[f"stacks/{stopped}-kernel.txt"].decode()
    assert f"thread {stopped}: " in kernel
    assert "wchan=" in kernel
    assert files["log.txt"] == b"key is [hidden]\nlast\nlast\nlast"
    manifest = json.loads(files["manifest.json"])
    missing = {m["what"]: m["why"] for m in manifest["missing"]}
    assert missing["process 999999: kernel"] == "it is gone"
    assert "no rank listens" in missing["nccl"]
    assert manifest == await evidence.manifest("i1")
    assert (tmp_path / "incidents/i1").stat().st_mode & 0o077 == 0


async def test_a_flight_recorder_that_listens_is_asked_and_its_dump_taken(tmp_path: Path, stopped: int) -> None:
    told = flight_recorder.environment(tmp_path, "m")
    prefix = told["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"]
    assert told["TORCH_FR_DUMP_TEMP_FILE"] == prefix
    os.mkfifo(f"{prefix}0.pipe")
    os.mkfifo(f"{prefix}1.pipe")  # nobody listens there

    reader = os.open(f"{prefix}0.pipe", os.O_RDONLY | os.O_NONBLOCK)
    loop, evidence = asyncio.get_running_loop(), collector(tmp_path)

    def dump() -> None:
        loop.remove_reader(reader)
        Path(f"{prefix}0").write_bytes(b"\x80dump")

    loop.add_reader(reader, dump)
    try:
        await evidence.collect(Case("i1", "m", frozenset({stopped})), deadline_s=10)
    finally:
        loop.remove_reader(reader)
        os.close(reader)
    assert (await packed(evidence, "i1"))["nccl/rank_0"] == b"\x80dump"
    flight_recorder.environment(tmp_path, "m")
    assert list(flight_recorder.folder_of(tmp_path, "m").iterdir()) == [], "the next launch begins with none"


async def test_what_does_not_fit_is_cut_and_what_is_late_is_left_out(tmp_path: Path) -> None:
    evidence = collector(tmp_path, bundle_max_mib=0.001)
    size = await evidence.collect(Case("i1", texts={"a.txt": "x" * 5000, "b.txt": "y"}), deadline_s=10)
    manifest = await evidence.manifest("i1")
    assert size < 3000
    assert manifest["items"][0]["cut_from_bytes"] == 5000
    assert any(m["what"] == "b.txt" for m in manifest["missing"])
    await evidence.collect(Case("i2", texts={}), deadline_s=0.0)
    late = {m["what"]: m["why"] for m in (await evidence.manifest("i2"))["missing"]}
    assert {"nvidia-smi.txt", "kernel-log.txt"} <= late.keys()


async def test_evidence_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "incidents").write_text("a file where the folder should be")
    assert await collector(tmp_path).collect(Case("i1"), deadline_s=1) == 0


@pytest.mark.parametrize("id", ["../secrets", "a/b", "..", "", "x" * 300, "nothing-there"])
async def test_no_id_leads_out_of_the_folder(tmp_path: Path, id: str) -> None:
    (tmp_path / "secrets").mkdir()
    with pytest.raises(BundleGone):
        await anext(collector(tmp_path).bundle(id))


def test_bundles_go_by_number_age_and_bytes_and_the_newest_stays(tmp_path: Path) -> None:
    store = BundleStore(tmp_path)
    for number in range(5):
        folder = store.make(f"i{number}")
        (folder / "f").write_bytes(b"x" * 100)
        os.utime(folder, (1000 + number, 1000 + number))
    assert store.retain(Retention(kept=4, kept_s=1e9, kept_bytes=10**6), 2000) == ("i0",)
    assert store.retain(Retention(kept=9, kept_s=997.5, kept_bytes=10**6), 2000) == ("i1", "i2")
    assert store.retain(Retention(kept=9, kept_s=1e9, kept_bytes=50), 2000) == ("i3",)
    assert [p.name for p in tmp_path.iterdir()] == ["i4"]


async def test_a_tool_that_hangs_is_killed_at_its_deadline_and_one_that_is_missing_is_named() -> None:
    with pytest.raises(ToolFailed, match="not done within"):
        await run_tool(("sleep", "30"), deadline_s=0.1)
    with pytest.raises(ToolFailed, match="not installed"):
        await run_tool(("no-such-tool",), deadline_s=1)
    with pytest.raises(ToolFailed, match="ended with 1"):
        await run_tool(("false",), deadline_s=5)
    assert await run_tool(("echo", "here"), deadline_s=5) == "here\n"


async def test_log_warnings_are_counted_once_from_the_first_look_on_over_rotations(tmp_path: Path) -> None:
    log, watch = tmp_path / "m.log", FileLogWatch(tmp_path)
    line = WARNING + b" in 60 seconds.\n"
    assert await watch.warnings("m.log") == 0, "no log is no warning"
    log.write_bytes(line)
    assert await watch.warnings("m.log") == 0, "what was there before is old"
    with log.open("ab") as file:
        file.write(line + line[:20])
    assert await watch.warnings("m.log") == 1
    with log.open("ab") as file:
        file.write(line[20:])
    assert await watch.warnings("m.log") == 2
    log.rename(tmp_path / "m.log.1")
    log.write_bytes(line)
    assert await watch.warnings("m.log") == 3


async def test_values_that_the_fleet_file_gives_engines_are_hidden_in_bundles(tmp_path: Path) -> None:
    engines = [
        {"name": name, "command": ["x"], "gpus": [0], "env": {"MY_TOKEN": f"word-of-{name}-alone"}}
        for name in ("one", "two")
    ]
    fleet = FleetConfig.model_validate({"engines": engines})
    evidence = open_evidence(fleet, tmp_path, EvidenceConfig)
    await evidence.collect(Case("i1", texts={"a.txt": "word-of-one-alone word-of-two-alone"}), deadline_s=10)
    assert (await packed(evidence, "i1"))["a.txt"] == b"[hidden] [hidden]"


async def test_a_bundle_in_the_making_is_not_dropped_for_another_that_is_done(tmp_path: Path) -> None:
    evidence = collector(tmp_path, kept=1)
    os.mkfifo(tmp_path / "m.log")  # a log that hangs: its bundle is done last
    slow = asyncio.create_task(evidence.collect(Case("i1", log_path="m.log", texts={"a": "1"}), deadline_s=1))
    async with asyncio.timeout(5):
        while not (tmp_path / "incidents/i1/a").exists():  # noqa: ASYNC110 - a folder sets no event
            await asyncio.sleep(0.01)
    assert await evidence.collect(Case("i2", texts={"a": "2"}), deadline_s=1) > 0
    assert await slow > 0
    assert await evidence.manifest("i1")
    os.close(os.open(tmp_path / "m.log", os.O_WRONLY | os.O_NONBLOCK))  # whoever still waits there may go


def test_what_vanishes_while_bundles_are_counted_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BundleStore(tmp_path)
    (store.make("i1") / "f").write_bytes(b"x" * 100)
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: [*rglob(self, pattern), self / "gone"])
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    assert store.size("i1") == 100
