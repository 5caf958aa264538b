"""The replay: what a request goes through, second by second. A sleep takes 1 s and a wake 2 s here."""

import pytest

from rotator.core.values import Depth, Level, State
from rotator.sim.box import Box
from rotator.sim.events import Victim
from rotator.sim.machine import Machine, Spec
from tests.unit.sim.machines import Scripted, box, machine, spec


def on_demand(box: Box) -> None:
    """Wakes whoever waits, into room or past everyone in the way, who freeze at once."""
    for e, state in enumerate(box.state):
        if state is State.ASLEEP and box.is_wanted(e) and box.claimed().isdisjoint(box.specs[e].gpus):
            awake = [o for o, s in enumerate(box.state) if s is State.AWAKE]
            box.swap(e, tuple(Victim(o, Level.HOST, 0.0) for o in awake))


def begun(box: Box) -> list[float]:
    return [float(t) for t in box.first_s]


def ended(box: Box) -> list[float]:
    return [float(t) for t in box.done_s]


def test_an_awake_engine_serves_at_once():
    one = box(machine(spec("a")), [(0, 0, 5), (1, 0, 5)], Scripted(), awake=[0])
    one.run()
    assert (begun(one), ended(one)) == ([0, 1], [5, 6])


def test_a_request_beyond_the_slots_waits_inside_for_the_first_to_end():
    one = box(machine(spec("a", slots=2)), [(0, 0, 5), (0, 0, 9), (1, 0, 5)], Scripted(), awake=[0])
    one.run()
    assert begun(one) == [0, 0, 5]
    assert ended(one) == [5, 9, 10]


def test_all_who_wait_come_in_with_one_wake():
    one = box(machine(spec("a")), [(0, 0, 5), (1, 0, 5)], Scripted(on_demand))
    one.run()
    assert begun(one) == [2, 2]
    assert (one.counts.wakes, one.counts.swaps) == (1, 1)


def in_turns(box: Box) -> None:
    """Whoever is wanted goes in at once, but nobody who still has work of its own and came by this rule yields."""
    for mine, other in ((0, 1), (1, 0)):
        wanted = box.is_wanted(mine) and box.state[mine] is State.ASLEEP and not box.swaps
        if wanted and box.state[other] is State.AWAKE and (other == 0 or not box.in_flight(other)):
            box.swap(mine, (Victim(other, Level.HOST, 0.0),))


def test_a_frozen_request_keeps_what_it_had():
    one = box(machine(spec("a"), spec("b")), [(0, 0, 10), (4, 1, 3)], Scripted(in_turns), awake=[0])
    one.run()
    # a serves 4 s and sleeps until 5; b wakes at 7, is done at 10 and sleeps until 11; a wakes at 13 with 6 s to go
    assert ended(one) == [19, 10]
    assert one.counts.freezes == 1


def test_admission_closes_when_the_drain_begins():
    def drain(box: Box) -> None:
        if box.waiting[1] and box.state[0] is State.AWAKE:
            box.swap(1, (Victim(0, Level.HOST, 6.0),))
        elif not box.waiting[1] and box.state[1] is State.AWAKE and not box.in_flight(1):
            box.swap(0, (Victim(1),))

    one = box(machine(spec("a"), spec("b")), [(0, 0, 5), (1, 1, 1), (2, 0, 1)], Scripted(drain), awake=[0])
    one.run()
    assert ended(one)[0] == 5  # it ended within the drain
    assert begun(one)[1] == 5 + 1 + 2
    assert begun(one)[2] > ended(one)[1]  # it came while the engine drained
    assert one.counts.freezes == 0


def test_work_that_outlasts_the_drain_freezes_at_its_bound():
    def drain(box: Box) -> None:
        if box.waiting[1] and box.state[0] is State.AWAKE:
            box.swap(1, (Victim(0, Level.HOST, 3.0),))

    one = box(machine(spec("a"), spec("b")), [(0, 0, 50), (1, 1, 1)], Scripted(drain), awake=[0])
    one.run()
    assert begun(one)[1] == 1 + 3 + 1 + 2
    assert one.counts.freezes == 1
    assert one.unserved() == 1  # nobody wakes it again


def test_an_engine_whose_stream_may_not_freeze_again_keeps_its_turn():
    def push(box: Box) -> None:
        if box.waiting[1] and box.state[0] is State.AWAKE and box.yields_after[0] <= box.now:
            box.swap(1, (Victim(0, Level.HOST, 1.0),))

    one = box(machine(spec("a", freezes_max=0), spec("b")), [(0, 0, 20), (1, 1, 1)], Scripted(push), awake=[0])
    one.run()
    assert ended(one)[0] == 20
    assert one.counts.freezes == 0
    assert one.counts.kept_turn == 2  # asked at 1, at 12 and then, when it was idle, for good
    assert begun(one)[1] == pytest.approx(26, abs=0.01)


