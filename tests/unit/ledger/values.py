"""Values and a clock for the ledger's tests."""

import asyncio
from collections.abc import Callable
from typing import Any

from rotator.core.values import State
from rotator.ports import Intent, Outcome


class Clock:
    """Wall time that moves only when told."""

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def intent(engine: str = "glm", swap_id: str = "s1", **changes: Any) -> Intent:
    values: dict[str, Any] = {
        "action": "wake",
        "from_state": State.ASLEEP,
        "to_state": State.AWAKE,
        "reason": "a client asks for it",
    }
    return Intent(swap_id=swap_id, engine=engine, **{**values, **changes})


def outcome(result: str = "ok", **changes: Any) -> Outcome:
    return Outcome(result, changes.pop("state", State.AWAKE), **changes)


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Wait until ``condition`` holds. Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # what is waited for happens on threads and sets no event
            await asyncio.sleep(0.01)
