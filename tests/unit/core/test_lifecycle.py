"""The lifecycle as stories, one for every row of the table, and that nothing else can happen."""

import itertools

import pytest

from rotator.core.lifecycle import Event, LifecycleError, admits, is_live, is_moving, next_state
from rotator.core.values import State

RUNNING = (State.STARTING, State.AWAKE, State.DRAINING, State.FALLING_ASLEEP, State.ASLEEP, State.WAKING)

STORIES: dict[str, tuple[State, tuple[tuple[Event, State], ...]]] = {
    "an engine starts, sleeps, wakes and is stopped": (
        State.STOPPED,
        (
            (Event.LAUNCH, State.STARTING),
            (Event.STARTED, State.AWAKE),
            (Event.DRAIN, State.DRAINING),
            (Event.SLEEP, State.FALLING_ASLEEP),
            (Event.SLEPT, State.ASLEEP),
            (Event.SANK, State.ASLEEP),
            (Event.WAKE, State.WAKING),
            (Event.WOKE, State.AWAKE),
            (Event.STOP, State.STOPPING),
            (Event.GONE, State.STOPPED),
        ),
    ),
    "a drained engine that need not yield after all serves on": (
        State.AWAKE,
        ((Event.DRAIN, State.DRAINING), (Event.DRAIN_ABANDONED, State.AWAKE)),
    ),
    "an engine that failed is started again": (
        State.AWAKE,
        (
            (Event.FAULT, State.STOPPING),
            (Event.GONE_FAULTY, State.FAILED),
            (Event.LAUNCH, State.STARTING),
        ),
    ),
    "a liar is kept away until an operator releases it": (
        State.FALLING_ASLEEP,
        (
            (Event.LIED, State.STOPPING),
            (Event.GONE_LIAR, State.QUARANTINED),
            (Event.RELEASE, State.STOPPED),
        ),
    ),
    "a failed engine is released from its backoff": (State.FAILED, ((Event.RELEASE, State.STOPPED),)),
    "a failed engine's leftovers are cleared away": (
        State.FAILED,
        ((Event.STOP, State.STOPPING), (Event.GONE, State.STOPPED)),
    ),
    "a quarantined engine's leftovers are cleared away": (
        State.QUARANTINED,
        ((Event.STOP, State.STOPPING), (Event.GONE, State.STOPPED)),
    ),
    "a stop that is asked for twice is one stop": (State.STOPPING, ((Event.STOP, State.STOPPING),)),
    "an engine found awake after a restart of the service is adopted": (
        State.STOPPED,
        ((Event.ADOPTED_AWAKE, State.AWAKE),),
    ),
    "an engine found asleep after a restart of the service is adopted": (
        State.STOPPED,
        ((Event.ADOPTED_ASLEEP, State.ASLEEP),),
    ),
    "an engine that was given up and turns out to run awake is adopted": (
        State.FAILED,
        ((Event.ADOPTED_AWAKE, State.AWAKE),),
    ),
    "an engine that was given up and turns out to run asleep is adopted": (
        State.FAILED,
        ((Event.ADOPTED_ASLEEP, State.ASLEEP),),
    ),
    **{
        f"an engine that is {state.value} is on its way out after a {event.value}": (state, ((event, State.STOPPING),))
        for state in RUNNING
        for event in (Event.STOP, Event.FAULT, Event.LIED)
    },
}


def told() -> dict[tuple[State, Event], State]:
    """Every row that the stories tell."""
    rows: dict[tuple[State, Event], State] = {}
    for state, chapters in STORIES.values():
        for event, after in chapters:
            rows[state, event] = after
            state = after
    return rows


@pytest.mark.parametrize("story", STORIES)
def test_the_story_goes(story: str) -> None:
    state, chapters = STORIES[story]
    for event, after in chapters:
        assert next_state(state, event) is after
        state = after


@pytest.mark.parametrize(
    ("state", "event"),
    [pair for pair in itertools.product(State, Event) if pair not in told()],
    ids=lambda value: value.value,
)
def test_what_no_story_tells_cannot_happen(state: State, event: Event) -> None:
    with pytest.raises(LifecycleError) as refused:
        next_state(state, event)
    assert (refused.value.state, refused.value.event) == (state, event)
    assert str(refused.value) == f"{event.value} cannot happen to an engine that is {state.value}"


def test_only_draining_and_death_lead_out_of_awake() -> None:
    assert {after for (state, _), after in told().items() if state is State.AWAKE} == {State.DRAINING, State.STOPPING}


def test_a_failed_sleep_or_wake_never_leads_back() -> None:
    for state in (State.FALLING_ASLEEP, State.WAKING):
        for event in (Event.FAULT, Event.LIED):
            assert next_state(state, event) is State.STOPPING


def test_every_state_can_be_reached_and_left() -> None:
    rows = told()
    assert set(rows.values()) == set(State) == {state for state, _ in rows}


def test_every_event_happens_somewhere() -> None:
    assert {event for _, event in told()} == set(Event)


def test_from_every_state_an_engine_can_get_awake_again() -> None:
    rows = told()
    reach = {State.AWAKE}
    while more := {state for (state, _), after in rows.items() if after in reach} - reach:
        reach |= more
    assert reach == set(State)


@pytest.mark.parametrize("state", State)
def test_only_an_awake_engine_takes_requests(state: State) -> None:
    assert admits(state) is (state is State.AWAKE)


@pytest.mark.parametrize("state", State)
def test_an_engine_is_live_while_it_has_processes(state: State) -> None:
    assert is_live(state) is (state not in (State.STOPPED, State.FAILED, State.QUARANTINED))


@pytest.mark.parametrize("state", State)
def test_an_engine_moves_unless_it_rests_awake_asleep_or_without_processes(state: State) -> None:
    resting = (State.AWAKE, State.ASLEEP, State.STOPPED, State.FAILED, State.QUARANTINED)
    assert is_moving(state) is (state not in resting)
