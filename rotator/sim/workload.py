"""From a trace's models to a fleet's engines, and from a wished load to a time scale."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from rotator.sim.machine import Machine
from rotator.sim.trace import Trace, TraceError


@dataclass(frozen=True, slots=True)
class Workload:
    """Columns for a box: arrival, engine (index into the machine's specs), service seconds. ``left_out`` requests were
    for models beyond the fleet's engines."""

    at_s: "array[float]"
    engine: "array[int]"
    service_s: "array[float]"
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.at_s)

    def scaled(self, factor: float) -> "Workload":
        """All gaps between arrivals times ``factor``."""
        return Workload(array("d", (t * factor for t in self.at_s)), self.engine, self.service_s, self.left_out)

    def part(self, first: int, end: int) -> "Workload":
        at = self.at_s[first:end]
        zero = at[0] if at else 0.0
        return Workload(array("d", (t - zero for t in at)), self.engine[first:end], self.service_s[first:end])

    def halves(self) -> tuple["Workload", "Workload"]:
        """The first and the second half of the requests: tune on one, report on the other."""
        middle = len(self) // 2
        return self.part(0, middle), self.part(middle, len(self))


def assign(trace: Trace, machine: Machine, *, names: Mapping[str, str] | None = None, fold: bool = False) -> Workload:
    """Give every model of the trace an engine.

    Models that are engines' names go there, ``names`` (model to engine) goes first of all; every other model takes, by
    popularity, the next engine that is still free, in the order of the fleet file. Models beyond the last engine are
    left out, or with ``fold`` dealt round to all engines. Raises TraceError where nothing remains.
    """
    index = machine.index()
    place = {model: index[name] for model, name in (names or {}).items() if name in index}
    place |= {model: index[model] for model in trace.models if model in index and model not in place}
    free = [i for i in range(len(machine.specs)) if i not in set(place.values())]
    rest = [model for model in trace.by_popularity() if model not in place]
    for rank, model in enumerate(rest):
        if rank < len(free):
            place[model] = free[rank]
        elif fold:
            place[model] = rank % len(machine.specs)
    engine_of = [place.get(model, -1) for model in trace.models]
    kept = [i for i, model in enumerate(trace.model) if engine_of[model] >= 0]
    if not kept:
        raise TraceError("no model of the trace has an engine: name engines as the trace's models, or give --map")
    zero = trace.at_s[kept[0]]
    return Workload(
        array("d", (trace.at_s[i] - zero for i in kept)),
        array("l", (engine_of[trace.model[i]] for i in kept)),
        array("d", (trace.service_s[i] for i in kept)),
        len(trace) - len(kept),
    )


def spread(trace: Trace, models: int, skew: float, seed: int) -> Trace:
    """Deal a trace that has one model to ``models`` by a Zipf law: for traces without a model column."""
    weights = [1.0 / (rank + 1) ** skew for rank in range(models)]
    drawn = Random(seed).choices(range(models), weights, k=len(trace))  # a simulation's dice
    return Trace(tuple(f"m{i}" for i in range(models)), trace.at_s, array("l", drawn), trace.service_s, trace.failed)


def occupancy_s(work: Workload, machine: Machine) -> float:
    """Seconds for which the machine is taken if every engine always serves with all its slots full, without any swap.

    An engine is taken for its service seconds over its slots. GPUs are filled best: on each the seconds of the engines
    that need it are added up, two engines that fit beside each other in bytes counting the longer of both.
    """
    taken = [0.0] * len(machine.specs)
    for engine, service in zip(work.engine, work.service_s, strict=True):
        taken[engine] += service / machine.specs[engine].slots
    return max(_on_gpu(gpu, taken, machine) for gpu in range(len(machine.gpu_bytes)))


def _on_gpu(gpu: int, taken: list[float], machine: Machine) -> float:
    """Engines by bytes into shelves of the GPU's height: those side by side are taken at the same time."""
    sized = [(s.awake_bytes[s.gpus.index(gpu)], taken[i]) for i, s in enumerate(machine.specs) if gpu in s.gpus]
    residues = sum(s.residue_bytes[s.gpus.index(gpu)] for s in machine.specs if gpu in s.gpus)
    height = machine.gpu_bytes[gpu] - residues
    return max(sum(size * seconds for size, seconds in sized) / height, _tall(sized, height))


def _tall(sized: list[tuple[int, float]], height: int) -> float:
    """Engines larger than half of the GPU exclude each other."""
    return sum(seconds for size, seconds in sized if size > height / 2)


def load(work: Workload, machine: Machine) -> float:
    """Offered load as a share of saturation: occupancy over the span of the arrivals."""
    span_s = work.at_s[-1] - work.at_s[0]
    return occupancy_s(work, machine) / max(span_s, 1e-9)


def at_load(work: Workload, machine: Machine, share: float) -> Workload:
    """The same requests, their gaps scaled so that the offered load is ``share`` of saturation."""
    return work.scaled(load(work, machine) / share)
