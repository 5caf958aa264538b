"""The engines' own metrics, gathered on one page with a ``model`` label.

An engine is asked when somebody scrapes, at most every few seconds, side by side, with a deadline; it is only ever
asked while it is awake or drains, and being asked is no use: it keeps nobody awake and wakes nobody. One that sleeps is
shown as it last was: its process lives and its counters stand where they stood, so nothing is lost from their rates;
the age of what is shown stands beside it. One whose process has ended is not shown: its counters are gone, and
Prometheus shall see that its series end.

Pages are parsed by prometheus_client in slices, between which requests go on.
"""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

from rotator.core.values import EngineName, State
from rotator.ports import EngineControl, EngineError, RotatorError
from rotator.service.loop import Loop
from rotator.service.metric_table import ENGINE_ROWS, Families
from rotator.service.metrics import Metrics

EVERY_S = 5.0  # however many scrape, an engine is asked no more often
DEADLINE_S = 2.0
PAGE_BYTES_MAX = 2 << 20
SAMPLES_MAX = 20_000  # of one engine
_SLICE_LINES = 40
_ASKED = (State.AWAKE, State.DRAINING)
_SHOWN = (*_ASKED, State.FALLING_ASLEEP, State.ASLEEP, State.WAKING)


class Unreadable(RotatorError):
    """A page that is not shown; ``reason`` is one of the counter's words."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(slots=True)
class Page:
    """One engine's metrics: by family its head (HELP and TYPE) and its samples, labelled."""

    at_s: float
    launch: object
    heads: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[str]] = field(default_factory=dict)
    count: int = 0


class Federation:
    """``text`` is what ``/metrics/engines`` answers."""

    def __init__(self, loop: Loop, control: EngineControl, metrics: Metrics) -> None:
        self._loop = loop
        self._control = control
        self._metrics = metrics
        self._pages: dict[EngineName, Page] = {}
        self._asked_at_s = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def text(self) -> bytes:
        """The page as it is now, at most EVERY_S and DEADLINE_S old for engines that answer."""
        now_s = self._loop.now_s()
        if self._asking is None and now_s - self._asked_at_s >= EVERY_S:
            self._asked_at_s = now_s
            self._asking = asyncio.create_task(self._ask_all())
            self._asking.add_done_callback(self._asked)
        if self._asking is not None:
            await asyncio.shield(self._asking)
        return await self._joined()

    def _asked(self, _: "asyncio.Task[None]") -> None:
        self._asking = None

    async def _ask_all(self) -> None:
        engines = {e.name: e for e in self._loop.all_runtimes()}
        for name, page in tuple(self._pages.items()):
            engine = engines.get(name)
            if engine is None or engine.state not in _SHOWN or page.launch != engine.counters.starts:
                del self._pages[name]
        asked = [e for e in engines.values() if e.state in _ASKED]
        await asyncio.gather(*(self._ask(e.name, e.url, e.counters.starts) for e in asked))

    async def _ask(self, name: EngineName, url: str, launch: int) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                page = Page(self._loop.now_s(), launch)
                await read_page(page, name, await self._control.metrics(url, deadline_s=DEADLINE_S))
        except Unreadable as e:
            self._metrics.scrape_failed(name, e.reason)
        except (EngineError, TimeoutError):
            self._metrics.scrape_failed(name, "unreachable")
        else:
            self._pages[name] = page

    async def _joined(self) -> bytes:
        """Each family once, with the samples of all engines. A family that two releases give other types is shown of
        the first."""
        now_s, own = self._loop.now_s(), Families(ENGINE_ROWS, ENGINE_ROWS)
        owners: dict[str, str] = {}
        pages = dict(self._pages)
        for name, page in pages.items():
            own.add("rotator_engine_metrics_age_seconds", max(0.0, now_s - page.at_s), name)
            own.add("rotator_engine_metrics_samples", page.count, name)
            for family, head in page.heads.items():
                owners.setdefault(family, head)
        lines = [_shown(own.all())]
        for family, head in owners.items():
            lines.append(head)
            for name, page in pages.items():
                if page.heads.get(family, head).rpartition("# TYPE")[2] != head.rpartition("# TYPE")[2]:
                    self._metrics.scrape_failed(name, "conflict")
                    continue
                lines += page.samples.get(family, ())
            await asyncio.sleep(0)
        return "".join(lines).encode()


async def read_page(page: Page, model: str, text: str) -> None:
    """Fill a page from an engine's text. Raises Unreadable."""
    if len(text) > PAGE_BYTES_MAX:
        raise Unreadable("too_large", f"{len(text)} bytes")
    for part in slices(text):
        try:
            families = list(text_string_to_metric_families(part))
        except (ValueError, KeyError, IndexError, OverflowError, TypeError) as e:
            raise Unreadable("malformed", str(e)) from None
        for family in families:
            _take(page, model, family)
        if page.count > SAMPLES_MAX:
            raise Unreadable("too_large", f"more than {SAMPLES_MAX} samples")
        await asyncio.sleep(0)


def slices(text: str) -> Iterator[str]:
    """The text in pieces that take about a millisecond, each with the head of the family that it goes on with."""
    head: list[str] = []
    lines: list[str] = []
    pending = 0  # samples among the lines
    after_sample = False
    for line in text.splitlines():
        lines.append(line)
        if line.startswith("#"):
            head = [line] if after_sample else [*head, line]
            after_sample = False
        elif line.strip():
            pending, after_sample = pending + 1, True
            if pending >= _SLICE_LINES:
                yield "\n".join(lines) + "\n"
                lines, pending = list(head), 0
    if pending:
        yield "\n".join(lines) + "\n"


def _take(page: Page, model: str, family: Metric) -> None:
    if not family.samples:
        return
    samples = []
    for sample in family.samples:
        labels = {"exported_model" if name == "model" else name: value for name, value in sample.labels.items()}
        samples.append(sample._replace(labels={"model": model, **labels}))
    family.samples = samples
    page.count += len(samples)
    lines = _shown([family]).splitlines(keepends=True)
    heads = [line for line in lines if line.startswith("#")]
    name = heads[0].split(" ", 3)[2]
    page.heads.setdefault(name, "".join(heads))
    page.samples.setdefault(name, []).extend(line for line in lines if not line.startswith("#"))


class _These(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _shown(families: Iterable[Metric]) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_These(families))
    return generate_latest(registry).decode()
