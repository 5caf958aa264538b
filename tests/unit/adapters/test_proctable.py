import pytest

from rotator.adapters.proctable import Marks, Proc, Table, parse_marks, parse_stat

MINE = Marks("rotator", "dsv4-flash")


def proc(pid: int, ppid: int, *, session: int | None = None, pgrp: int | None = None, state: str = "S") -> Proc:
    return Proc(pid, "python", state, ppid, pgrp or session or pid, session or pid, 1, start_ticks=pid * 10)


def table(*procs: Proc, marked: tuple[int, ...] = ()) -> Table:
    return Table({p.pid: p for p in procs}, dict.fromkeys(marked, MINE))


def pids(found: tuple[Proc, ...]) -> list[int]:
    return [p.pid for p in found]


def test_a_name_with_blanks_and_brackets_does_not_shift_the_fields():
    rest = "S 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 3 0 987654 1000 10"
    found = parse_stat(f"42 (a) S 1 (b c)) {rest}")
    assert (found.pid, found.name, found.state, found.ppid) == (42, "a) S 1 (b c)", "S", 7)
    assert (found.pgrp, found.session, found.threads, found.start_ticks) == (42, 42, 3, 987654)


def test_a_damaged_line_is_refused():
    with pytest.raises(ValueError, match="not a line"):
        parse_stat("42 (a) S 1")


def test_a_zombie_is_gone_unless_its_other_threads_run_on():
    assert Proc(1, "x", "Z", 0, 1, 1, threads=1, start_ticks=0).is_gone
    assert not Proc(1, "x", "Z", 0, 1, 1, threads=4, start_ticks=0).is_gone
    assert not Proc(1, "x", "D", 0, 1, 1, threads=1, start_ticks=0).is_gone


def test_marks_are_read_from_an_environment():
    assert parse_marks(b"A=1\0ROTATOR_ENGINE=dsv4-flash\0ROTATOR_SERVICE=rotator\0") == MINE
    assert parse_marks(b"A=1\0") == Marks()


@pytest.mark.parametrize("overwritten", [b"", b"VLLM::EngineCore\0\0\0", b"\0\0\0\0"])
def test_an_environment_that_a_process_title_overwrote_tells_nothing(overwritten: bytes):
    assert parse_marks(overwritten) is None


def test_a_family_is_all_that_descends_from_a_root_and_nothing_beside_it():
    t = table(proc(1, 0), proc(10, 1), proc(11, 10), proc(12, 11), proc(20, 1), proc(21, 20))
    assert pids(t.family({(10, 100)}, None)) == [10, 11, 12]


def test_a_reused_pid_is_no_root():
    t = table(proc(1, 0), proc(10, 1), proc(11, 10))
    assert pids(t.family({(10, 99)}, None)) == []
    assert pids(t.family({(10, 100)}, None)) == [10, 11]


def test_a_family_holds_orphans_that_carry_the_mark_and_what_those_started():
    t = table(proc(1, 0), proc(30, 1), proc(31, 30), proc(40, 1), marked=(30,))
    assert pids(t.family(frozenset(), MINE)) == [30, 31]


def test_a_family_holds_orphans_in_a_session_or_group_that_a_member_leads():
    t = table(proc(1, 0), proc(10, 1), proc(11, 1, session=10), proc(12, 1, session=99, pgrp=10))
    assert pids(t.family({(10, 100)}, None)) == [10, 11, 12]


def test_another_engines_mark_is_not_ours():
    t = Table({30: proc(30, 1)}, {30: Marks("rotator", "glm-5.1")})
    assert t.family(frozenset(), MINE) == ()


def test_the_service_itself_is_never_in_a_family_even_if_it_carries_the_mark():
    t = table(proc(1, 0), proc(5, 1), proc(6, 5), proc(7, 6), marked=(5, 6, 7))
    assert pids(t.family(frozenset(), MINE, spare=t.ancestors(6))) == [7]


def test_zombies_are_not_counted():
    t = table(proc(1, 0), proc(10, 1, state="Z"), proc(11, 1, session=10))
    assert pids(t.family({(10, 100)}, None)) == [11]
