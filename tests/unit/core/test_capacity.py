"""What fits together, in bytes, checked against counting afresh."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from rotator.core.capacity import Never, capacity
from rotator.core.values import Engine, Gpu
from tests.unit.core.fleets import engine

GIB = 1 << 30
GPUS = {id: Gpu(id, 96 * GIB, reserve_bytes=GIB) for id in "01"}


def sized(name: str, gpus: str, awake: int, residue: int = 2, kv: int | None = None, **more: object) -> Engine:
    kv_bytes = () if kv is None else (kv * GIB,) * len(gpus)
    return engine(name, gpus, awake=awake * GIB, residue=residue * GIB, kv_bytes=kv_bytes, **more)


def test_engines_that_fit_together_are_one_set_and_the_others_never():
    found = capacity(GPUS, [sized("a", "0", 60), sized("b", "0", 30), sized("c", "0", 50)], 0)
    assert [t.engines for t in found.together] == [("a", "b"), ("b", "c")]
    assert found.never == (Never("a", "c", "0", 15 * GIB),)
    assert found.together[0].free_bytes == {"0": 3 * GIB}


def test_residues_that_do_not_fit_beside_them_are_shown_as_lacking():
    crowd = [sized("a", "0", 94), *(sized(f"s{n}", "0", 90, residue=2) for n in range(3))]
    found = capacity(GPUS, crowd, 0)
    assert {t.engines: t.free_bytes["0"] for t in found.together}[("a",)] == -5 * GIB


def test_what_an_attached_engine_keeps_asleep_counts_always():
    attached = sized("x", "0", 50, residue=40, can_stop=False)
    found = capacity(GPUS, [attached, sized("a", "0", 60)], 0)
    assert Never("a", None, "0", 5 * GIB) in found.never
    assert [t.engines for t in found.together] == [("x",)]


def test_what_an_attached_engine_keeps_asleep_is_in_the_way_of_sets_too():
    attached = sized("x", "0", 50, residue=30, can_stop=False)
    found = capacity(GPUS, [attached, sized("a", "0", 40), sized("b", "0", 40)], 0)
    assert [t.engines for t in found.together] == [("a", "x"), ("b", "x")]
    assert [(n.engine, n.other) for n in found.never] == [("a", "b")]


def test_gpus_that_nobody_shares_are_judged_apart():
    found = capacity(GPUS, [sized("a", "0", 60), sized("b", "1", 60)], 0)
    assert [t.engines for t in found.together] == [("a",), ("b",)]
    assert found.never == ()


def test_weights_that_fit_together_swap_with_one_kv_cache_at_a_time():
    pair = [sized("a", "01", 70, kv=40), sized("b", "01", 80, kv=45)]
    (found,) = capacity(GPUS, pair, 0).elastic
    assert found.engines == ("a", "b")
    assert found.kv_max_bytes == (95 - 30 - 35) * GIB
    assert found.kv_now_bytes == 45 * GIB
    assert not found.fits_now


def test_kv_caches_small_enough_are_said_to_fit_as_they_are():
    (found,) = capacity(GPUS, [sized("a", "0", 60, kv=30), sized("b", "0", 60, kv=30)], 0).elastic
    assert found.fits_now


def test_engines_whose_weights_do_not_fit_or_that_need_not_swap_are_not_elastic():
    assert capacity(GPUS, [sized("a", "0", 90, kv=30), sized("b", "0", 90, kv=30)], 0).elastic == ()
    assert capacity(GPUS, [sized("a", "0", 40, kv=30), sized("b", "0", 40, kv=30)], 0).elastic == ()


def test_weights_that_leave_less_than_a_gibibyte_for_a_kv_cache_are_not_elastic():
    pair = [sized("a", "0", 60, kv=12), sized("b", "0", 60, kv=13)]
    assert capacity(GPUS, pair, 0).elastic == ()


def test_a_kv_cache_that_is_not_known_is_estimated_from_residue_and_masters():
    (size,) = capacity(GPUS, [sized("a", "01", 80, host_bytes=100 * GIB)], 0).sizes
    assert (size.kv_bytes, size.weights_bytes, size.kv_known) == ((28 * GIB,) * 2, (52 * GIB,) * 2, False)


def test_masters_are_counted_against_the_budget():
    found = capacity(GPUS, [sized("a", "0", 60, host_bytes=50), sized("b", "1", 60, host_bytes=70)], 100)
    assert (found.masters_bytes, found.host_budget_bytes) == (120, 100)


def test_a_search_that_would_never_end_is_cut_and_says_so():
    crowd = [sized(f"e{n:02}", "0", 3 + n % 4) for n in range(40)]
    found = capacity(GPUS, crowd, 0)
    assert found.is_cut
    assert len(found.together) <= 100


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("0", "1", "01")), st.integers(5, 90)), min_size=1, max_size=6))
def test_sets_are_exactly_the_largest_that_fit(shapes: list[tuple[str, int]]):
    engines = [sized(f"e{n}", gpus, size, residue=0) for n, (gpus, size) in enumerate(shapes)]

    def fits(names: set[str]) -> bool:
        chosen = [e for e in engines if e.name in names]
        return all(sum(e.awake_bytes[0] for e in chosen if g in e.gpus) <= 95 * GIB for g in "01")

    names = [e.name for e in engines]
    able = [set(c) for size in range(1, len(names) + 1) for c in combinations(names, size) if fits(set(c))]
    largest = [made for made in able if not any(made < other for other in able)]
    found = [set(t.engines) for t in capacity(GPUS, engines, 0).together]
    joined = len({frozenset(e.gpus) for e in engines}) > 1 and all(e.gpus != ("0", "1") for e in engines)
    if joined:  # two GPUs that share nobody: each has its own sets
        largest = [{n for n in made if e_gpus(engines, n) == (g,)} for made in largest for g in "01"]
        largest = [made for made in largest if made]
    assert sorted(map(sorted, found)) == sorted(map(list, {tuple(sorted(made)) for made in largest}))


def e_gpus(engines: list[Engine], name: str) -> tuple[str, ...]:
    return next(e.gpus for e in engines if e.name == name)
