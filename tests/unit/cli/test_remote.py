"""Commands that speak to a running service."""

import json
from collections.abc import Callable

import pytest

from rotator.cli import errors
from rotator.cli.main import run
from rotator.config import ConfigError
from rotator.core.values import CommandKind, Level
from rotator.service.operations import CommandFailed, CommandRefused, CommandTimeout, Readiness
from tests.unit.api.conftest import key
from tests.unit.api.fakes import FakeOperations
from tests.unit.cli.transport import ApiTransport, Canned, CannedTransport

Service = Callable[..., ApiTransport]
Output = pytest.CaptureFixture[str]


def test_status_shows_engines_and_gpus_and_ends_well_when_ready(service: Service, capsys: Output):
    assert run(["status"], service()) == errors.OK
    shown = capsys.readouterr().out
    assert shown.startswith("ready\n")
    for word in ("glm-5.1", "asleep", "RTX PRO 6000", "r-1"):
        assert word in shown


def test_status_of_a_service_that_is_not_ready_tells_why(service: Service, ops: FakeOperations, capsys: Output):
    ops.ready = Readiness(False, ("the ledger cannot be written",))
    assert run(["status"], service()) == errors.PROBLEM
    assert "NOT READY\n  the ledger cannot be written" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "engines", "gpus", "queue", "plan", "ledger"])
def test_every_look_prints_json_when_asked(service: Service, capsys: Output, command: str):
    assert run([command, "--json"], service()) == errors.OK
    assert json.loads(capsys.readouterr().out)


def test_one_engine_is_shown_whole_even_with_a_slash_in_its_name(service: Service, capsys: Output):
    assert run(["engines", "org/small"], service()) == errors.OK
    assert "/tmp/x.log" in capsys.readouterr().out


def test_a_reason_in_brackets_is_shown_as_it_is(service: Service, ops: FakeOperations, capsys: Output):
    import dataclasses

    ops.views = {"a": dataclasses.replace(ops.views["glm-5.1"], reason="[red] not markup [/red]")}
    assert run(["engines"], service()) == errors.OK
    assert "[red] not markup [/red]" in capsys.readouterr().out


def test_a_wake_waits_and_shows_where_the_time_went(service: Service, ops: FakeOperations, capsys: Output):
    transport = service()
    assert run(["wake", "glm", "--deadline", "50"], transport) == errors.OK
    assert capsys.readouterr().out == "glm-5.1: wake done in 2.10 s, it is awake (wake 1.90)\n"
    [(commands, wait, deadline_s)] = ops.commands
    assert (commands[0].kind, wait, deadline_s) == (CommandKind.WAKE, True, 50.0)
    assert transport.deadlines_s == [60.0]  # the service answers its 504 before the connection gives up


def test_a_command_that_does_not_wait_says_how_to_follow_it(service: Service, capsys: Output):
    assert run(["sleep", "glm", "--level", "2", "--no-wait"], service()) == errors.OK
    assert capsys.readouterr().out.startswith("glm-5.1: sleep begun")


def test_a_swap_names_who_yields(service: Service, ops: FakeOperations):
    assert run(["swap", "glm", "--sleep", "dsv4-flash", "--level", "2"], service()) == errors.OK
    [(commands, _, _)] = ops.commands
    assert [(c.kind, c.engine, c.level) for c in commands] == [
        (CommandKind.SLEEP, "dsv4-flash", Level.DISCARD),
        (CommandKind.WAKE, "glm-5.1", None),
    ]


def test_a_dry_run_shows_the_plan_in_words(service: Service, ops: FakeOperations, capsys: Output):
    assert run(["swap", "glm", "--dry-run"], service()) == errors.OK
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "dry run, nothing was done:"
    assert "sleep dsv4-flash (1.1 s): cheapest to bring back" in shown
    assert ops.commands == []


