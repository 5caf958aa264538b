"""Notices: what must hold between being let in and being told so."""

import asyncio

import pytest

from rotator.config import OverridesConfig
from rotator.service.exchange import Exchange, Head
from rotator.service.notices import Notices
from rotator.service.routes import Dialect, Target
from rotator.service.traffic import Limits, Traffic

TARGET = Target("a", "http://x", "a", "a", OverridesConfig())


class Directory:
    def resolve(self, model: str) -> Target | None:
        return TARGET

    def targets(self) -> list[Target]:
        return [TARGET]

    def running(self) -> list[Target]:
        return [TARGET]

    def state(self, engine: str) -> str:
        return "waking"


@pytest.mark.parametrize("failure", [None, OSError("gone")])
async def test_a_request_that_ends_after_it_was_let_in_but_before_it_knew_does_not_stay_in_flight(
    failure: Exception | None,
) -> None:
    ends: list[str] = []
    traffic = Traffic(
        queue_total_max=9, on_demand=lambda _: None, on_request_end=lambda *e: ends.append(e[2]), eta=lambda _: None
    )
    traffic.configure({"a": Limits(9, 9, 9)})
    stuck = asyncio.get_running_loop().create_future()

    async def send(message: object) -> None:
        if isinstance(message, dict) and message["type"] == "http.response.body":
            await stuck  # a client that does not read its notices

    async def receive() -> dict[str, object]:
        return await asyncio.Event().wait()  # type: ignore[return-value] # never

    async def request() -> None:
        x = Exchange({"method": "POST"}, receive, send, Dialect.CHAT)
        x.head = Head([(b"x-rotator-notices", b"comments")], b"")
        await Notices(traffic, Directory()).enter(x, TARGET, "a", None)

    task = asyncio.create_task(request())
    while not traffic.waiting("a"):  # noqa: ASYNC110 # it needs a turn or two to get in line
        await asyncio.sleep(0)
    traffic.open("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if failure is None:
        task.cancel()
    else:
        stuck.set_exception(failure)
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled() or isinstance(task.exception(), OSError)
    assert traffic.in_flight("a") == 0
    assert ends == ["client_left"]
