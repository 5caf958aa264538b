"""top, logs and bench against the real API over fake operations, and what a shell is offered."""

import dataclasses
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
from fastapi.testclient import TestClient
from rich.console import Console

from rotator.cli import errors, top
from rotator.cli.main import app, run
from rotator.cli.progress import Bars
from rotator.core.values import Command, CommandKind
from rotator.ports import LaunchError
from rotator.service.api import create_api
from rotator.service.events import EventBus
from rotator.service.keys import Keys
from rotator.service.operations import CommandResult
from tests.unit.api.fakes import FakeOperations, engine_view
from tests.unit.cli.transport import ApiTransport, Canned

Service = Callable[..., ApiTransport]
Output = pytest.CaptureFixture[str]


class FakeLogs:
    def __init__(self) -> None:
        self.asked: list[tuple[str, int, bool]] = []
        self.error: LaunchError | None = None

    async def read(self, path: str, *, lines: int, follow: bool) -> AsyncGenerator[tuple[str, ...]]:
        self.asked.append((path, lines, follow))
        if self.error:
            raise self.error
        yield ("loading", "ready")
        if follow:
            yield ()
            yield ("served",)


@pytest.fixture
def logs() -> FakeLogs:
    return FakeLogs()


@pytest.fixture
def logging_service(ops: FakeOperations, logs: FakeLogs) -> ApiTransport:
    keys = Keys(())
    api = create_api(ops, EventBus(), authorize=keys.authorize, guard=keys.guard, logs=logs)
    return ApiTransport(TestClient(api, raise_server_exceptions=False))


# -- logs --------------------------------------------------------------------------------------------------------------


def test_the_last_lines_of_a_log_are_printed(logging_service: ApiTransport, logs: FakeLogs, capsys: Output):
    assert run(["logs", "glm", "-n", "5"], logging_service) == errors.OK
    assert capsys.readouterr().out == "loading\nready\n"
    assert logs.asked == [("/tmp/x.log", 5, False)]


def test_a_log_is_followed_and_told_as_json_lines(logging_service: ApiTransport, capsys: Output):
    assert run(["logs", "org/small", "-f", "--json"], logging_service) == errors.OK
    assert [json.loads(line)["line"] for line in capsys.readouterr().out.splitlines()] == ["loading", "ready", "served"]


def test_an_engine_that_is_attached_has_no_log_here(logging_service: ApiTransport, ops: FakeOperations, capsys: Output):
    ops.views["glm-5.1"] = dataclasses.replace(ops.views["glm-5.1"], log_path="")
    assert run(["logs", "glm"], logging_service) == errors.PROBLEM
    assert "whoever started it has its log" in capsys.readouterr().err


def test_a_log_that_does_not_answer_is_a_failure_in_words(
    logging_service: ApiTransport, logs: FakeLogs, capsys: Output
):
    logs.error = LaunchError("reading /tmp/x.log took longer than 5 s")
    assert run(["logs", "glm"], logging_service) == errors.FAILED
    assert "took longer than 5 s" in capsys.readouterr().err


# -- top ---------------------------------------------------------------------------------------------------------------


def test_one_look_without_a_terminal_shows_engines_gpus_and_the_longest_wait(service: Service, capsys: Output):
    assert run(["top"], service()) == errors.OK
    shown = capsys.readouterr().out
    for word in ("1 waiting", "glm-5.1", "awake", "longest wait: 1.5 s, for glm-5.1", "held by"):
        assert word in shown


def test_looks_are_json_lines_when_asked(service: Service, capsys: Output):
    assert run(["top", "--json", "--count", "2", "--every", "0.1"], service()) == errors.OK
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(look) for look in looks] == [{"engines", "gpus", "queue"}] * 2


def test_engines_are_sorted_by_any_column_and_turned():
    views = [
        dataclasses.asdict(engine_view(name)) | {"waiting": waiting, "held_bytes": (held,)}
        for name, waiting, held in (("b", 1, 30), ("a", 0, 20), ("c", 5, 10))
    ]

    def names(sort: str, reverse: bool = False) -> str:
        return "".join(e["name"] for e in top.ordered(views, sort, reverse))

    assert (names("name"), names("waiting"), names("held"), names("held", True)) == ("abc", "cba", "bac", "cab")


def test_a_narrow_terminal_gets_fewer_columns_and_no_folded_ones(ops: FakeOperations):
    seen = {
        "engines": [dataclasses.asdict(v) for v in ops.engines()],
        "gpus": [dataclasses.asdict(v) for v in ops.gpus()],
        "queue": [],
    }
    console = Console(width=70, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - as long as the console
    console.print(top.frame(seen, "name", False, 70))
    shown = console.export_text()
    assert "held by" not in shown
    assert sum("glm-5.1" in line for line in shown.splitlines()) == 1


# -- bench -------------------------------------------------------------------------------------------------------------

STREAM = b"".join(
    b"data: " + json.dumps(chunk).encode() + b"\n\n"
    for chunk in (
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "Once"}}]},
        {"choices": [{"delta": {"content": " upon"}}]},
        {"choices": [], "usage": {"completion_tokens": 128}},
    )
)


