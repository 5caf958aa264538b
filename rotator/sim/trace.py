"""Traces: who asked for which model when, and how long it was served.

A trace is columns, not objects: replays touch every request several times. Times are seconds from the first request.
"""

import csv
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

PROBLEMS_MAX = 5  # so many bad rows are named before reading is given up
SECONDS_MAX = 1e9  # a service time or a time of day beyond this is a mistake of unit


class TraceError(Exception):
    """The trace cannot be used. The text says where, what, and what to do; one line a problem."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests by arrival. ``model[i]`` is an index into ``models``; all columns are parallel.

    ``failed`` counts rows of the file that were no requests served (BurstGPT marks failures by zero tokens).
    """

    models: tuple[str, ...]
    at_s: "array[float]"
    model: "array[int]"
    service_s: "array[float]"
    failed: int = 0

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.at_s[-1] - self.at_s[0] if self.at_s else 0.0

    def scaled(self, factor: float) -> "Trace":
        """The same requests with all gaps between arrivals times ``factor``: 0.5 doubles the load."""
        return replace(self, at_s=array("d", (t * factor for t in self.at_s)))

    def halves(self) -> tuple["Trace", "Trace"]:
        """The first and the second half of the requests: tune on one, report on the other."""
        middle = len(self) // 2
        return self.part(0, middle), self.part(middle, len(self))

    def part(self, first: int, end: int) -> "Trace":
        """Requests ``first`` to ``end``, from their own zero."""
        at = self.at_s[first:end]
        zero = at[0] if at else 0.0
        return replace(
            self,
            at_s=array("d", (t - zero for t in at)),
            model=self.model[first:end],
            service_s=self.service_s[first:end],
        )

    def by_popularity(self) -> tuple[str, ...]:
        """Models that are asked for, the most wanted first; equals by name."""
        counts = Counter(self.model)
        return tuple(self.models[m] for m in sorted(counts, key=lambda m: (-counts[m], self.models[m])))


@dataclass(frozen=True, slots=True)
class TokenRates:
    """What turns tokens into service seconds where a trace has tokens: one stream's speed, in tokens a second.

    The defaults are round figures for a large model on four GPUs; give your own where you know them.
    """

    prefill_per_s: float = 8000.0
    decode_per_s: float = 40.0

    def seconds(self, prompt: float, generated: float) -> float:
        return prompt / self.prefill_per_s + generated / self.decode_per_s


def make(rows: Iterable[tuple[float, str, float]], failed: int = 0) -> Trace:
    """A trace of (time s, model, service s) rows in any order."""
    ordered = sorted(rows, key=lambda row: row[0])
    names = {name: i for i, name in enumerate(dict.fromkeys(row[1] for row in ordered))}
    zero = ordered[0][0] if ordered else 0.0
    return Trace(
        tuple(names),
        array("d", (row[0] - zero for row in ordered)),
        array("l", (names[row[1]] for row in ordered)),
        array("d", (row[2] for row in ordered)),
        failed,
    )


# -- reading -----------------------------------------------------------------------------------------------------------

# Column names by meaning, lower case: ours first, then those of public traces (Azure LLM inference, BurstGPT, GenTD26).
_TIME = ("time", "arrived_at", "timestamp", "gmt_create")
_MODEL = ("model", "checkpoint_model_version_id")
_SECONDS = ("service_seconds", "service_s", "exec_time_seconds")
_PROMPT = ("prompt_tokens", "contexttokens", "request tokens")
_GENERATED = ("generated_tokens", "generatedtokens", "response tokens")
_ONLY_MODEL = "model"  # the name of the one model of a trace without a model column


