"""What the service says of itself to Prometheus, over a fake box under virtual time."""

import asyncio

import pytest

from rotator.core.values import Command, CommandKind, State
from rotator.service.metric_table import ROWS
from rotator.sim.clock import run
from tests.fakes import GIB, make_box, make_config, make_service
from tests.unit.metrics.exposed import PAIR, Measured, lived, samples, scrape, value

SPANS = "rotator_spans_total"  # only where traces are configured


def test_every_metric_of_the_table_is_exposed_with_its_labels_and_nothing_else_of_ours_is() -> None:
    async def story() -> None:
        async with make_service(make_box(**PAIR)) as service, Measured(service) as metrics:
            await lived(service, metrics)
            found: dict[str, set[str]] = {}
            for sample in samples(scrape(metrics)):
                if sample.name.startswith("rotator_") and not sample.name.endswith("_created"):
                    name = sample.name if sample.name in ROWS else sample.name.rpartition("_")[0]
                    found.setdefault(name, set()).update(set(sample.labels) - {"le"})
            wanted = {name: set(row.labels) for name, row in ROWS.items() if name != SPANS}
            assert found == wanted

    run(story())


def test_no_label_comes_from_a_request() -> None:
    async def story() -> None:
        async with make_service(make_box(**PAIR)) as service, Measured(service) as metrics:
            await lived(service, metrics)
            for sample in samples(scrape(metrics)):
                assert sample.labels.get("engine", "a") in ("a", "b")
                assert sample.labels.get("gpu", "0") in ("0", "1", "2", "3")

    run(story())


def test_a_swap_is_counted_by_its_phases_and_its_bytes_by_their_speed() -> None:
    async def story() -> None:
        async with make_service(make_box(**PAIR)) as service, Measured(service) as metrics:
            await lived(service, metrics)
            for phase in ("start", "sleep", "verify", "wake", "canary", "total"):
                assert (value(metrics, "rotator_swap_phase_seconds_count", phase=phase) or 0) >= 1, phase
            assert value(metrics, "rotator_swap_phase_seconds_sum", phase="wake") == 1.0  # of the fake's engines
            moved = value(metrics, "rotator_engine_moved_bytes_total", engine="a", direction="in")
            assert moved == 2 * (60 - 1) * GIB
            speed = value(metrics, "rotator_engine_last_move_bytes_per_second", engine="a", direction="in")
            assert speed == moved
            assert value(metrics, "rotator_engine_canaries_total", engine="a", result="passed") == 1
            assert value(metrics, "rotator_engine_canaries_total", engine="b", result="recorded") == 1
            assert value(metrics, "rotator_engine_state", engine="a", state="awake") == 1
            assert value(metrics, "rotator_engine_state", engine="b", state="awake") == 0

    run(story())


def test_what_a_swap_tells_at_its_end_says_which_engine_was_in_which_phase_when() -> None:
    async def story() -> None:
        async with make_service(make_box(**PAIR)) as service:
            await service.ask("a")
            await service.ask("b")
            await service.ask("a")
            last = [e for e in service.bus.since(0) if e.kind == "swap.ended"][-1].data["timeline"]
            phases = [(row["phase"], row["engine"]) for row in last]
            assert phases == [("drain", "b"), ("sleep", "b"), ("verify", "b"), ("wake", "a"), ("canary", "a")]
            assert [row["at_s"] for row in last] == sorted(row["at_s"] for row in last)
            assert last[3]["seconds"] == 1.0

    run(story())


def test_the_line_shows_how_many_wait_how_long_and_until_when() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        box.engines["a"].start_s = 50.0
        async with make_service(box) as service, Measured(service) as metrics:
            asking = asyncio.create_task(service.ask("a"))
            await asyncio.sleep(20.0)
            assert value(metrics, "rotator_queue_requests", engine="a") == 1
            assert value(metrics, "rotator_queue_oldest_wait_seconds", engine="a") == pytest.approx(20.0)
            assert value(metrics, "rotator_queue_wait_bound_seconds", engine="a") == 600.0
            await asking
            assert value(metrics, "rotator_queue_oldest_wait_seconds", engine="a") == 0.0

    run(story())