class WithGateway:
    """The API, and a gateway that always streams the same answer."""

    def __init__(self, api: ApiTransport, stream: bytes = STREAM + b"data: [DONE]\n\n") -> None:
        self._api, self._stream = api, stream
        self.asked: list[str] = []

    @contextmanager
    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, deadline_s: float
    ) -> Iterator[Canned]:
        if url.endswith("/v1/chat/completions"):
            self.asked.append(json.loads(body or b"")["model"])
            yield Canned(200, self._stream)
            return
        with self._api.send(method, url, headers, body, deadline_s) as answer:
            yield answer


def idle(ops: FakeOperations) -> None:
    for name, view in ops.views.items():
        ops.views[name] = dataclasses.replace(view, waiting=0, in_flight=0, state="asleep")


def test_a_busy_service_is_not_measured_without_yes(service: Service, ops: FakeOperations, capsys: Output):
    assert run(["bench", "glm"], service()) == errors.REFUSED
    assert "has requests" in capsys.readouterr().err
    assert ops.commands == []


def test_models_take_turns_and_medians_are_told(service: Service, ops: FakeOperations, capsys: Output):
    idle(ops)
    gateway = WithGateway(service())
    assert run(["bench", "glm", "org/small", "--rounds", "2", "--json"], gateway) == errors.OK
    told = json.loads(capsys.readouterr().out)
    assert gateway.asked == ["glm-5.1", "org/small"] * 2
    assert [m["median"]["swap_s"] for m in told["models"]] == [2.1, 2.1]
    assert told["models"][0]["median"]["phases_s"] == {"wake": 1.9}
    assert len(told["models"][0]["ttft_s"]) == 2
    kinds = [c.kind for commands, _, _ in ops.commands for c in commands]
    assert kinds == [CommandKind.WAKE] * 4


def test_one_model_alone_sleeps_in_between(service: Service, ops: FakeOperations):
    idle(ops)
    assert run(["bench", "glm", "--rounds", "1", "--tokens", "0"], WithGateway(service())) == errors.OK
    assert [(c.kind, c.engine) for commands, _, _ in ops.commands for c in commands] == [
        (CommandKind.SLEEP, "glm-5.1"),
        (CommandKind.WAKE, "glm-5.1"),
    ]


def test_one_that_does_not_run_is_started_for_its_first_turn(service: Service, ops: FakeOperations):
    idle(ops)
    ops.views["glm-5.1"] = dataclasses.replace(ops.views["glm-5.1"], state="stopped")
    assert run(["bench", "glm", "--rounds", "1", "--tokens", "0"], WithGateway(service())) == errors.OK
    assert [c.kind for commands, _, _ in ops.commands for c in commands] == [CommandKind.WAKE]


def test_who_was_awake_before_is_awake_afterwards(
    service: Service, ops: FakeOperations, monkeypatch: pytest.MonkeyPatch
):
    idle(ops)
    ops.views["dsv4-flash"] = dataclasses.replace(ops.views["dsv4-flash"], state="awake")
    command = ops.command

    async def yields(*commands: Command, wait: bool, deadline_s: float) -> tuple[CommandResult, ...]:
        ops.views["dsv4-flash"] = dataclasses.replace(ops.views["dsv4-flash"], state="asleep")
        return await command(*commands, wait=wait, deadline_s=deadline_s)

    monkeypatch.setattr(ops, "command", yields)
    assert run(["bench", "glm", "org/small", "--rounds", "1", "--tokens", "0"], WithGateway(service())) == errors.OK
    assert [c.engine for commands, _, _ in ops.commands for c in commands] == ["glm-5.1", "org/small", "dsv4-flash"]


def test_an_answer_without_tokens_is_an_error_of_that_model(service: Service, ops: FakeOperations, capsys: Output):
    idle(ops)
    assert run(["bench", "glm", "--rounds", "1"], WithGateway(service(), b"data: [DONE]\n\n")) == errors.PROBLEM
    assert "its answer had no tokens" in capsys.readouterr().out


# -- bars --------------------------------------------------------------------------------------------------------------


def test_bars_show_bytes_and_the_service_s_own_forecast():
    console = Console(width=140, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115 - as above
    bars = Bars(console)
    bars.see({"kind": "engine.waking", "engine": "glm", "data": {}})
    data = {"action": "wake", "done_bytes": 40 << 30, "total_bytes": 80 << 30, "eta_s": 7.4}
    bars.see({"kind": "engine.progress", "engine": "glm", "data": data})
    console.print(bars.progress.get_renderable())
    shown = console.export_text()
    assert "wake glm" in shown
    assert "40.0/80.0 GiB" in shown
    assert "ready in 7 s" in shown
    bars.see({"kind": "engine.awake", "engine": "glm", "data": {}})
    assert not bars.progress.tasks


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_fault_of_ours_is_one_line_and_a_code_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: Output):
    class Broken:
        def send(self, *_: object, **__: object) -> None:
            raise ZeroDivisionError("oh")

    monkeypatch.delenv("ROTATOR_TRACEBACK", raising=False)
    assert run(["gpus"], Broken()) == errors.INTERNAL  # type: ignore[arg-type] # it is broken on purpose
    assert capsys.readouterr().err.startswith("rotator: internal error: ZeroDivisionError: oh: please report it")


def test_a_shell_can_be_told_to_complete(capsys: Output):
    assert "--install-completion" in {o for p in _root_parameters() for o in p.opts}


def _root_parameters() -> list[object]:
    import typer.main

    return list(typer.main.get_command(app).params)
