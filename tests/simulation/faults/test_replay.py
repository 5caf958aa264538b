"""A failing seed replays exactly, and shrinks to what matters."""

import os
import subprocess
import sys

from rotator.sim.faults.generate import make_script
from rotator.sim.faults.run import run_script
from rotator.sim.faults.script import Ask, Die, Disk, Kill, Script
from rotator.sim.faults.shrink import shrink
from tests.simulation.faults.stories import ask, engine, story

_DIGEST = """
from rotator.sim.faults.generate import make_script
from rotator.sim.faults.run import run_script
print(run_script(make_script(7, brief=True)).digest)
"""


def test_a_seed_makes_the_same_script_and_the_same_run_to_the_last_event() -> None:
    assert make_script(7) == make_script(7)
    once, again = (run_script(make_script(7, brief=True)) for _ in range(2))
    assert once.digest == again.digest
    assert once.virtual_s == again.virtual_s
    assert run_script(make_script(8, brief=True)).digest != once.digest


def test_a_seed_replays_in_another_process_whatever_order_its_sets_have() -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    assert digests == {run_script(make_script(7, brief=True)).digest}


def test_a_service_that_a_full_disk_keeps_from_starting_leaves_the_same_trace_at_every_run() -> None:
    script = story(ask(1.0, "a"), Disk(4.0, "full", 6.0), Kill(5.0))
    assert run_script(script).digest == run_script(script).digest


def test_a_run_ends_although_a_stream_stands_behind_a_pinned_engine_for_ever() -> None:
    outcome = run_script(make_script(54193, more=False))
    assert outcome.failure is None, outcome.failure
    assert outcome.virtual_s < 600.0


def test_a_failing_script_is_shrunk_to_the_events_that_matter() -> None:
    noise = [ask(float(i), "a") for i in range(1, 30)]
    script = story(*noise, Die(5.5, "b"), Die(20.5, "a"), engines=(engine("a"), engine("b"), engine("c")))

    def fails(tried: Script) -> bool:
        """As a bug that needs both deaths, and a request between them."""
        deaths = [e.at_s for e in tried.events if isinstance(e, Die)]
        return len(deaths) == 2 and any(isinstance(e, Ask) and deaths[0] < e.at_s < deaths[1] for e in tried.events)

    small = shrink(script, fails)
    assert [type(e) for e in small.events] == [Die, Ask, Die]
    assert [e.name for e in small.shape.engines] == ["a", "b"]
    assert small.faults_end_s == 21.5
    assert fails(small)


def test_shrinking_stops_at_its_number_of_runs() -> None:
    runs = []
    script = story(*(ask(float(i), "a") for i in range(1, 64)))
    shrink(script, lambda tried: bool(runs.append(tried)) or len(tried.events) > 50, runs_max=10)
    assert len(runs) <= 10


def test_a_script_is_printed_with_everything_that_makes_it() -> None:
    script = make_script(7)
    text = "\n".join(script.lines())
    assert text.startswith("seed 7: ")
    assert all(str(event) in text for event in script.events)
    assert all(str(shape) in text for shape in script.shape.engines)