def test_a_waiter_gives_up_at_its_deadline():
    one = box(machine(spec("a", wait_deadline_s=30)), [(0, 0, 5)], Scripted())
    one.run()
    assert (one.counts.expired, one.unserved(), one.now) == (1, 1, 30)


def test_a_full_queue_refuses():
    one = box(machine(spec("a", queue_max=1)), [(0, 0, 5), (0, 0, 5)], Scripted(on_demand))
    one.run()
    assert (one.counts.refused, one.unserved()) == (1, 1)


def test_a_swap_for_somebody_who_gave_up_ends_and_everyone_opens_again():
    def drain(box: Box) -> None:
        if box.waiting[1] and box.state[0] is State.AWAKE:
            box.swap(1, (Victim(0),))

    specs = (spec("a"), spec("b", wait_deadline_s=4))
    one = box(machine(*specs), [(0, 0, 50), (1, 1, 1), (10, 0, 1)], Scripted(drain), awake=[0])
    one.run()
    assert begun(one)[2] == 10
    assert one.counts.swaps == 0


def test_engines_on_other_gpus_swap_at_the_same_time():
    one = box(machine(spec("a", [0]), spec("b", [1])), [(0, 0, 1), (0.5, 1, 1)], Scripted(on_demand))
    one.run()
    assert begun(one) == [2, 2.5]


def test_an_engine_that_host_ram_does_not_hold_begins_stopped_and_starts_cold():
    def start(box: Box) -> None:
        if box.waiting[1] and box.state[1] is State.STOPPED:
            box.swap(1)

    one = box(machine(spec("a"), spec("b", [1]), host=60), [(0, 1, 1)], Scripted(start))
    assert one.state == [State.ASLEEP, State.STOPPED]
    one.run()
    assert begun(one) == [60]
    assert one.counts.starts == 1


def test_host_ram_is_held_by_those_who_sleep_at_level_one():
    one = box(machine(spec("a", [0]), spec("b", [1])), [], Scripted(), awake=[0, 1])
    one.swap(None, (Victim(0, Level.HOST),))
    one.swap(None, (Victim(1, Level.DISCARD),))
    one.run()
    assert one.depth == [Depth.HOST, Depth.DISCARDED]
    assert one.host_used == 50


def test_links_that_carry_four_gpus_are_slower_for_each():
    gib = 1 << 30
    heavy = Spec("h", (0, 1, 2, 3), (1,) * 4, (0,) * 4, 4 * 28 * gib, 8)
    light = Spec("l", (0,), (1,), (0,), 28 * gib, 8)
    made = Machine((100,) * 4, 1, (heavy, light))
    assert made.wake_s(light, 1) - made.costs.wake_s == pytest.approx(28 / 51)
    assert made.wake_s(heavy, 4) - made.costs.wake_s - 3 * made.costs.wake_rank_s == pytest.approx(28 / 41)
    assert made.sleep_s(heavy, 4) > made.sleep_s(heavy, 1)


def test_what_a_fork_goes_through_never_touches_the_original():
    one = box(machine(spec("a"), spec("b")), [(0, 0, 10), (4, 1, 3)], Scripted(in_turns), awake=[0])
    one.run(2.0)
    other = one.fork(Scripted(in_turns))
    other.run()
    assert other.now > one.now == 2.0
    assert ended(one) != ended(one)  # NaN: nothing has ended here
    one.run()
    assert one.unserved() == 0


def test_a_policy_that_asks_for_it_hears_of_every_request():
    policy = Scripted(notes_arrivals=True)
    one = box(machine(spec("a")), [(0, 0, 5)], policy, awake=[0])
    one.run()
    assert policy.heard == [("arrived", 0), ("ended", 0)]


def test_the_delay_of_a_fork_is_that_of_the_requests_in_it():
    one = box(machine(spec("a"), spec("b")), [(0, 0, 10), (4, 1, 3)], Scripted(in_turns), awake=[0])
    other = one.fork(Scripted(in_turns))
    one.run()
    other.run()
    stall = ended(one)[0] - begun(one)[0] - 10
    wait = begun(one)[1] - 4
    assert other.delay_s == pytest.approx(wait + stall)


def test_a_replay_without_requests_ends_at_once():
    one = box(machine(spec("a")), [], Scripted())
    one.run()
    assert (one.now, one.unserved()) == (0, 0)
