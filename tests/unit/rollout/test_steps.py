"""What a rollout does next: any step may fail, any instant may be the last, and the fleet is never worse for it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rotator.rollout.ports import Away
from rotator.rollout.run import drive, note_wish
from rotator.rollout.steps import End, Move, Part, Result, Step, Verdict, Way, facts_of, forward, next_move, switched
from tests.unit.rollout.world import NEW, OLD, Died, Fleet, again, rollout_of

NAMES = ("a", "b", "c")
_FORWARD = st.tuples(st.sampled_from(NAMES), st.just(Way.FORWARD), st.sampled_from(list(Step)))
_BACK = st.tuples(st.sampled_from(NAMES), st.just(Way.BACK), st.sampled_from(list(Step)))
_PLACES = st.tuples(*[st.booleans()] * 3).map(lambda p: tuple(Part(n, i) for n, i in zip(NAMES, p, strict=True)))


def quiet(*_: object) -> None:
    pass


def to_the_end(world: Fleet, parts: tuple[Part, ...], abort_at: int | None = None) -> tuple[End, int]:
    """Commands one after another, until one of them gets to the end. The second value is how many were killed."""
    deaths = 0
    world.kept = rollout_of(parts)
    while True:
        mine = again(world.kept)
        if abort_at is not None and deaths == abort_at and not isinstance(mine.next, End):
            if mine.next.way is Way.FORWARD:
                note_wish(mine, Result.ABORT, world, "enough")
            abort_at = None
        try:
            return drive(mine, world, world, world, quiet), deaths
        except Died:
            deaths += 1


@settings(max_examples=150, deadline=None)
@given(
    parts=_PLACES,
    fails=st.sets(_FORWARD, max_size=2),
    back=st.one_of(st.just(set()), st.sets(_BACK, max_size=1)),
    dies=st.sets(st.integers(1, 160), max_size=5),
    away=st.sets(st.integers(1, 60), max_size=5),
    abort_at=st.one_of(st.none(), st.integers(0, 3)),
)
def test_whatever_fails_or_dies_each_engine_is_wholly_new_or_old_and_the_end_says_which(
    parts: tuple[Part, ...],
    fails: set[tuple[str, Way, Step]],
    back: set[tuple[str, Way, Step]],
    dies: set[int],
    away: set[int],
    abort_at: int | None,
) -> None:
    world = Fleet(NAMES, frozenset(fails | back), frozenset(away), frozenset(dies))
    end, _ = to_the_end(world, parts, abort_at)
    for name in NAMES:
        if end.verdict is Verdict.STUCK and name == end.engine:
            continue
        wanted = NEW if name in end.new else OLD
        in_place = next(p.in_place for p in parts if p.engine == name)
        assert (world.runs[name], world.file[name]) == (wanted, wanted)
        assert world.files[name] == (wanted if in_place else OLD)
    if end.verdict is Verdict.DONE:
        assert end.new == NAMES
    else:
        assert end.engine == NAMES[len(end.new)], "it stops at the first that fails"
        assert end.aborted or end.words
    if not back:
        assert end.verdict is not Verdict.STUCK


@settings(max_examples=60, deadline=None)
@given(parts=_PLACES, fails=st.sets(_FORWARD, max_size=1), at=st.integers(0, 80))
def test_any_prefix_of_a_log_leads_to_the_step_that_came_then(
    parts: tuple[Part, ...], fails: set[tuple[str, Way, Step]], at: int
) -> None:
    world = Fleet(NAMES, frozenset(fails))
    to_the_end(world, parts)
    assert world.kept is not None
    log = world.kept.log
    prefix = log[: min(at, len(log) - 1)]
    then = log[len(prefix)]
    assert next_move(parts, prefix) == Move(then.engine, then.way, then.step)


def test_a_step_that_was_begun_and_has_no_end_is_begun_again() -> None:
    world = Fleet(("a",), dies=frozenset({10}))
    end, deaths = to_the_end(world, (Part("a"),))
    assert (end.verdict, deaths) == (Verdict.DONE, 1)
    assert [m.step for m in world.steps] == [Step.BASELINE, Step.SWITCH, *forward(Part("a"))[1:]]


def test_an_engine_that_would_not_stop_is_not_stopped_on_its_way_back() -> None:
    world = Fleet(("a", "b"), frozenset({("a", Way.FORWARD, Step.STOP)}))
    end, _ = to_the_end(world, (Part("a"), Part("b")))
    assert (end.verdict, end.words, end.left) == (Verdict.REVERTED, "stop of a failed", ("a", "b"))
    assert [m.step for m in world.steps if m.way is Way.BACK] == [Step.SWITCH, Step.START, Step.CANARY]


def test_a_way_back_that_failed_is_told_and_tried_again_when_somebody_says_so() -> None:
    world = Fleet(("a",), frozenset({("a", Way.FORWARD, Step.SOAK), ("a", Way.BACK, Step.START)}))
    end, _ = to_the_end(world, (Part("a"),))
    assert (end.verdict, end.step) == (Verdict.STUCK, Step.SOAK)
    assert end.back_failed == "start: start of a failed"
    assert world.kept is not None
    note_wish(world.kept, Result.AGAIN, world, "")
    world.fails = frozenset()
    mended = drive(world.kept, world, world, world, quiet)
    assert (mended.verdict, world.runs) == (Verdict.REVERTED, {"a": OLD})


def test_who_stays_away_too_long_leaves_the_rollout_where_it_is() -> None:
    world = Fleet(("a",), away=frozenset(range(3, 10_000)))
    rollout = rollout_of((Part("a"),))
    try:
        drive(rollout, world, world, world, quiet)
    except Away:
        assert world.kept is not None
        assert world.kept.waiting == "Nomad cannot be reached"
        assert next_move(rollout.parts, rollout.log) == next_move(rollout.parts, world.kept.log)
        assert world.steps[-1].step is Step.SWITCH
    else:
        raise AssertionError("it went on")


def test_the_file_is_new_for_those_whose_switch_was_begun_and_not_taken_back() -> None:
    world = Fleet(("a", "b"), frozenset({("b", Way.FORWARD, Step.RECALL)}))
    to_the_end(world, (Part("a"), Part("b")))
    assert world.kept is not None
    assert switched(world.kept.parts, world.kept.log) == {"a"}
    assert facts_of(world.kept.log, "b", Step.SPEED) == {}
