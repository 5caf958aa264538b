"""The NVML adapter, unmodified, over the simulated NVML: real processes hold real bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from allocator.box import SimulatedBox

GIB = 1 << 30

HOLDER = (
    "import sys\n"
    "from allocator import Allocator\n"
    "with Allocator() as a:\n"
    "    a.alloc(int(sys.argv[1]), device=int(sys.argv[2]))\n"
    "    print('holds', flush=True)\n"
    "    sys.stdin.read()\n"
)

# Answers one JSON line for each line it is given: "read 0", "inventory", "fork 0". What fails answers with its words.
READER = """
import asyncio, dataclasses, json, os, sys, time
from rotator.adapters.devices import NvmlDevices
from rotator.ports import DeviceError

async def answer(devices, ids, words):
    begun = time.monotonic()
    try:
        match words:
            case ["inventory"]:
                infos = await devices.inventory(deadline_s=1)
                ids[:] = [info.id for info in infos]
                said = [dataclasses.asdict(info) for info in infos]
            case ["read", index]:
                said = dataclasses.asdict(await devices.read(ids[int(index)], deadline_s=0.3))
    except DeviceError as e:
        said = {"error": type(e).__name__, "words": str(e)}
    return {"said": said, "seconds": time.monotonic() - begun}

async def main():
    devices, ids = NvmlDevices(), sys.argv[1].split(",")
    for line in sys.stdin:
        match line.split():
            case ["fork", index]:
                if os.fork() == 0:
                    told = asyncio.new_event_loop()
                    asyncio._set_running_loop(None)
                    print(json.dumps(told.run_until_complete(answer(devices, ids, ["read", index]))), flush=True)
                    os._exit(0)
                os.wait()
            case words:
                print(json.dumps(await answer(devices, ids, words)), flush=True)

asyncio.run(main())
"""


class Talk:
    """A process that is asked by lines and answers by lines."""

    def __init__(self, program: str, arguments: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, words: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def box(tmp_path: Path) -> SimulatedBox:
    return SimulatedBox.create(tmp_path / "box", devices=4, copy_gib_s=0)


@pytest.fixture
def reader(box: SimulatedBox) -> Iterator[Talk]:
    talk = Talk(READER, [",".join(box.uuids)], box.nvml_env())
    yield talk
    talk.end()


@pytest.fixture
def holder(box: SimulatedBox) -> Iterator[Talk]:
    talk = Talk(HOLDER, [str(6 * GIB), "2"], box.env())
    assert talk.line() == "holds"
    yield talk
    talk.end()


def test_the_inventory_is_that_of_the_box(box: SimulatedBox, reader: Talk):
    infos = reader.ask("inventory")["said"]
    assert [(info["id"], info["index"], info["name"], info["total_bytes"]) for info in infos] == [
        (uuid, index, box.name, box.memory_bytes) for index, uuid in enumerate(box.uuids)
    ]
    assert infos[0]["compute_capability"] == [12, 0]
    assert infos[1]["pci_bus_id"] == "00000000:02:00.0"


def test_bytes_are_shown_by_process_and_are_back_when_it_is_killed(box: SimulatedBox, reader: Talk, holder: Talk):
    reading = reader.ask("read 2")["said"]
    assert reading["used_bytes"] == 6 * GIB
    assert reading["by_pid"] == {str(holder.process.pid): 6 * GIB}
    assert reader.ask("read 1")["said"]["used_bytes"] == 0
    holder.end()
    assert reader.ask("read 2")["said"]["used_bytes"] == 0


def test_bytes_of_nobody_are_used_and_in_no_process(box: SimulatedBox, reader: Talk):
    box.set_foreign_bytes(3, 2 * GIB)
    reading = reader.ask("read 3")["said"]
    assert reading["used_bytes"] == 2 * GIB
    assert not reading["by_pid"]


def test_a_hung_gpu_times_out_then_refuses_at_once_then_recovers(box: SimulatedBox, reader: Talk):
    reader.ask("inventory")
    with box.hanging_nvml(1):
        first, second = reader.ask("read 1"), reader.ask("read 1")
        assert first["said"]["error"] == second["said"]["error"] == "DeviceTimeout"
        assert first["seconds"] >= 0.3
        assert "still hangs" in second["said"]["words"]
        assert second["seconds"] < 0.2
        assert reader.ask("read 0")["said"]["used_bytes"] == 0
    assert _until_read(reader, 1)["used_bytes"] == 0


def test_a_hung_gpu_is_left_out_of_an_inventory_and_in_the_next(box: SimulatedBox, reader: Talk):
    with box.hanging_nvml(1):
        assert [info["index"] for info in reader.ask("inventory")["said"]] == [0, 2, 3]
    for _ in range(200):
        indices = [info["index"] for info in reader.ask("inventory")["said"]]
        if indices == [0, 1, 2, 3]:
            break
    assert indices == [0, 1, 2, 3]


def test_a_lost_gpu_is_told_and_read_again_when_it_is_back(box: SimulatedBox, reader: Talk):
    box.fail_nvml(0)
    said = reader.ask("read 0")["said"]
    assert said["error"] == "DeviceError"
    assert "GPU is lost" in said["words"]
    box.heal_nvml(0)
    assert reader.ask("read 0")["said"]["used_bytes"] == 0


def test_a_forked_process_reads_too(reader: Talk, holder: Talk):
    assert reader.ask("read 2")["said"]["used_bytes"] == 6 * GIB
    assert reader.ask("fork 2")["said"]["used_bytes"] == 6 * GIB


def test_without_a_driver_the_words_say_what_to_do(tmp_path: Path):
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")  # found before any real one, and none
    talk = Talk(READER, ["GPU-x"], {"LD_LIBRARY_PATH": str(tmp_path)})
    try:
        said = talk.ask("inventory")["said"]
    finally:
        talk.end()
    assert said["error"] == "DeviceError"
    assert "no NVIDIA driver library found (libnvidia-ml.so.1): install the NVIDIA driver" in said["words"]


def _until_read(reader: Talk, gpu: int) -> Any:
    for _ in range(1000):
        said = reader.ask(f"read {gpu}")["said"]
        if "error" not in said:
            return said
    raise AssertionError(f"GPU {gpu} did not come back: {said}")
