"""The data plane's state: gates, waiters, tickets, holds and cuts."""

import asyncio
from dataclasses import dataclass, field

import pytest

from rotator.service.traffic import Cut, EngineUnavailable, Limits, QueueFull, Ticket, Traffic, WaitExpired


@dataclass
class Watch:
    """What the data plane told the loop."""

    demands: list[str] = field(default_factory=list)
    ends: list[tuple[str, float, str]] = field(default_factory=list)
    eta_s: float | None = 7.0


def build(watch: Watch | None = None, *, total: int = 100, **engines: Limits) -> Traffic:
    watch = watch or Watch()
    traffic = Traffic(
        queue_total_max=total,
        on_demand=watch.demands.append,
        on_request_end=lambda model, waited, outcome: watch.ends.append((model, waited, outcome)),
        eta=lambda engine: watch.eta_s,
    )
    traffic.configure(engines or {"a": limits(), "b": limits()})
    return traffic


def limits(queue_max: int = 10, wait_deadline_s: float = 60.0, freezes_max: int = 3) -> Limits:
    return Limits(queue_max, wait_deadline_s, freezes_max)


async def wait_in_line(traffic: Traffic, engine: str = "a", model: str = "m", deadline_s: float | None = None):
    """Start a request and let it reach the queue."""
    before = traffic.waiting(engine)
    task = asyncio.create_task(traffic.enter(engine, model, deadline_s=deadline_s))
    await asyncio.sleep(0)
    assert task.done() or traffic.waiting(engine) == before + 1
    return task


async def test_an_open_gate_admits_without_waiting() -> None:
    traffic = build()
    traffic.open("a")
    ticket = traffic.try_enter("a", "m")
    assert ticket is not None
    assert (ticket.engine, ticket.model, ticket.waited_s, ticket.freezes) == ("a", "m", 0.0, 0)
    assert traffic.in_flight("a") == 1


async def test_a_closed_or_unknown_gate_admits_nobody_at_once() -> None:
    traffic = build()
    assert traffic.try_enter("a", "m") is None
    assert traffic.try_enter("nobody", "m") is None
    traffic.open("a")
    traffic.close("a")
    assert traffic.try_enter("a", "m") is None


async def test_enter_on_an_open_gate_returns_at_once() -> None:
    watch = Watch()
    traffic = build(watch)
    traffic.open("a")
    assert (await traffic.enter("a", "m", deadline_s=1)).waited_s == 0.0
    assert watch.demands == []


async def test_opening_releases_all_waiters_in_the_order_they_came() -> None:
    traffic = build()
    order: list[int] = []

    async def client(n: int) -> None:
        await traffic.enter("a", "m", deadline_s=None)
        order.append(n)

    tasks = [asyncio.create_task(client(n)) for n in range(5)]
    await asyncio.sleep(0)
    assert traffic.waiting("a") == 5
    traffic.open("a")
    assert (traffic.waiting("a"), traffic.in_flight("a")) == (0, 5)
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]


async def test_a_gate_closed_right_after_opening_drains_what_it_let_in() -> None:
    traffic = build()
    client = await wait_in_line(traffic)
    traffic.open("a")
    traffic.close("a")
    drained = asyncio.create_task(traffic.drained("a"))
    ticket = await client
    assert not drained.done()
    ticket.leave("ok")
    await asyncio.wait_for(drained, 1)


async def test_every_waiter_is_told_to_the_loop_as_demand() -> None:
    watch = Watch()
    traffic = build(watch)
    first, second = await wait_in_line(traffic), await wait_in_line(traffic)
    assert watch.demands == ["a", "a"]
    first.cancel()
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)


async def test_a_cancelled_waiter_is_forgotten_at_once_and_the_loop_hears_it() -> None:
    watch = Watch()
    traffic = build(watch)
    client = await wait_in_line(traffic)
    watch.demands.clear()
    client.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client
    assert traffic.waiting("a") == 0
    assert watch.demands == ["a"]
    assert [e[2] for e in watch.ends] == ["client_left"]


