"""Traces through the command line, and what the shipped one shows."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from rotator import config
from rotator.cli import errors
from rotator.cli.main import run
from rotator.sim.clairvoyant import Clairvoyant, MostServed
from rotator.sim.machine import MASTERS, Machine, MachineError, machine_of
from rotator.sim.policies import USUAL, PolicyError, make, replay
from rotator.sim.report import Result
from rotator.sim.trace import read
from rotator.sim.workload import Workload, assign, at_load

EXAMPLES = Path(__file__).parents[3] / "examples" / "traces"
BOX, DAY = EXAMPLES / "box.yaml", EXAMPLES / "day.csv"
FLEET = config.load(BOX)
MACHINE = machine_of(FLEET)
Output = pytest.CaptureFixture[str]


def shipped(requests: int, load: float, machine: Machine = MACHINE) -> Workload:
    """The first requests of the shipped trace's second half, at that share of the slots' capacity."""
    _, half = assign(read(DAY), machine).halves()
    return at_load(half.part(0, requests), machine, load)


def results(work: Workload, *names: str) -> dict[str, Result]:
    return {name: replay(name, make(name, MACHINE, FLEET.policies), MACHINE, work) for name in names}


def test_the_shipped_trace_is_small_and_the_shipped_machine_is_whole():
    assert DAY.stat().st_size <= 300_000
    assert sum(len(e.gpus) == 4 for e in FLEET.engines) >= 2
    assert all(spec.slots == 8 for spec in MACHINE.specs)


def test_this_fleets_policy_beats_every_other_on_the_shipped_trace():
    seen = results(shipped(900, 0.3), "ours", "first-come", "lru", "slices", "histogram")
    ours = seen.pop("ours")
    best = min(seen.values(), key=lambda r: r.delay_mean_s)
    assert ours.unserved == 0
    assert ours.delay_mean_s < 0.9 * best.delay_mean_s
    assert ours.wait_mean_s < 0.8 * best.wait_mean_s
    assert ours.wait_p99_s < 0.8 * best.wait_p99_s


def test_a_replay_is_the_same_every_time():
    work = shipped(150, 0.25)
    first, again = (results(work, "ours")["ours"] for _ in range(2))
    assert first.delays_s == again.delays_s
    assert first.swaps_per_h == again.swaps_per_h


def test_every_policy_serves_everybody_in_the_end():
    seen = results(shipped(200, 0.3), *USUAL, "most-served")
    assert {name: r.unserved for name, r in seen.items()} == dict.fromkeys(seen, 0)


def test_foresight_delays_no_more_than_the_rule_that_it_plays_on_with():
    work = shipped(150, 0.3)
    rule = replay("rule", MostServed(MACHINE), MACHINE, work)
    clear = replay("clairvoyant", Clairvoyant(MACHINE, window_s=200.0), MACHINE, work)
    assert clear.unserved == 0
    assert clear.delay_mean_s <= rule.delay_mean_s * 1.05


def test_sleeps_that_copy_nothing_move_half_the_bytes():
    masters = machine_of(FLEET, costs=MASTERS)
    work = shipped(300, 0.25)
    stock, kept = (replay("lru", make("lru", m, FLEET.policies), m, work) for m in (MACHINE, masters))
    assert kept.moved_gib_per_h < 0.65 * stock.moved_gib_per_h
    assert kept.lost < stock.lost


def test_a_machine_too_small_for_an_engine_is_refused():
    with pytest.raises(MachineError, match=r"heavy-1.*give --gpu-gib"):
        machine_of(FLEET, gpu_gib=80)


def test_a_policy_that_nobody_knows_is_answered_with_all_there_are():
    with pytest.raises(PolicyError, match="choose of ours, first-come"):
        make("best", MACHINE, FLEET.policies)
    with pytest.raises(PolicyError, match="seconds after the colon"):
        make("slices:long", MACHINE, FLEET.policies)


@pytest.fixture
def little(tmp_path: Path, capsys: Output) -> Path:
    path = tmp_path / "little.csv"
    shape = ["--duration", "1", "--rate", "0.05", "--models", "4", "--burst", "3", "--chain", "0.5", "--day", "0.5"]
    assert run(["trace", str(path), *shape]) == errors.OK
    assert "requests for 4 models" in capsys.readouterr().out
    return path


def test_a_made_trace_is_replayed_under_every_policy(little: Path, capsys: Output):
    assert run(["simulate", "--trace", str(little), "--fleet", str(BOX)]) == errors.OK
    shown = capsys.readouterr().out
    assert [name for name in USUAL if name not in shown] == []


def test_the_comparison_can_be_read_by_a_program_and_looked_at(little: Path, tmp_path: Path, capsys: Output):
    plot = tmp_path / "delays.svg"
    arguments = ["--policy", "ours", "--policy", "slices:30", "--load", "0.2", "--half", "second", "--plot", str(plot)]
    assert run(["simulate", "--trace", str(little), "-c", str(BOX), *arguments, "--json"]) == errors.OK
    answer = json.loads(capsys.readouterr().out)
    assert answer["trace"]["load"] == pytest.approx(0.2)
    assert [p["policy"] for p in answer["policies"]] == ["ours", "slices:30"]
    assert all(p["unserved"] == 0 for p in answer["policies"])
    assert len(ET.fromstring(plot.read_text()).findall("{http://www.w3.org/2000/svg}polyline")) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--trace", "/nowhere.csv"], errors.PROBLEM, "cannot be read"),
        (["--trace", str(BOX)], errors.PROBLEM, "no time column"),
        (["--policy", "best"], errors.USAGE, "there is no policy 'best'"),
        (["--map", "m0=nobody"], errors.USAGE, "not MODEL=ENGINE"),
        (["--costs", "free"], errors.USAGE, "stock or masters"),
        (["--half", "third"], errors.USAGE, "first, second or all"),
        (["--gpu-gib", "80"], errors.PROBLEM, "give --gpu-gib"),
        (["--plot", "/nowhere/x.svg", "--policy", "lru"], errors.PROBLEM, "cannot be written"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_a_line(
    little: Path, capsys: Output, arguments: list[str], code: int, said: str
):
    trace = [] if "--trace" in arguments else ["--trace", str(little)]
    assert run(["simulate", "--fleet", str(BOX), *trace, *arguments]) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err


def test_a_trace_of_one_model_can_be_dealt_to_several(tmp_path: Path, capsys: Output):
    path = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:{m:02}:{s:02}.1234567,500,80" for m in range(30) for s in (0, 20, 40)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    arguments = ["--models", "3", "--policy", "lru", "--json"]
    assert run(["simulate", "--trace", str(path), "-c", str(BOX), *arguments]) == errors.OK
    answer = json.loads(capsys.readouterr().out)
    assert answer["policies"][0]["requests"] == 90
    assert answer["policies"][0]["swaps_per_h"] > 10


def test_shapes_that_cannot_be_made_are_refused(tmp_path: Path, capsys: Output):
    assert run(["trace", str(tmp_path / "x.csv"), "--rate", "0"]) == errors.USAGE
    assert "rate is 0" in capsys.readouterr().err
    assert run(["trace", "/nowhere/x.csv"]) == errors.USAGE
    assert "cannot be written" in capsys.readouterr().err
