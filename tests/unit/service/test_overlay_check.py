"""Whether workers run the overlay that they are said to run: before the first client, and again after a restart."""

import pytest

from rotator.config import EngineConfig
from rotator.core.overlay import BundledFile, RunFile, strangers
from rotator.core.values import State
from rotator.service.gates import EngineUnavailable
from rotator.sim.clock import run
from tests.fakes import FakeLedger, make_box, make_service

ONE = {"a": ((0, 1, 2, 3), 82.0)}
CUMEM = BundledFile("vllm/device_allocator/cumem.py", "a" * 64, "b" * 64)
CORE = BundledFile("vllm/v1/engine/core.py", "c" * 64, "d" * 64)


class Check:
    def __init__(self, wrong: str | None) -> None:
        self.wrong = wrong
        self.asked: list[str] = []

    async def __call__(self, engine: EngineConfig, url: str) -> str | None:
        self.asked.append(url)
        return self.wrong


def test_an_engine_that_runs_other_files_is_quarantined_with_them_as_evidence() -> None:
    async def story() -> None:
        check = Check("it does not run the overlay: rank 1: cumem.py")
        async with make_service(make_box(**ONE)) as service:
            service.loop.world.overlay_check = check
            with pytest.raises(EngineUnavailable, match="rank 1: cumem"):
                await service.ask("a")
            assert service.state("a") in (State.STOPPING, State.QUARANTINED)
            assert "rank 1: cumem.py" in service.fleet.engines["a"].reason
            assert check.asked == ["http://fake/a"]

    run(story())


def test_an_engine_that_runs_its_overlay_gets_clients() -> None:
    async def story() -> None:
        check = Check(None)
        async with make_service(make_box(**ONE)) as service:
            service.loop.world.overlay_check = check
            await service.ask("a")
            assert service.state("a") is State.AWAKE
            assert check.asked

    run(story())


def told(bundled: BundledFile, **changed: object) -> RunFile:
    facts: dict[str, object] = {
        "file": f"/opt/{bundled.path}",
        "sha256": bundled.sha256,
        "loaded": True,
        "mark": bundled.mark,
    }
    return RunFile(bundled.path, **(facts | changed))  # type: ignore[arg-type]


def test_every_rank_must_run_every_file() -> None:
    good = (told(CUMEM), told(CORE))
    assert strangers((CUMEM, CORE), (good, good)) == ()
    assert strangers((CUMEM, CORE), (good, good[:1])) == (f"rank 1: {CORE.path}: it does not tell which file it runs",)


def test_another_file_is_told_with_its_place_and_hash() -> None:
    (line,) = strangers((CUMEM,), ((told(CUMEM, file="/opt/other/cumem.py", sha256="e" * 64),),))
    assert "/opt/other/cumem.py" in line
    assert "e" * 64 in line


def test_code_that_was_not_compiled_from_the_file_is_another_code() -> None:
    assert strangers((CUMEM,), ((told(CUMEM, mark=None),),))
    assert strangers((CUMEM,), ((told(CUMEM, mark="f" * 64),),))


def test_a_file_that_a_process_has_not_loaded_counts_by_its_bytes() -> None:
    assert strangers((CUMEM,), ((told(CUMEM, loaded=False, mark=None),),)) == ()


def test_an_engine_that_is_found_running_other_files_is_not_adopted() -> None:
    box, ledger = make_box(**ONE), FakeLedger()

    async def first() -> None:
        async with make_service(box, ledger=ledger) as service:
            await service.ask("a")

    async def second() -> None:
        service = make_service(box, ledger=ledger)
        service.loop.world.overlay_check = Check("it does not run the overlay")
        async with service:
            await service.until("a", State.QUARANTINED)
            assert "found running, but unfit" in service.fleet.engines["a"].reason

    run(first())
    run(second())