async def test_a_waiter_cancelled_in_the_turn_it_was_admitted_does_not_stay_in_flight() -> None:
    watch = Watch()
    traffic = build(watch)
    client = await wait_in_line(traffic)
    traffic.open("a")
    client.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client
    assert traffic.in_flight("a") == 0
    assert [e[2] for e in watch.ends] == ["client_left"]


async def test_opening_skips_a_waiter_that_was_cancelled_in_the_same_turn() -> None:
    traffic = build()
    client, other = await wait_in_line(traffic), await wait_in_line(traffic)
    client.cancel()
    traffic.open("a")
    await asyncio.gather(client, other, return_exceptions=True)
    assert traffic.in_flight("a") == 1
    assert traffic.waiting("a") == 0


async def test_a_wait_ends_at_the_requests_deadline_with_the_eta() -> None:
    watch = Watch(eta_s=4.5)
    traffic = build(watch)
    with pytest.raises(WaitExpired) as e:
        await traffic.enter("a", "m", deadline_s=0.001)
    assert e.value.eta_s == 4.5
    assert traffic.waiting("a") == 0
    assert watch.demands == ["a", "a"]
    assert [end[2] for end in watch.ends] == ["expired"]


async def test_a_client_cannot_wait_longer_than_the_engines_bound() -> None:
    traffic = build(a=limits(wait_deadline_s=0.001))
    with pytest.raises(WaitExpired):
        await asyncio.wait_for(traffic.enter("a", "m", deadline_s=1000), 5)


async def test_a_full_queue_refuses_with_the_eta_as_retry_after() -> None:
    watch = Watch(eta_s=12.0)
    traffic = build(watch, a=limits(queue_max=2))
    clients = [await wait_in_line(traffic) for _ in range(2)]
    with pytest.raises(QueueFull) as e:
        await traffic.enter("a", "m", deadline_s=None)
    assert e.value.retry_after_s == 12.0
    assert [end[2] for end in watch.ends] == ["refused"]
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


async def test_a_full_queue_names_some_time_even_when_nobody_knows_the_eta() -> None:
    traffic = build(Watch(eta_s=None), a=limits(queue_max=1))
    client = await wait_in_line(traffic)
    with pytest.raises(QueueFull) as e:
        await traffic.enter("a", "m", deadline_s=None)
    assert e.value.retry_after_s > 0
    client.cancel()


async def test_the_bound_over_all_queues_holds() -> None:
    traffic = build(total=2)
    clients = [await wait_in_line(traffic, "a"), await wait_in_line(traffic, "b")]
    with pytest.raises(QueueFull, match="in all"):
        await traffic.enter("a", "m", deadline_s=None)
    clients[0].cancel()
    await asyncio.gather(clients[0], return_exceptions=True)
    clients.append(await wait_in_line(traffic, "a"))
    assert traffic.waiting("a") == 1
    for client in clients:
        client.cancel()


async def test_a_failing_engine_refuses_waiters_and_comers_with_its_reason() -> None:
    traffic = build()
    client = await wait_in_line(traffic)
    traffic.fail("a", "its wake failed: rank 2", 30.0)
    with pytest.raises(EngineUnavailable) as e:
        await client
    assert (e.value.reason, e.value.retry_after_s) == ("its wake failed: rank 2", 30.0)
    with pytest.raises(EngineUnavailable):
        await traffic.enter("a", "m", deadline_s=None)


@pytest.mark.parametrize("cure", ["open", "clear_failure"])
async def test_a_failure_is_over_once_the_gate_opens_or_the_loop_says_so(cure: str) -> None:
    traffic = build()
    traffic.fail("a", "down")
    getattr(traffic, cure)("a")
    client = asyncio.create_task(traffic.enter("a", "m", deadline_s=None))
    await asyncio.sleep(0)
    traffic.open("a")
    assert (await client).engine == "a"


async def test_failing_closes_the_gate() -> None:
    traffic = build()
    traffic.open("a")
    traffic.fail("a", "died")
    assert traffic.try_enter("a", "m") is None


