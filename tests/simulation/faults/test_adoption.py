"""A launcher that fails in the middle of an adoption."""

import asyncio

import pytest

from rotator.core.values import State
from rotator.ports import Handle, LaunchError
from rotator.sim.clock import run
from tests.fakes import FakeLedger, make_box, make_service


@pytest.mark.parametrize("question", ["pids", "is_alive"])
def test_an_adoption_that_the_launcher_breaks_off_ends_no_other_one_and_is_made_up_for(question: str) -> None:
    async def story() -> None:
        box, ledger = make_box(a=((0,), 50.0), b=((1,), 50.0)), FakeLedger()
        async with make_service(box, ledger=ledger) as first:
            await asyncio.gather(first.ask("a"), first.ask("b"))
        second = make_service(box, ledger=ledger)
        answers, failures = getattr(second.launcher, question), [1]

        async def fails_once(handle: Handle) -> object:
            if handle.engine == "a" and failures:
                failures.pop()
                raise LaunchError("the launcher cannot be reached")
            return await answers(handle)

        setattr(second.launcher, question, fails_once)
        if question == "is_alive":
            box.engines["a"].ready_at_s = asyncio.get_running_loop().time() + 2.0  # so that it is asked
        async with second as service:
            await service.until("b", State.AWAKE, within_s=3.0)
            await service.until("a", State.AWAKE, within_s=20.0)
            assert not failures
            assert [engine.launches for engine in box.engines.values()] == [1, 1]

    run(story())
