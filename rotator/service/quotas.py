"""What each key may have of the data plane: which models, how many requests at one time, how many a minute.

How many may wait is counted where the lines are (``traffic``). Names of clients are those of their keys; who has none
in the configuration is not bounded here.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rotator.config import KeyConfig
from rotator.service.responses import ApiError
from rotator.service.routes import Target

_MINUTE_S = 60.0
_SMOOTHING = 0.2  # of the newest request in what one takes on average
_UNKNOWN_S = 1.0  # when a place comes free, where none ever did


class Quotas:
    """For one event loop. Counts outlive ``configure``: a reload gives nobody a second helping."""

    def __init__(self, keys: Iterable[KeyConfig] = ()) -> None:
        self._accounts: dict[str, _Account] = {}
        self._models: dict[str, frozenset[str]] = {}
        self.configure(keys)

    def configure(self, keys: Iterable[KeyConfig]) -> None:
        """Take new bounds for requests to come."""
        keys = tuple(keys)
        self._models = {k.name: frozenset(k.models) for k in keys if k.models is not None}
        bounded = [k for k in keys if k.in_flight_max is not None or k.requests_per_minute is not None]
        accounts = {k.name: self._accounts.get(k.name) or _Account(k) for k in bounded}
        for key in bounded:
            accounts[key.name].change(key)
        self._accounts = accounts

    def allows(self, client: str, target: Target) -> bool:
        """Whether the model is one of this client's: by its engine's name, or by the alias that was asked for."""
        models = self._models.get(client)
        return models is None or target.engine in models or target.requested in models

    @contextmanager
    def request(self, client: str) -> Iterator[None]:
        """One request from its coming to its end. Raises ApiError (429), with when to come again."""
        account = self._accounts.get(client)
        if account is None:
            yield
            return
        begun_s = asyncio.get_running_loop().time()
        account.enter(begun_s)
        try:
            yield
        finally:
            account.leave(asyncio.get_running_loop().time() - begun_s)


class _Account:
    """One key's requests. The minute is a sliding one: at no time have more come within the last 60 seconds."""

    def __init__(self, key: KeyConfig) -> None:
        self._open = 0
        self._took_s: float | None = None
        self._came_s: deque[float] = deque()
        self.change(key)

    def change(self, key: KeyConfig) -> None:
        self._key = key
        if key.requests_per_minute is None:
            self._came_s.clear()

    def enter(self, now_s: float) -> None:
        name, most, rate = self._key.name, self._key.in_flight_max, self._key.requests_per_minute
        if most is not None and self._open >= most:
            free_s = _UNKNOWN_S if self._took_s is None else self._took_s / self._open
            raise _refused(f"key '{name}' has {self._open} requests under way, of {most}", "too_many_in_flight", free_s)
        if rate is not None:
            self._check_rate(rate, now_s)
        self._open += 1

    def leave(self, took_s: float) -> None:
        self._open -= 1
        before_s = took_s if self._took_s is None else self._took_s
        self._took_s = before_s + _SMOOTHING * (took_s - before_s)

    def _check_rate(self, rate: int, now_s: float) -> None:
        came_s = self._came_s
        while came_s and came_s[0] <= now_s - _MINUTE_S:
            came_s.popleft()
        if len(came_s) >= rate:
            free_s = came_s[len(came_s) - rate] + _MINUTE_S - now_s
            raise _refused(
                f"key '{self._key.name}' has had its {rate} requests a minute", "rate_limit_exceeded", free_s
            )
        came_s.append(now_s)


def _refused(what: str, code: str, retry_after_s: float) -> ApiError:
    message = f"{what}: come again in {retry_after_s:.1f} s"
    return ApiError(429, message, code, "rate_limit_error", retry_after_s=retry_after_s)