@pytest.mark.parametrize("action", ["start", "stop", "restart"])
def test_an_engine_is_started_stopped_and_restarted(service: Service, capsys: Output, action: str):
    assert run([action, "org/small"], service()) == errors.OK
    assert "org/small" in capsys.readouterr().out


@pytest.mark.parametrize(("action", "says"), [("pin", "asleep, pinned"), ("unpin", "asleep"), ("release", "asleep")])
def test_settings_of_an_engine_show_it_afterwards(service: Service, capsys: Output, action: str, says: str):
    assert run([action, "glm"], service()) == errors.OK
    assert capsys.readouterr().out == f"glm-5.1: {says}\n"


def test_a_gpu_is_cordoned_and_uncordoned(service: Service, capsys: Output):
    assert run(["cordon", "1", "--reason", "riser"], service()) == errors.OK
    assert run(["cordon", "1", "--undo"], service()) == errors.OK
    assert capsys.readouterr().out == "GPU 1: cordoned\nGPU 1: ok\n"


def test_a_reload_shows_each_change(service: Service, capsys: Output):
    assert run(["reload"], service()) == errors.OK
    assert "2.0 -> 5.0 (applied)" in capsys.readouterr().out


def test_the_ledger_is_filtered_and_tells_of_more(service: Service, ops: FakeOperations, capsys: Output):
    assert run(["ledger", "leases", "--where", "engine=glm-5.1", "--limit", "1"], service()) == errors.OK
    assert ops.calls == [("ledger", "leases", {"engine": "glm-5.1"}, 1, None)]
    assert "more: --cursor next" in capsys.readouterr().out


def test_a_ledger_that_differs_from_the_devices_is_a_problem(service: Service, capsys: Output):
    assert run(["ledger", "--check"], service()) == errors.PROBLEM
    assert "the device 9 GiB" in capsys.readouterr().out


STREAM = b""": stream open

id: 1
event: engine.awake
data: {"id":1,"at_wall_s":1000.0,"kind":"engine.awake","engine":"glm","data":{"seconds":1.9}}

: nothing new

id: 2
event: swap.done
data: {"id":2,"at_wall_s":1001.0,"kind":"swap.done","engine":null,"data":{}}

"""


def test_events_are_followed_line_by_line(capsys: Output):
    transport = CannedTransport(Canned(200, STREAM))
    assert run(["events", "--kind", "swap", "--kind", "engine", "--after", "0"], transport) == errors.UNREACHABLE
    told = capsys.readouterr()
    assert "no more events come" in told.err
    first, second = told.out.splitlines()
    assert first.endswith("engine.awake glm seconds=1.9")
    assert second.endswith("swap.done")
    assert transport.urls == ["http://127.0.0.1:8400/events?kind=swap&kind=engine&after=0"]


def test_what_is_nested_in_an_event_is_told_in_few_words(capsys: Output):
    plan = {"evict": [{"action": "sleep", "engine": "a"}], "admit": {"action": "wake", "engine": "b"}, "reason": "why"}
    data = {"plan": plan, "error": None, "phases_s": {"wake": 1.5}, "timeline": [{"phase": "wake"}]}
    event = {"id": 1, "at_wall_s": 1000.0, "kind": "swap.ended", "engine": "b", "data": data}
    body = f"data: {json.dumps(event)}\n\n".encode()
    assert run(["events", "--count", "1"], CannedTransport(Canned(200, body))) == errors.OK
    assert capsys.readouterr().out.endswith("swap.ended b plan='sleep a, then wake b: why' phases_s=(wake 1.5)\n")


