"""The layers of the walk, from the lowest up: what each needs to know, and who judges it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rotator.doctor.facts import Facts
from rotator.doctor.findings import Finding, Severity, broken
from rotator.doctor.judge_driver import judge_driver, judge_gpus, judge_kernel, judge_nccl, judge_pcie
from rotator.doctor.judge_engine import judge_files, judge_launch, judge_software
from rotator.doctor.judge_host import judge_host, judge_leftovers
from rotator.doctor.judge_service import judge_ledger, judge_network, judge_nodes, judge_nomad


@dataclass(frozen=True, slots=True)
class Layer:
    """``part`` is the field of Facts that the layer is about, ``also`` are others that its judgement reads."""

    name: str
    says: str
    part: str
    judge: Callable[[Facts], Iterator[Finding]]
    also: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.part, *self.also)


LAYERS: tuple[Layer, ...] = (
    Layer("kernel", "the NVIDIA module of this kernel and of the next", "kernel", judge_kernel, ("driver",)),
    Layer("driver", "module, libraries and firmware of one version", "driver", judge_driver, ("kernel",)),
    Layer("gpus", "all GPUs are there and answer", "gpus", judge_gpus, ("driver",)),
    Layer("pcie", "width and speed of their links", "driver", judge_pcie),
    Layer("leftovers", "processes, VRAM and shared memory of dead engines", "processes", judge_leftovers, ("gpus",)),
    Layer("host", "memory, limits and the clock", "host", judge_host, ("gpus", "ledger")),
    Layer("software", "torch, DeepGEMM and the known-broken table", "software", judge_software, ("gpus",)),
    Layer("nccl", "peer access and shared memory between ranks", "gpus", judge_nccl, ("driver", "processes")),
    Layer("files", "models and overlays are whole", "files", judge_files),
    Layer("launch", "commands can be run, and run as written", "launches", judge_launch),
    Layer("network", "ports", "ports", judge_network),
    Layer("ledger", "the ledger is whole and has room", "ledger", judge_ledger),
    Layer("nomad", "Nomad and its clients' settings", "nomad", judge_nomad),
    Layer("nodes", "agents answer, versions are equal", "nodes", judge_nodes),
)
NAMES = tuple(layer.name for layer in LAYERS)
_ORDER = {Severity.BROKEN: 0, Severity.RISK: 1, Severity.NOTE: 2}


def judge(layer: Layer, facts: Facts) -> tuple[Finding, ...]:
    """What is wrong in one layer, the worst first. A probe that failed is a finding of its own."""
    found = list(layer.judge(facts))
    if (trouble := facts.troubles.get(layer.part)) is not None and layer.name != "pcie":  # told in layer driver
        fix = "`sudo dmesg | tail` for a device or file system that hangs; then `rotator doctor` again"
        found.append(broken(f"{layer.name}.probe", f"looking at {layer.part} failed", trouble, fix))
    return tuple(sorted(found, key=lambda f: _ORDER[f.severity]))