async def test_leaving_twice_counts_once() -> None:
    watch = Watch()
    traffic = build(watch)
    traffic.open("a")
    ticket = enter(traffic)
    ticket.leave("ok")
    ticket.leave("failed")
    assert watch.ends == [("m", 0.0, "ok")]
    assert traffic.in_flight("a") == 0


async def test_drained_waits_for_the_last_one_and_can_be_cancelled() -> None:
    traffic = build()
    traffic.open("a")
    first, second = enter(traffic), enter(traffic)
    drained = asyncio.create_task(traffic.drained("a"))
    given_up = asyncio.create_task(traffic.drained("a"))
    first.leave("ok")
    await asyncio.sleep(0)
    assert not drained.done()
    given_up.cancel()
    second.leave("ok")
    await asyncio.wait_for(drained, 1)
    await asyncio.gather(given_up, return_exceptions=True)
    assert given_up.cancelled()


async def test_drained_returns_at_once_when_nothing_is_in_flight() -> None:
    traffic = build()
    await asyncio.wait_for(traffic.drained("a"), 1)
    await asyncio.wait_for(traffic.drained("unknown"), 1)
    assert traffic.in_flight("a") == 0


async def test_a_hold_stops_the_flow_until_released_and_counts_one_freeze() -> None:
    traffic = build()
    traffic.open("a")
    ticket = enter(traffic)
    assert ticket.flowing
    traffic.close("a")
    traffic.hold("a")
    traffic.hold("a")
    assert (ticket.flowing, ticket.freezes, traffic.frozen("a")) == (False, 1, 1)
    flow = asyncio.create_task(ticket.wait_flow())
    await asyncio.sleep(0)
    assert not flow.done()
    traffic.release_hold("a")
    await asyncio.wait_for(flow, 1)
    assert ticket.flowing
    assert traffic.frozen("a") == 0


async def test_a_request_admitted_after_a_freeze_has_none_counted() -> None:
    traffic = build()
    traffic.open("a")
    old = enter(traffic)
    traffic.hold("a")
    traffic.release_hold("a")
    new = enter(traffic)
    traffic.hold("a")
    assert (old.freezes, new.freezes) == (2, 1)


async def test_freezes_left_is_that_of_the_most_frozen_request() -> None:
    traffic = build(a=limits(freezes_max=3))
    assert traffic.max_freezes_left("a") == 3
    traffic.open("a")
    ticket = enter(traffic)
    for _ in range(2):
        traffic.hold("a")
        traffic.release_hold("a")
    enter(traffic)
    assert traffic.max_freezes_left("a") == 1
    ticket.leave("ok")
    assert traffic.max_freezes_left("a") == 3


async def test_a_frozen_request_that_leaves_changes_demand() -> None:
    watch = Watch()
    traffic = build(watch)
    traffic.open("a")
    ticket = enter(traffic)
    traffic.hold("a")
    ticket.leave("client_left")
    assert watch.demands == ["a"]


async def test_abort_cuts_every_request_in_flight_with_the_reason() -> None:
    traffic = build()
    traffic.open("a")
    heard: list[str] = []
    first, second = enter(traffic), enter(traffic)
    first.on_cut(heard.append)
    traffic.abort("a", "forced by an operator")
    assert first.cut == second.cut == "forced by an operator"
    assert heard == ["forced by an operator"]
    second.on_cut(heard.append)
    assert len(heard) == 2


async def test_a_frozen_request_that_is_cut_stops_waiting_for_flow() -> None:
    traffic = build()
    traffic.open("a")
    ticket = enter(traffic)
    traffic.hold("a")
    flow = asyncio.create_task(ticket.wait_flow())
    await asyncio.sleep(0)
    traffic.abort("a", "died")
    with pytest.raises(Cut, match="died"):
        await asyncio.wait_for(flow, 1)


async def test_a_request_that_has_left_is_not_cut() -> None:
    traffic = build()
    traffic.open("a")
    heard: list[str] = []
    ticket = enter(traffic)
    ticket.on_cut(heard.append)
    ticket.leave("ok")
    traffic.abort("a", "forced")
    assert heard == []
    assert ticket.cut is None


