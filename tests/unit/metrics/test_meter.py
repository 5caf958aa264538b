"""Tokens and times as the gateway reads them off an answer."""

import pytest

from rotator.service.gates import Gate, Limits, Ticket
from rotator.service.meter import Meter, tokens_of
from rotator.service.meter import Metered as Answered
from rotator.service.metrics import Metrics


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class _Owner:
    def now_s(self) -> float:
        return 0.0

    def ticket_left(self, ticket: Ticket, gate: Gate, outcome: str) -> None: ...


class Metered:
    def __init__(self, waited_s: float = 0.0) -> None:
        self.metrics, self.clock = Metrics(), Clock()
        self.ticket = Ticket(_Owner(), Gate("glm", Limits(1, 1.0, 1)), "r1", "glm", waited_s)
        self.ticket.entered_s = self.clock.now_s
        self.answered = Answered(self.metrics, self.ticket)
        self.meter = Meter(self.answered, self.clock)

    def stream(self, *pieces: bytes, gap_s: float = 0.5) -> None:
        for piece in pieces:
            self.clock.now_s += gap_s
            self.meter.events(piece)
        self.meter.end()

    def read(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(f"rotator_{name}", {"model": "glm"}) or 0.0


TOKEN = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":11,"completion_tokens":4}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (b'{"choices":[],"usage":{"prompt_tokens":3,"total_tokens":8,"completion_tokens":5}}', (3, 5)),
        (b'{"type":"message_delta","usage":{"input_tokens": 2, "output_tokens": 9}}', (2, 9)),
        (b'{"data":[],"usage":{"prompt_tokens":12,"total_tokens":12}}', (12, 0)),
        (b'{"usage":{"completion_tokens":1}} then {"usage":{"completion_tokens":2}}', (0, 2)),
        (b'{"content":"{\\"usage\\":{\\"completion_tokens\\":99}}"}', None),
        (b'{"choices":[{"delta":{}}],"usage":null}', None),
        (b"", None),
    ],
)
def test_tokens_are_read_from_the_last_usage_and_never_from_what_a_model_wrote(
    text: bytes, tokens: tuple[int, int] | None
) -> None:
    assert tokens_of(text) == tokens


def test_a_stream_that_tells_its_usage_is_counted_by_it() -> None:
    metered = Metered()
    metered.stream(TOKEN, TOKEN, TOKEN, TOKEN, USAGE, DONE)
    assert (metered.read("prompt_tokens_total"), metered.read("completion_tokens_total")) == (7, 4)
    assert metered.read("estimated_answers_total") == 0


def test_a_stream_that_tells_none_is_counted_by_its_events_and_marked_so() -> None:
    metered = Metered()
    metered.stream(TOKEN + TOKEN, TOKEN, DONE)
    assert metered.read("completion_tokens_total") == 3
    assert metered.read("estimated_answers_total") == 1


def test_the_first_token_counts_from_arrival_and_the_others_from_the_first() -> None:
    metered = Metered(waited_s=8.0)
    metered.stream(TOKEN, TOKEN, TOKEN, gap_s=0.5)
    assert metered.read("time_to_first_token_seconds_sum") == 8.5
    assert metered.read("time_per_output_token_seconds_sum") == pytest.approx(1.0 / 2)


def test_time_that_a_stream_stood_still_is_not_its_engines_slowness() -> None:
    metered = Metered()
    metered.ticket._stood_s = 30.0
    metered.clock.now_s += 0.5
    metered.meter.events(TOKEN)
    metered.clock.now_s += 31.0
    metered.meter.events(TOKEN)
    metered.meter.end()
    assert metered.read("time_per_output_token_seconds_sum") == pytest.approx(1.0)


def test_an_answer_in_one_piece_has_tokens_and_no_times() -> None:
    metered = Metered()
    metered.answered.whole(b'{"usage":{"prompt_tokens":3,"completion_tokens":5}}')
    assert metered.read("completion_tokens_total") == 5
    assert metered.read("time_to_first_token_seconds_count") == 0


def test_an_answer_that_never_came_counts_nothing() -> None:
    metered = Metered()
    metered.meter.end()
    assert metered.read("estimated_answers_total") == 0
