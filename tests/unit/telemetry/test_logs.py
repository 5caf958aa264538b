"""The service's log: one line an event, what it is about, and no secret."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from rotator.adapters.logs import set_up_logs
from rotator.adapters.redact import HIDDEN, redactor
from rotator.config_telemetry import LogConfig
from rotator.ports_telemetry import ABOUT

KEY = "rk-abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


class Log:
    def __init__(self, *, secrets: dict[str, str] | None = None, **config: Any) -> None:
        self._stream = io.StringIO()
        set_up_logs(LogConfig(**config), redactor(secrets or {}), self._stream)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


class About:
    def log_fields(self) -> dict[str, str]:
        return {"request_id": "r1-7", "trace_id": "ab" * 16}


@pytest.fixture
def about() -> Iterator[None]:
    token = ABOUT.set(About())
    yield
    ABOUT.reset(token)


@pytest.mark.usefixtures("about")
def test_a_line_of_json_says_when_what_where_and_about_which_request() -> None:
    log = Log(format="json")
    logging.getLogger("rotator.service.loop").warning("engine %s is late", "glm", extra={"engine": "glm", "other": 1})
    (line,) = log.lines
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "rotator.service.loop",
        "message": "engine glm is late",
        "request_id": "r1-7",
        "trace_id": "ab" * 16,
        "engine": "glm",
    }


def test_an_error_stays_on_its_line_with_its_traceback() -> None:
    log = Log(format="json")
    try:
        raise RuntimeError("lost\nfor good")
    except RuntimeError:
        logging.getLogger("rotator").exception("it failed")
    (line,) = log.lines
    assert line["message"] == "it failed"
    assert "RuntimeError: lost\nfor good" in line["error"]
    assert "test_logs.py" in line["error"]


@pytest.mark.parametrize("format", ["text", "json"])
def test_no_secret_reaches_the_log(format: str) -> None:
    log = Log(format=format, secrets={"HF_TOKEN": "verysecretvalue"})
    logger = logging.getLogger("rotator.service.keys")
    logger.warning("refused Authorization: Bearer %s", KEY)
    logger.warning("a client sent %s", KEY)
    logger.warning("--api-key hunter2hunter2 and https://me:passw0rd@host/ and verysecretvalue")
    try:
        raise ValueError(f"x-api-key={KEY}")
    except ValueError:
        logger.exception("it failed")
    for secret in (KEY, "hunter2", "passw0rd", "verysecretvalue"):
        assert secret not in log.text, secret
    assert log.text.count(HIDDEN) >= 5


@pytest.mark.parametrize("name", ["uvicorn.error", "apscheduler.executors.default", "sqlalchemy.pool", "rotator"])
def test_libraries_log_the_same_way(name: str) -> None:
    log = Log(format="json")
    logging.getLogger(name).error("something")
    assert [line["logger"] for line in log.lines] == [name]


def test_a_level_keeps_quieter_lines_out_and_chatty_libraries_are_held_back() -> None:
    log = Log(format="json", level="info")
    logging.getLogger("rotator").debug("detail")
    logging.getLogger("rotator").info("news")
    logging.getLogger("apscheduler.scheduler").info("Added job")
    assert [line["message"] for line in log.lines] == ["news"]


def test_an_answer_that_was_left_without_its_end_on_purpose_is_no_error() -> None:
    log = Log()
    logging.getLogger("uvicorn.error").error("ASGI callable returned without completing response.")
    assert log.text == ""


def test_a_line_whose_arguments_do_not_fit_is_written_all_the_same() -> None:
    log = Log(format="json")
    logging.getLogger("rotator").warning("%d engines", "three")
    logging.getLogger("rotator").warning("half a character: \ud800")
    assert "three" in log.lines[0]["message"]
    assert len(log.lines) == 2