async def test_shut_refuses_waiters_and_comers_while_work_in_flight_goes_on() -> None:
    traffic = build()
    traffic.open("a")
    ticket = enter(traffic)
    client = await wait_in_line(traffic, "b")
    traffic.shut()
    with pytest.raises(EngineUnavailable, match="shutting down"):
        await client
    assert traffic.try_enter("a", "m") is None
    with pytest.raises(EngineUnavailable, match="shutting down"):
        await traffic.enter("a", "m", deadline_s=None)
    assert ticket.cut is None
    assert traffic.in_flight("a") == 1


async def test_reconfiguring_keeps_the_waiters_of_kept_engines_and_refuses_those_of_removed_ones() -> None:
    traffic = build()
    kept, removed = await wait_in_line(traffic, "a"), await wait_in_line(traffic, "b")
    traffic.configure({"a": limits(queue_max=1)})
    with pytest.raises(EngineUnavailable, match="removed"):
        await removed
    with pytest.raises(QueueFull):
        await traffic.enter("a", "m", deadline_s=None)
    with pytest.raises(EngineUnavailable, match="not configured"):
        await traffic.enter("b", "m", deadline_s=None)
    traffic.open("a")
    assert (await kept).engine == "a"


async def test_an_engine_that_is_being_taken_out_lets_nobody_in_and_can_be_kept_after_all() -> None:
    traffic = build()
    traffic.open("b")
    enter(traffic, "b").leave("ok")  # the last one leaves while it is taken out
    ticket = enter(traffic, "b")
    traffic.retire(["b"])
    ticket.leave("ok")
    traffic.open("b")  # its stop was given up: it goes on for now
    assert traffic.try_enter("b", "m") is None
    with pytest.raises(EngineUnavailable, match="removed"):
        await traffic.enter("b", "m", deadline_s=None)
    traffic.configure({"a": limits(), "b": limits()})
    traffic.open("b")
    assert enter(traffic, "b").engine == "b"


async def test_a_removed_engines_work_in_flight_can_still_be_drained() -> None:
    traffic = build()
    traffic.open("b")
    ticket = enter(traffic, "b")
    traffic.configure({"a": limits()})
    assert traffic.in_flight("b") == 1
    assert traffic.try_enter("b", "m") is None
    drained = asyncio.create_task(traffic.drained("b"))
    await asyncio.sleep(0)
    assert not drained.done()
    ticket.leave("ok")
    await asyncio.wait_for(drained, 1)
    assert traffic.in_flight("b") == 0


async def test_the_queue_lists_waiters_in_order_of_arrival_with_their_deadlines() -> None:
    traffic = build(Watch(eta_s=3.0))
    clients = [
        await wait_in_line(traffic, "b", "model-b", deadline_s=20),
        await wait_in_line(traffic, "a", "model-a"),
    ]
    rows = traffic.entries()
    assert [(r.engine, r.model, r.eta_s) for r in rows] == [("b", "model-b", 3.0), ("a", "model-a", 3.0)]
    assert 19 < rows[0].deadline_in_s <= 20
    assert 0 <= rows[0].waited_s < 1
    assert traffic.oldest_wait_s("b") >= traffic.oldest_wait_s("a") >= 0
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    assert traffic.entries() == ()


async def test_requests_teach_and_looks_do_not() -> None:
    """What asks an engine for what it kept (``visit``) is no use of it: only requests that a client sends are."""
    traffic = build()
    traffic.open("a")
    used_s = traffic.last_used_s("a")
    traffic.visit("a").leave("ok")
    assert traffic.last_used_s("a") == used_s
    assert traffic.history("a").last_s is None
    enter(traffic).leave("ok")
    assert traffic.history("a").last_s is not None
    assert traffic.last_used_s("a") > used_s


async def test_request_ids_are_unique() -> None:
    traffic = build()
    traffic.open("a")
    assert len({enter(traffic).id for _ in range(50)} | {traffic.new_id()}) == 51


def enter(traffic: Traffic, engine: str = "a") -> Ticket:
    ticket = traffic.try_enter(engine, "m")
    assert ticket is not None
    return ticket
