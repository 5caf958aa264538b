"""What a probe looks like on each route, and how its answer is read.

A generating model answers with tokens. A pooling model answers with a vector: some of its components then stand where
log-probabilities stand, scaled so that the vector's root mean square is 1 (a tolerance means the same for any length),
and their positions stand where token ids stand. So a vector is compared within a tolerance, never by a hash, which a
rounding in the last bit would change.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rotator.ports import EngineRefused, Generation, Probe

COMPONENTS_MAX = 64
_OK = 200
_NOT_FOUND = 404
# What releases answer when a model has no such task, or a route is not there: 400, 404, 405, 422, 501.
_UNWELCOME = frozenset({400, _NOT_FOUND, 405, 422, 501})


@dataclass(frozen=True, slots=True)
class ProbeRoute:
    path: str
    body: Callable[[str, Probe], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], Generation]


def unwelcome(refusal: EngineRefused) -> bool:
    """Whether another route may take the probe. A model that the engine does not serve is unwelcome everywhere."""
    return refusal.status in _UNWELCOME and "does not exist" not in str(refusal)


def read_probe(route: ProbeRoute, answer: Mapping[str, Any]) -> Generation:
    """Read an answer with status 200. Raises EngineRefused where it is unfit: no tokens, no log-probabilities, NaN."""
    try:
        return route.read(answer)
    except (AttributeError, TypeError, ValueError) as e:
        raise EngineRefused(f"{route.path} answered in a form that is not vLLM's ({e})", _OK) from None


def _completion_body(model: str, probe: Probe) -> dict[str, Any]:
    return {"prompt": probe.prompt, "logprobs": 2, **_sampling(model, probe)}


def _chat_body(model: str, probe: Probe) -> dict[str, Any]:
    messages = [{"role": "user", "content": probe.prompt}]
    return {"messages": messages, "logprobs": True, "top_logprobs": 2, **_sampling(model, probe)}


def _sampling(model: str, probe: Probe) -> dict[str, Any]:
    body = {
        "model": model,
        "max_tokens": probe.max_tokens,
        "temperature": probe.temperature,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
        "stream": False,
    }
    return body if probe.seed is None else body | {"seed": probe.seed}


def _input_body(model: str, probe: Probe) -> dict[str, Any]:
    return {"model": model, "input": probe.prompt}


def _score_body(model: str, probe: Probe) -> dict[str, Any]:
    return {"model": model, "text_1": probe.prompt, "text_2": [probe.prompt, probe.prompt[::-1]]}


def _read_completion(answer: Mapping[str, Any]) -> Generation:
    choice = _first_choice(answer)
    logprobs = choice.get("logprobs") or {}
    tokens = logprobs.get("tokens") or ()
    tops = logprobs.get("top_logprobs") or (None,) * len(tokens)
    steps = [
        (token, value, (top or {}).items())
        for token, value, top in zip(tokens, logprobs.get("token_logprobs") or (), tops, strict=False)
    ]
    return _generation(steps, str(choice.get("text") or ""))


def _read_chat(answer: Mapping[str, Any]) -> Generation:
    choice = _first_choice(answer)
    steps = [
        (
            step.get("token"),
            step.get("logprob"),
            [(top.get("token"), top.get("logprob")) for top in step.get("top_logprobs") or ()],
        )
        for step in (choice.get("logprobs") or {}).get("content") or ()
    ]
    return _generation(steps, str((choice.get("message") or {}).get("content") or ""))


def _generation(steps: Sequence[tuple[Any, Any, Any]], text: str) -> Generation:
    if not steps:
        raise EngineRefused("it answered without tokens and log-probabilities", _OK)
    return Generation(
        token_ids=tuple(_token_id(token) for token, _, _ in steps),
        logprobs=tuple(_finite(value) for _, value, _ in steps),
        runner_up_logprobs=tuple(_runner_up(token, tops) for token, _, tops in steps),
        text=text,
    )


def _read_embedding(answer: Mapping[str, Any]) -> Generation:
    return _vector(_first_row(answer).get("embedding"))


def _read_pooling(answer: Mapping[str, Any]) -> Generation:
    return _vector(_first_row(answer).get("data"))


def _read_score(answer: Mapping[str, Any]) -> Generation:
    return _vector([row.get("score") for row in answer.get("data") or () if isinstance(row, Mapping)])


def _vector(values: Any) -> Generation:
    flat = [_finite(value) for value in _flat(values)]
    rms = math.sqrt(sum(v * v for v in flat) / len(flat)) if flat else 0.0
    if rms == 0.0:
        raise EngineRefused("it answered with a vector that is empty or all zero", _OK)
    step = max(1, len(flat) // COMPONENTS_MAX)
    positions = tuple(range(0, len(flat), step))[:COMPONENTS_MAX]
    scaled = tuple(flat[i] / rms for i in positions)
    return Generation(positions, scaled, (None,) * len(positions), f"vector of {len(flat)}")


def _flat(values: Any) -> list[Any]:
    """A vector, or one vector a token, as one list."""
    if not isinstance(values, list):
        return [] if values is None else [values]
    return [inner for value in values for inner in _flat(value)]


def _first_choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    return _first(answer.get("choices"), "choices")


def _first_row(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    return _first(answer.get("data"), "data")


def _first(rows: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], Mapping):
        raise EngineRefused(f"it answered a probe without '{name}'", _OK)
    return rows[0]


def _token_id(token: Any) -> int:
    """``token_id:123`` -> 123, the form that return_tokens_as_token_ids asks for."""
    kind, _, number = str(token).partition(":")
    if kind != "token_id" or not number.isdigit():
        raise EngineRefused(f"it answered with the token {token!r} where a token id was asked for", _OK)
    return int(number)


def _finite(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise EngineRefused(f"it answered with {value!r} where a finite number belongs: its state is garbage", _OK)
    return float(value)


def _runner_up(token: Any, tops: Any) -> float | None:
    others = [_finite(value) for other, value in tops if other != token]
    return max(others, default=None)


PROBES: tuple[ProbeRoute, ...] = (
    ProbeRoute("/v1/completions", _completion_body, _read_completion),
    ProbeRoute("/v1/chat/completions", _chat_body, _read_chat),
    ProbeRoute("/v1/embeddings", _input_body, _read_embedding),
    ProbeRoute("/pooling", _input_body, _read_pooling),
    ProbeRoute("/score", _score_body, _read_score),
)
