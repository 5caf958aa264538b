"""Policies by name, and one replay of each."""

from time import perf_counter

from rotator.config_policies import PoliciesConfig
from rotator.sim.baselines import FirstCome, FixedSlices, KeepAlive, LeastRecent
from rotator.sim.box import Box
from rotator.sim.clairvoyant import Clairvoyant, MostServed
from rotator.sim.events import Decider
from rotator.sim.machine import Machine
from rotator.sim.ours import Ours
from rotator.sim.report import DEADLINE_S, Result, result
from rotator.sim.workload import Workload

NAMES = ("ours", "first-come", "lru", "slices", "histogram", "most-served", "clairvoyant")
USUAL = ("ours", "first-come", "lru", "slices", "histogram")
"""What is compared unless told: all that needs no foresight."""

SLICE_S, WINDOW_S = 60.0, 300.0


class PolicyError(Exception):
    """There is no such policy. The text lists them."""


def make(name: str, machine: Machine, ours: PoliciesConfig, *, time_scale: float = 1.0) -> Decider:
    """A fresh policy. A name may end in ``:seconds``: first-come's idle timeout, a slice, the clairvoyant's window.

    ``time_scale`` is by what the trace's time was multiplied: the histogram's bins follow it. Raises PolicyError.
    """
    kind, _, text = name.partition(":")
    try:
        seconds = float(text) if text else None
    except ValueError:
        seconds = -1.0
    if seconds is not None and not seconds > 0:
        raise PolicyError(f"policy '{name}': give seconds after the colon, as slices:60")
    match kind:
        case "ours":
            return Ours(machine, ours)
        case "first-come":
            return FirstCome(seconds)
        case "lru":
            return LeastRecent()
        case "slices":
            return FixedSlices(seconds or SLICE_S)
        case "histogram":
            return KeepAlive(len(machine.specs), time_scale)
        case "most-served":
            return MostServed(machine)
        case "clairvoyant":
            return Clairvoyant(machine, window_s=seconds or WINDOW_S)
    raise PolicyError(f"there is no policy '{kind}': choose of {', '.join(NAMES)}")


def replay(
    name: str,
    policy: Decider,
    machine: Machine,
    work: Workload,
    *,
    deadline_s: float = DEADLINE_S,
) -> Result:
    """Run the whole workload under the policy and sum it up."""
    begun = perf_counter()
    box = Box(machine, work.at_s, work.engine, work.service_s, policy)
    box.run()
    return result(name, box, deadline_s=deadline_s, wall_s=perf_counter() - begun)