def test_events_end_after_as_many_as_were_asked_for_as_json_lines(capsys: Output):
    assert run(["events", "--count", "1", "--json"], CannedTransport(Canned(200, STREAM))) == errors.OK
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == [1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CommandRefused("glm-5.1 is pinned: unpin it first"), errors.REFUSED),
        (CommandFailed("rank 2 ran out of memory"), errors.FAILED),
        (CommandTimeout("still waking after 5 s; it goes on"), errors.FAILED),
        (KeyError("inside"), errors.FAILED),
    ],
)
def test_a_command_that_does_not_succeed_ends_with_its_code_and_one_line(
    service: Service, ops: FakeOperations, capsys: Output, error: Exception, code: int
):
    ops.error = error
    assert run(["wake", "glm"], service()) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("rotator: ")


@pytest.mark.parametrize("wrong", [["engine 'b'.nope: unknown key"], ["engine 'a': one", "engine 'b': two"]])
def test_a_reload_of_a_wrong_file_tells_each_mistake(
    service: Service, ops: FakeOperations, capsys: Output, wrong: list[str]
):
    ops.error = ConfigError(wrong)
    assert run(["reload"], service()) == errors.PROBLEM
    assert capsys.readouterr().err.splitlines() == [f"rotator: {wrong[0]}", *(f"rotator: {w}" for w in wrong[1:])]


def test_an_unknown_model_is_a_problem_with_close_names(service: Service, capsys: Output):
    assert run(["wake", "glm-5"], service()) == errors.PROBLEM
    assert "close: glm-5.1" in capsys.readouterr().err


def test_a_missing_key_and_a_missing_scope_are_refusals(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: Output
):
    locked = service(key("infer"), key("operate"))
    assert run(["wake", "glm"], locked) == errors.REFUSED
    assert "set ROTATOR_KEY" in capsys.readouterr().err
    assert run(["wake", "glm", "--key", "infer-secret"], locked) == errors.REFUSED
    monkeypatch.setenv("ROTATOR_KEY", "operate-secret")
    assert run(["wake", "glm"], locked) == errors.OK


def test_a_service_that_is_not_there_is_told_in_one_line(capsys: Output):
    gone = CannedTransport(ConnectionRefusedError(111, "Connection refused"))
    assert run(["status", "--url", "http://127.0.0.1:9"], gone) == errors.UNREACHABLE
    (line,) = capsys.readouterr().err.splitlines()
    assert "is `rotator serve` running?" in line


@pytest.mark.parametrize("answer", [Canned(200, b"<html>"), Canned(404, b"<html>"), Canned(500, b"[]")])
def test_something_else_that_answers_there_is_not_taken_for_the_service(answer: Canned, capsys: Output):
    assert run(["engines"], CannedTransport(answer)) == errors.UNREACHABLE
    assert "check --url" in capsys.readouterr().err


def test_an_answer_that_does_not_come_in_time_is_a_failure():
    assert run(["wake", "glm"], CannedTransport(TimeoutError())) == errors.FAILED


@pytest.mark.parametrize(
    "arguments",
    [
        ["wake"],
        ["wake", "glm", "--level", "x"],
        ["nonsense"],
        ["sleep", "glm", "--level", "3"],
        ["status", "--url", "x"],
    ],
)
def test_wrong_usage_has_its_own_code(service: Service, arguments: list[str], capsys: Output):
    assert run(arguments, service()) == errors.USAGE
    assert "Traceback" not in capsys.readouterr().err


def test_a_filter_that_is_no_filter_is_wrong_usage(service: Service, ops: FakeOperations):
    assert run(["ledger", "--where", "engine"], service()) == errors.USAGE
    assert run(["ledger", "--where", "limit=5"], service()) == errors.USAGE
    assert ops.calls == []


def test_the_help_names_every_command_and_the_exit_codes(capsys: Output):
    assert run(["--help"]) == errors.OK
    shown = capsys.readouterr().out
    commands = """serve check schema key demo status wake sleep swap plan events ledger engines gpus queue
    start stop restart release pin unpin cordon reload"""
    for command in commands.split():
        assert command in shown
    assert "Exit codes" in shown
    assert run(["--version"]) == errors.OK
    assert capsys.readouterr().out == "0.1.0\n"
