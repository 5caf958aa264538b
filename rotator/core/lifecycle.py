"""The engine's life as one table: (state, event) -> state. What is not in the table cannot happen.

Rules the table states:
  * An engine leaves AWAKE only through DRAINING (or because it died, lied or is being killed): admission closes first.
  * A sleep or wake that failed on any rank leads to STOPPING, never back: its state is unknown, so it is killed.
  * STOPPING lasts until its processes are gone and its bytes are back; where it leads was decided when it was entered
    (STOPPED by wish, FAILED by fault, QUARANTINED when its word and its bytes differed).
  * FAILED starts again by itself after its backoff; QUARANTINED only when an operator releases it. An engine that
    failed too often of late goes there, too: the breaker.
"""

from enum import StrEnum

from rotator.core.values import State


class Event(StrEnum):
    LAUNCH = "launch"  # a start has begun
    STARTED = "started"  # it answers, its canary is recorded, its footprint measured
    ADOPTED_AWAKE = "adopted_awake"  # found running after a restart of the service, or attached
    ADOPTED_ASLEEP = "adopted_asleep"
    DRAIN = "drain"  # admission closed, in-flight work finishes
    DRAIN_ABANDONED = "drain_abandoned"  # it keeps its turn: nobody waits any more, or it cannot freeze
    SLEEP = "sleep"  # the sleep call is about to be made
    SLEPT = "slept"  # the bytes are back on every GPU
    SANK = "sank"  # asleep, it went a rung deeper: more bytes are back, or its masters left host RAM
    WAKE = "wake"  # the wake call is about to be made
    WOKE = "woke"  # the canary passed
    STOP = "stop"  # an operator or a plan stops it
    FAULT = "fault"  # it failed an operation, or died
    LIED = "lied"  # its word and its bytes (or its answers) differ
    GONE = "gone"  # stopped by wish: processes gone, bytes back
    GONE_FAULTY = "gone_faulty"  # killed after a fault: processes gone, bytes back
    GONE_LIAR = "gone_liar"  # killed for lying, or for one fault too many: processes gone, bytes back
    RELEASE = "release"  # an operator lets a quarantined engine try again


class LifecycleError(Exception):
    """An event that the table does not allow in the engine's state: a bug, or a stale report."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"{event.value} cannot happen to an engine that is {state.value}")
        self.state = state
        self.event = event


_RUNNING = (
    State.STARTING,
    State.AWAKE,
    State.DRAINING,
    State.FALLING_ASLEEP,
    State.ASLEEP,
    State.WAKING,
)

TABLE: dict[tuple[State, Event], State] = {
    (State.STOPPED, Event.LAUNCH): State.STARTING,
    (State.FAILED, Event.LAUNCH): State.STARTING,
    (State.STOPPED, Event.ADOPTED_AWAKE): State.AWAKE,
    (State.STOPPED, Event.ADOPTED_ASLEEP): State.ASLEEP,
    (State.FAILED, Event.ADOPTED_AWAKE): State.AWAKE,
    (State.FAILED, Event.ADOPTED_ASLEEP): State.ASLEEP,
    (State.STARTING, Event.STARTED): State.AWAKE,
    (State.AWAKE, Event.DRAIN): State.DRAINING,
    (State.DRAINING, Event.DRAIN_ABANDONED): State.AWAKE,
    (State.DRAINING, Event.SLEEP): State.FALLING_ASLEEP,
    (State.FALLING_ASLEEP, Event.SLEPT): State.ASLEEP,
    (State.ASLEEP, Event.SANK): State.ASLEEP,
    (State.ASLEEP, Event.WAKE): State.WAKING,
    (State.WAKING, Event.WOKE): State.AWAKE,
    **{(state, Event.STOP): State.STOPPING for state in _RUNNING},
    **{(state, Event.FAULT): State.STOPPING for state in _RUNNING},
    **{(state, Event.LIED): State.STOPPING for state in _RUNNING},
    (State.FAILED, Event.STOP): State.STOPPING,
    (State.QUARANTINED, Event.STOP): State.STOPPING,
    (State.STOPPING, Event.STOP): State.STOPPING,
    (State.STOPPING, Event.GONE): State.STOPPED,
    (State.STOPPING, Event.GONE_FAULTY): State.FAILED,
    (State.STOPPING, Event.GONE_LIAR): State.QUARANTINED,
    (State.QUARANTINED, Event.RELEASE): State.STOPPED,
    (State.FAILED, Event.RELEASE): State.STOPPED,
}


def next_state(state: State, event: Event) -> State:
    """Return the state that ``event`` leads to. Raises LifecycleError where the table has no row."""
    try:
        return TABLE[state, event]
    except KeyError:
        raise LifecycleError(state, event) from None


def admits(state: State) -> bool:
    """Whether client requests may go to the engine now."""
    return state is State.AWAKE


def is_live(state: State) -> bool:
    """Whether the engine has processes that hold bytes."""
    return state in _RUNNING or state is State.STOPPING


def is_moving(state: State) -> bool:
    """Whether a transition is under way, so that nothing else may begin on its GPUs."""
    return state in (State.STARTING, State.DRAINING, State.FALLING_ASLEEP, State.WAKING, State.STOPPING)
