"""Questions to the ledger: filters, order, pages."""

import pytest

from rotator.adapters.ledger import SqlLedger
from rotator.adapters.ledger_query import SHELVES
from rotator.core.values import State
from rotator.ports import EngineRecord, GpuInfo, Incident, Lease, NodeRecord, Reservation, Residency
from tests.unit.ledger.values import Clock, intent, outcome


async def fill(ledger: SqlLedger, clock: Clock, count: int) -> None:
    """``count`` rows in every table, two at each second."""
    for i in range(count):
        clock.now_s += i % 2
        await ledger.put_gpus([GpuInfo(f"g{i}", i, "card", 1)])
        await ledger.put_node(NodeRecord(f"n{i}"))
        await ledger.put_engine(EngineRecord(f"e{i}", State.AWAKE))
        await ledger.put_residencies([Residency(f"e{i}", f"g{i}")])
        await ledger.put_lease(Lease(f"g{i}", "ops", i))
        await ledger.open_transition(intent(f"e{i}", f"s{i}", decision="packed"))
        await ledger.add_reservation(Reservation((f"e{i}",), clock.now_s, clock.now_s + 60))
        await ledger.put_incident(Incident(f"i{i}", clock.now_s, "wedged", "serious", "why"))
        ledger.sample_vram(clock.now_s, f"g{i}", i, {"glm": i})
        ledger.count_request(f"m{i}", waited_s=i, outcome="ok")
    await ledger.flush()


@pytest.mark.parametrize("table", sorted(set(SHELVES) - {"lives", "baselines"}))
async def test_pages_of_every_table_give_each_row_once_newest_first(
    ledger: SqlLedger, clock: Clock, table: str
) -> None:
    await fill(ledger, clock, 7)
    seen, cursor, pages = [], None, 0
    while True:
        page = await ledger.query(table, filters={}, limit=3, cursor=cursor)
        seen += page.rows
        pages += 1
        cursor = page.next_cursor
        if cursor is None:
            break
    assert (len(seen), pages) == (7, 3)
    shelf = SHELVES[table]
    keys = [tuple(row[name] for name in shelf.order) for row in seen]
    assert keys == sorted(set(keys), reverse=True)


async def test_a_last_page_that_is_full_has_no_cursor(ledger: SqlLedger, clock: Clock) -> None:
    await fill(ledger, clock, 4)
    page = await ledger.query("transitions", filters={}, limit=4)
    assert (len(page.rows), page.next_cursor) == (4, None)


async def test_rows_that_come_while_paging_shift_nothing(ledger: SqlLedger, clock: Clock) -> None:
    await fill(ledger, clock, 4)
    first = await ledger.query("transitions", filters={}, limit=2)
    await ledger.open_transition(intent("new"))
    second = await ledger.query("transitions", filters={}, limit=2, cursor=first.next_cursor)
    assert [r["engine"] for r in (*first.rows, *second.rows)] == ["e3", "e2", "e1", "e0"]


async def test_filters_are_equalities_that_all_hold(ledger: SqlLedger) -> None:
    done = await ledger.open_transition(intent("glm"))
    await ledger.close_transition(done, outcome())
    still = await ledger.open_transition(intent("glm"))
    await ledger.open_transition(intent("dsv4"))
    page = await ledger.query("transitions", filters={"engine": "glm", "result": "open"})
    assert [row["id"] for row in page.rows] == [still]
    assert (await ledger.query("transitions", filters={"id": str(done)})).rows[0]["result"] == "ok"


async def test_yes_and_no_are_filtered_by_word(ledger: SqlLedger) -> None:
    await ledger.put_cordon("g0", True, "hot")
    await ledger.put_cordon("g1", False, "")
    page = await ledger.query("gpus", filters={"cordoned": "true"})
    assert [row["id"] for row in page.rows] == ["g0"]


async def test_since_and_until_bound_the_tables_time(ledger: SqlLedger) -> None:
    for second in range(5):
        ledger.sample_vram(1_700_000_000.0 + second, "g0", second, {})
    await ledger.flush()
    for since, until in (("1700000001", "1700000003"), ("2023-11-14T22:13:21Z", "2023-11-14T22:13:23")):
        page = await ledger.query("vram_samples", filters={"since": since, "until": until})
        assert [row["used_bytes"] for row in page.rows] == [2, 1]


@pytest.mark.parametrize(("limit", "rows"), [(-5, 1), (0, 1), (2, 2), (100_000, 3)])
async def test_a_limit_is_kept_within_its_bounds(ledger: SqlLedger, clock: Clock, limit: int, rows: int) -> None:
    await fill(ledger, clock, 3)
    assert len((await ledger.query("engines", filters={}, limit=limit)).rows) == rows


async def test_no_page_is_larger_than_a_thousand_rows(ledger: SqlLedger) -> None:
    for i in range(1001):
        ledger.sample_vram(float(i), "g0", i, {})
    await ledger.flush()
    page = await ledger.query("vram_samples", filters={}, limit=5000)
    assert len(page.rows) == 1000
    rest = await ledger.query("vram_samples", filters={}, limit=5000, cursor=page.next_cursor)
    assert [row["used_bytes"] for row in rest.rows] == [0]


@pytest.mark.parametrize(
    ("table", "filters", "says"),
    [
        ("secrets", {}, "it has gpus, engines"),
        ("alembic_version", {}, "no table 'alembic_version'"),
        ("engines", {"nme": "x"}, "no filter 'nme' for engines: there are engine, state"),
        ("transitions", {"plan": "{}"}, "no filter 'plan'"),
        ("lives", {"ballast": "x"}, "no filter 'ballast'"),
        ("engines", {"failures": "many"}, "filter 'failures' takes a number"),
        ("engines", {"failures": str(1 << 70)}, "filter 'failures' takes a number"),
        ("gpus", {"cordoned": "perhaps"}, "takes true or false"),
        ("requests", {"since": "yesterday"}, "'since' takes Unix seconds or a time such as"),
    ],
)
async def test_a_wrong_question_is_answered_with_what_exists(
    ledger: SqlLedger, table: str, filters: dict[str, str], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        await ledger.query(table, filters=filters)


async def test_a_cursor_from_elsewhere_is_refused(ledger: SqlLedger, clock: Clock) -> None:
    await fill(ledger, clock, 3)
    foreign = (await ledger.query("engines", filters={}, limit=1)).next_cursor
    huge = "WyJ0cmFuc2l0aW9ucyIsIDFlMzAwXQ"  # ["transitions", 1e300]
    for cursor in (foreign, huge, "", "!!!", "bnVsbA", "é", "W10"):
        with pytest.raises(ValueError, match="'cursor' is none that a page of transitions gave"):
            await ledger.query("transitions", filters={}, cursor=cursor)


async def test_an_injection_is_only_a_value(ledger: SqlLedger) -> None:
    await ledger.put_engine(EngineRecord("glm", State.AWAKE))
    nothing = await ledger.query("engines", filters={"engine": "x' OR '1'='1"})
    assert nothing.rows == ()
    assert len((await ledger.query("engines", filters={})).rows) == 1
