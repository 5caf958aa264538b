"""Carries the command line's requests straight into the API, without a socket."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi.testclient import TestClient


@dataclass
class Canned:
    """An answer that was written down."""

    status: int
    body: bytes

    def read(self) -> bytes:
        return self.body

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body.splitlines(keepends=True))


class ApiTransport:
    def __init__(self, api: TestClient) -> None:
        self._api = api
        self.deadlines_s: list[float] = []

    @contextmanager
    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, deadline_s: float
    ) -> Iterator[Canned]:
        self.deadlines_s.append(deadline_s)
        answer = self._api.request(method, url, headers=dict(headers), content=body)
        yield Canned(answer.status_code, answer.content)


class CannedTransport:
    """Gives the same answer to everything, or raises."""

    def __init__(self, answer: Canned | Exception) -> None:
        self._answer = answer
        self.urls: list[str] = []

    @contextmanager
    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, deadline_s: float
    ) -> Iterator[Canned]:
        self.urls.append(url)
        if isinstance(self._answer, Exception):
            raise self._answer
        yield self._answer