def read(path: Path, rates: TokenRates | None = None) -> Trace:
    """Read a CSV trace. It needs a time column, and service seconds or tokens; a model column where there are several.

    Known are the names above. Times are seconds, or ISO 8601. Rows with tokens all 0 are failures, and are counted.
    Raises TraceError with the line numbers of bad rows.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return parse(file, str(path), rates)
    except OSError as e:
        raise TraceError(f"{path}: cannot be read ({e.strerror}): give the trace's path") from None
    except UnicodeDecodeError as e:
        raise TraceError(f"{path}: byte {e.start} is not UTF-8: save the trace as UTF-8 text") from None


def parse(lines: Iterable[str], name: str, rates: TokenRates | None = None) -> Trace:
    """The trace in lines of CSV, as ``read`` does; ``name`` stands for it in errors. Raises TraceError."""
    try:
        return _parse(name, csv.reader(lines), rates or TokenRates())
    except csv.Error as e:
        raise TraceError(f"{name}: is no CSV ({e}): save it as comma-separated text") from None


def _parse(path: str, rows: Iterator[list[str]], rates: TokenRates) -> Trace:
    header = next(rows, None)
    if header is None:
        raise TraceError(f"{path}: is empty: the first line names the columns, e.g. time,model,service_seconds")
    parsed = _parser(path, [name.strip().lower() for name in header], rates)
    found: list[tuple[float, str, float]] = []
    problems: list[str] = []
    failed = 0
    for line, row in enumerate(rows, start=2):
        if not row:
            continue
        try:
            request = parsed(row)
        except (ValueError, IndexError) as e:
            problems.append(f"{path}:{line}: {_what(e, row, header)}")
            if len(problems) == PROBLEMS_MAX:
                problems.append(f"{path}: more may follow: mend these lines first")
                break
            continue
        if request is None:
            failed += 1
        else:
            found.append(request)
    if problems:
        raise TraceError("\n".join(problems))
    if not found:
        raise TraceError(f"{path}: has no requests below its header: nothing to replay")
    return make(found, failed)


def _what(error: Exception, row: Sequence[str], header: Sequence[str]) -> str:
    if isinstance(error, IndexError):
        return f"has {len(row)} columns where the header names {len(header)}: complete or remove the line"
    return str(error)


def _parser(path: str, names: list[str], rates: TokenRates) -> Callable[[list[str]], tuple[float, str, float] | None]:
    """What reads one row into (time s, model, service s), None for a failure; it raises ValueError or IndexError."""
    time, model, seconds = (_column(names, known) for known in (_TIME, _MODEL, _SECONDS))
    prompt, generated = _column(names, _PROMPT), _column(names, _GENERATED)
    if time is None:
        raise TraceError(f"{path}:1: no time column: name one of {', '.join(_TIME)}")
    if seconds is None and generated is None:
        wanted = ", ".join((*_SECONDS, *_GENERATED))
        raise TraceError(f"{path}:1: neither service seconds nor tokens: name one of {wanted}")

    def parse(row: list[str]) -> tuple[float, str, float] | None:
        at_s = _moment(row[time])
        name = row[model].strip() if model is not None else _ONLY_MODEL
        if not name:
            raise ValueError("the model is empty: name it")
        if seconds is not None or generated is None:
            return at_s, name, _number(row[seconds or 0], "service seconds")
        out = _number(row[generated], "generated tokens")
        into = _number(row[prompt], "prompt tokens") if prompt is not None else 0.0
        return None if out == 0 else (at_s, name, rates.seconds(into, out))

    return parse


def _column(names: list[str], known: tuple[str, ...]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)


def _moment(text: str) -> float:
    """Seconds of a number or an ISO 8601 time; more digits of a second than six (Azure has seven) are cut."""
    try:
        value = float(text)
    except ValueError:
        whole, dot, fraction = text.strip().partition(".")
        digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
        try:
            parsed = datetime.fromisoformat(f"{whole}{dot}{digits[:6]}{fraction[len(digits) :]}")
        except ValueError:
            raise ValueError(f"'{text}' is no time: give seconds, or a date as 2026-01-31 12:00:00") from None
        return (parsed.replace(tzinfo=None) - datetime(2000, 1, 1)).total_seconds()  # zones within a file are one
    if not abs(value) < SECONDS_MAX * 10:
        raise ValueError(f"'{text}' is no time in seconds: milliseconds? divide them by 1000")
    return value


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{what}: '{text}' is no number") from None
    if not 0 <= value < SECONDS_MAX:
        raise ValueError(f"{what}: '{text}' is out of range: it must be 0 or more, below 1e9")
    return value


# -- writing -----------------------------------------------------------------------------------------------------------


def write(trace: Trace, path: Path) -> None:
    """Write a trace as ``time,model,service_seconds``, to a hundredth of a second. Raises TraceError."""
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(("time", "model", "service_seconds"))
            columns = zip(trace.at_s, trace.model, trace.service_s, strict=True)
            out.writerows((f"{at:.2f}", trace.models[model], f"{service:.2f}") for at, model, service in columns)
    except OSError as e:
        raise TraceError(f"{path}: cannot be written ({e.strerror}): choose another path") from None
