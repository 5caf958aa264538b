"""Which bounds on turns can hold together: minimum stay, longest wait, and the share of time that swaps may cost."""

from collections.abc import Iterator, Mapping, Sequence

from rotator.core.costs import load_s
from rotator.core.values import Engine, Gpu, GpuId, Policy, State


def bounds_feasible(engines: Sequence[Engine], policy: Policy, gpus: Mapping[GpuId, Gpu]) -> bool:
    """Whether minimum stay and longest wait hold at once when all of these engines are wanted all the time."""
    return next(_unfair(engines, policy, gpus), None) is None


def contradictions(engines: Sequence[Engine], policy: Policy, gpus: Mapping[GpuId, Gpu]) -> tuple[str, ...]:
    """One sentence each for bounds that cannot all be kept under full load, with what to change; empty if all can.

    Engines are judged by their footprints and costs alone, in whatever state they are. Those that no GPU can hold at
    once with the others contend: in the worst case each of them has its turn before the last.
    """
    return (*_unfair(engines, policy, gpus), *_costly(engines, policy, gpus))


def _unfair(engines: Sequence[Engine], policy: Policy, gpus: Mapping[GpuId, Gpu]) -> Iterator[str]:
    if policy.longest_wait_s is None:
        return
    told: set[frozenset[str]] = set()
    for gpu, group in contending(engines, gpus):
        names = frozenset(e.name for e in group)
        round_s = least_round_s(group, policy)
        if names not in told and round_s > policy.longest_wait_s:
            told.add(names)
            yield (
                f"{len(group)} engines take turns on {gpu} ({', '.join(sorted(names))}): with min_stay_s "
                f"{policy.min_stay_s:g} and the times of their swaps and drains a round of turns takes "
                f"{round_s:.0f} s, more than longest_wait_s {policy.longest_wait_s:g}: raise longest_wait_s above "
                f"{round_s:.0f}, lower min_stay_s or drain_bound_s, or give them fewer rivals a GPU"
            )


def _costly(engines: Sequence[Engine], policy: Policy, gpus: Mapping[GpuId, Gpu]) -> Iterator[str]:
    """Where overdue wishes would end turns before they have earned their swap."""
    if policy.swap_share is None or policy.longest_wait_s is None:
        return
    told: set[frozenset[str]] = set()
    for gpu, group in contending(engines, gpus):
        names = frozenset(e.name for e in group)
        swaps_s = sum(e.sleep_cost_s + _wake_s(e) for e in group)
        needed_s = swaps_s / policy.swap_share
        if names not in told and needed_s > policy.longest_wait_s:
            told.add(names)
            yield (
                f"swaps among {', '.join(sorted(names))} on {gpu} cost {swaps_s:.1f} s a round, which is "
                f"{policy.swap_share:.0%} of {needed_s:.0f} s: under full load longest_wait_s "
                f"{policy.longest_wait_s:g} ends turns before that: raise it above {needed_s:.0f}, or "
                f"allow a swap_share of {min(1.0, swaps_s / policy.longest_wait_s):.0%}"
            )


def contending(engines: Sequence[Engine], gpus: Mapping[GpuId, Gpu]) -> Iterator[tuple[GpuId, list[Engine]]]:
    """For each GPU the engines that take turns there: those that do not fit beside some other one. Where each fits
    beside each other and only all of them do not, all take turns. Pinned engines never do."""
    for id, gpu in gpus.items():
        here = [(e.awake_bytes[e.gpus.index(id)], e) for e in engines if id in e.gpus and not e.pinned]
        room = (
            gpu.total_bytes
            - gpu.reserve_bytes
            - sum(e.awake_bytes[e.gpus.index(id)] for e in engines if id in e.gpus and e.pinned)
        )
        if len(here) < 2 or sum(size for size, _ in here) <= room:
            continue
        here.sort(key=lambda item: (-item[0], item[1].name))
        largest, second = here[0][0], here[1][0]
        crowd = [e for i, (size, e) in enumerate(here) if size + (second if i == 0 else largest) > room]
        yield id, crowd or [e for _, e in here]


def least_round_s(group: Sequence[Engine], policy: Policy) -> float:
    """Seconds from the last engine's wish to its serving when every other has its least turn first."""
    longest = max(group, key=lambda e: e.sleep_cost_s + _wake_s(e))
    others = [e for e in group if e is not longest]
    turns_s = sum(_wake_s(e) + policy.min_stay_s + policy.drain_bound_s + e.sleep_cost_s for e in others)
    return turns_s + longest.sleep_cost_s + _wake_s(longest)


def _wake_s(engine: Engine) -> float:
    return load_s(engine) if engine.state is State.AWAKE else engine.wake_cost_s
