"""What operators can do, on running engines."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.system.service.rig import Rig, engine, rig_up

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    engines = [engine("a", aliases=["first"]), engine("b", sleep_levels=[1, 2])]
    async with rig_up(tmp_path_factory.mktemp("operators"), engines) as rig:
        await rig.say("b")
        yield rig


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared: Rig) -> AsyncIterator[Rig]:
    """``a`` is awake and ``b`` asleep."""
    for name in ("b", "a"):
        await shared.say(name)
    yield shared
    await shared.check()


async def test_wake_waits_until_it_is_done_and_says_how_long_each_phase_took(rig: Rig) -> None:
    answer = await rig.post("/wake", model="b")
    assert answer["done"] is True
    assert await rig.state("b") == "awake"
    assert await rig.state("a") == "asleep"
    (result,) = answer["results"]
    assert {"sleep", "wake", "canary"} <= set(result["phases_s"])


async def test_wake_without_waiting_answers_at_once_and_goes_on(rig: Rig) -> None:
    status, answer = await rig.call("POST", "/wake?model=b&wait=false")
    assert (status, answer["done"]) == (202, False)
    await rig.until_state("b", "awake")


async def test_a_dry_run_shows_the_plan_with_its_reasons_and_does_nothing(rig: Rig) -> None:
    mark = rig.events.now()
    answer = await rig.post("/wake", model="b", dry_run=True)
    (swap,) = answer["plan"]["swaps"]
    assert [(s["action"], s["engine"]) for s in swap["evict"]] == [("sleep", "a")]
    assert (swap["admit"]["action"], swap["admit"]["engine"]) == ("wake", "b")
    assert swap["reason"]
    assert await rig.state("a") == "awake"
    assert not rig.events.find("swap.begun", since=mark)


async def test_swap_sends_one_to_sleep_as_deep_as_asked_and_wakes_the_other(rig: Rig) -> None:
    await rig.post("/swap", wake="b", sleep=["first"])
    assert (await rig.state("a"), await rig.state("b")) == ("asleep", "awake")
    text = await rig.say("b", "hi")
    await rig.post("/sleep", model="b", level=2)
    assert (await rig.view("b"))["depth"] == "discarded"
    assert await rig.say("b", "hi") == text, "its weights are loaded again"


async def test_force_aborts_what_is_in_flight_and_says_whose_wish_it_was(rig: Rig) -> None:
    streams = [await rig.chat("a", "story", 3000).begun() for _ in range(2)]
    await rig.post("/sleep", model="a", force=True)
    for chat in streams:
        answer = await chat.end()
        assert not answer.claims_to_be_complete
        assert "operator" in str(answer.error)
    assert (await rig.stub_state("a"))["running"] == 0
    assert await rig.say("a")


async def test_sleep_without_force_freezes_what_is_in_flight(rig: Rig) -> None:
    undisturbed = await rig.say("a", "story", 300)
    stream = await rig.chat("a", "story", 300).begun()
    await rig.post("/sleep", model="a")
    assert (await stream.end()).text == undisturbed


async def test_stop_start_and_restart_end_and_make_processes(rig: Rig) -> None:
    old = rig.engine_processes("b")
    await rig.post("/engines/b/stop")
    assert not rig.engine_processes("b")
    await rig.post("/engines/b/start")
    new = rig.engine_processes("b")
    assert new
    assert not new & old
    await rig.post("/engines/b/restart")
    assert rig.engine_processes("b")
    assert not rig.engine_processes("b") & new
    assert await rig.say("b")


async def test_a_pinned_engine_is_not_evicted_and_whoever_wants_its_place_is_told(rig: Rig) -> None:
    await rig.post("/engines/a/pin")
    refused = await rig.chat("b").end()
    assert refused.status == 503
    assert "pinned" in str(refused.error)
    problem = await rig.problem("POST", "/wake", model="b")
    assert (problem["status"], "pinned" in problem["detail"]) == (409, True)
    await rig.post("/engines/a/unpin")
    assert await rig.say("b")


async def test_a_cordoned_gpu_takes_no_new_work_over_a_restart_until_it_is_uncordoned(rig: Rig) -> None:
    await rig.post("/gpus/0/cordon", reason="fan")
    await rig.restart()
    problem = await rig.problem("POST", "/wake", model="b")
    assert problem["status"] == 409
    assert (await rig.chat("b").end()).status == 503
    assert await rig.say("a"), "what is awake there serves on"
    await rig.post("/gpus/0/uncordon")
    assert await rig.say("b")


async def test_what_makes_no_sense_is_refused_with_a_problem(rig: Rig) -> None:
    for method, path, body, status in (
        ("POST", "/wake", {"model": "nobody"}, 404),
        ("POST", "/wake", {}, 422),
        ("POST", "/sleep", {"model": "a", "level": 7}, 422),
        ("POST", "/swap", {"wake": "a", "sleep": ["first"]}, 422),
        ("POST", "/engines/nobody/stop", {}, 404),
        ("POST", "/engines/a/release", {}, 409),
        ("POST", "/gpus/9/cordon", {}, 404),
        ("GET", "/engines/nobody", {}, 404),
        ("GET", "/ledger?table=nothing", {}, 422),
    ):
        assert (await rig.problem(method, path, **body))["status"] == status, path


async def test_the_plan_for_a_model_tells_what_a_wake_would_do_now(rig: Rig) -> None:
    (swap,) = (await rig.get("/plan?model=b"))["swaps"]
    assert swap["admit"]["engine"] == "b"
    assert (await rig.get("/plan"))["swaps"] == []