def test_bytes_that_the_ledger_does_not_know_of_are_a_drift() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        box.by_pid = False
        async with make_service(box) as service, Measured(service) as metrics:
            await service.ask("a")
            await asyncio.sleep(65.0)
            assert value(metrics, "rotator_gpu_drift_bytes", gpu="0") == 0
            assert value(metrics, "rotator_ledger_differences") == 0
            service.fleet.engines["a"].held_bytes = {"GPU-0": 10 * GIB, "GPU-1": 60 * GIB}
            service.fleet.gpus["GPU-0"].foreign_bytes = 0
            assert value(metrics, "rotator_gpu_drift_bytes", gpu="0") == 50 * GIB

    run(story())


def test_a_failing_canary_is_counted_and_the_engine_shows_as_quarantined() -> None:
    async def story() -> None:
        box = make_box(**PAIR)
        async with make_service(box) as service, Measured(service) as metrics:
            await service.ask("a")
            await service.ask("b")
            box.engines["a"].wake_garbage = True
            with_garbage = asyncio.create_task(service.ask("a"))
            await service.until("a", State.QUARANTINED)
            await asyncio.gather(with_garbage, return_exceptions=True)
            assert value(metrics, "rotator_engine_canaries_total", engine="a", result="failed") == 1
            assert value(metrics, "rotator_engine_state", engine="a", state="quarantined") == 1
            assert (value(metrics, "rotator_swaps_total", result="unfinished") or 0) >= 1
            assert (value(metrics, "rotator_incidents_total", kind="lied") or 0) == 1

    run(story())


def test_outcomes_that_the_ledger_cannot_take_show_as_owed_and_how_long() -> None:
    async def story() -> None:
        now = [0.0]
        async with make_service(make_box(**PAIR)) as service, Measured(service) as metrics:
            service.loop.world.journal.wall = lambda: now[0]
            await service.ask("a")
            entry = await service.loop.world.journal.open("s", "a", "sleep", State.AWAKE, State.ASLEEP, "test")
            service.ledger.broken = True
            await entry.close("ok", State.ASLEEP)
            now[0] = 90.0
            assert value(metrics, "rotator_journal_owed") == 1
            assert value(metrics, "rotator_journal_lag_seconds") == 90.0
            assert value(metrics, "rotator_ledger_healthy") == 0
            service.ledger.broken = False
            await asyncio.sleep(2.0)
            assert value(metrics, "rotator_journal_owed") == 0
            assert value(metrics, "rotator_journal_lag_seconds") == 0.0

    run(story())


def test_a_gpu_that_is_cordoned_says_so() -> None:
    async def story() -> None:
        async with make_service(make_box(**PAIR)) as service, Measured(service) as metrics:
            await service.operator.set_cordon("1", True, "its fan")
            assert value(metrics, "rotator_gpu_health", gpu="1", health="cordoned") == 1
            assert value(metrics, "rotator_gpu_health", gpu="1", health="ok") == 0
            assert value(metrics, "rotator_gpu_info", gpu="1", uuid="GPU-1", name="fake", node="") == 1

    run(story())


def test_events_that_came_faster_than_they_could_be_read_are_counted_as_missed() -> None:
    async def story() -> None:
        async with make_service(make_box(**PAIR)) as service, Measured(service) as metrics:
            await asyncio.sleep(1.0)
            for _ in range(2048 + 10):
                service.bus.publish("noise")
            await asyncio.sleep(0.1)
            assert value(metrics, "rotator_events_missed_total") == 10

    run(story())


def test_a_command_counts_as_a_swap() -> None:
    async def story() -> None:
        config = make_config(box := make_box(**PAIR))
        async with make_service(box, config) as service, Measured(service) as metrics:
            await service.operator.command(Command(CommandKind.START, "a"), wait=True, deadline_s=100.0)
            await asyncio.sleep(0.1)
            assert value(metrics, "rotator_swaps_total", result="ok") == 1
            assert value(metrics, "rotator_engine_launches_total", engine="a") == 1

    run(story())
