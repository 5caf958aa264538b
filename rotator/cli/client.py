"""A client of the operators' REST API: one request at a time, every failure a CliError."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from rotator.cli import errors
from rotator.cli.errors import CliError, fail

CONNECT_DEADLINE_S = 30.0
DOWNLOAD_DEADLINE_S = 300.0
_PIECE_BYTES = 1 << 16
_STATUS_CODES = {401: errors.REFUSED, 403: errors.REFUSED, 409: errors.REFUSED, 421: errors.REFUSED}
_USAGE = (400, 405, 411, 413, 415)


class Answer(Protocol):
    @property
    def status(self) -> int: ...

    def read(self) -> bytes: ...

    def __iter__(self) -> Iterator[bytes]:
        """Its lines, as they come."""
        ...


class Transport(Protocol):
    """Carries one request. Raises OSError where nobody answers, ConnectionError where an answer breaks off."""

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, deadline_s: float
    ) -> AbstractContextManager[Answer]: ...


class HttpTransport:
    """urllib, without proxies: a service on loopback must not be looked for on another machine."""

    def __init__(self) -> None:
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _AnyStatus())

    @contextmanager
    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, deadline_s: float
    ) -> Iterator[Answer]:
        request = urllib.request.Request(url, body, dict(headers), method=method)
        try:
            answer: HTTPResponse = self._opener.open(request, timeout=deadline_s)
        except ConnectionError:
            raise  # some of these are HTTPExceptions, too
        except HTTPException as e:
            raise OSError(f"it speaks no HTTP: {e!r}") from None
        with answer:
            try:
                yield _Whole(answer)
            except HTTPException:
                raise ConnectionError from None  # half an answer


class _Whole:
    """An answer whose lines end only where it ends: the library's own readline takes half a stream for a whole one."""

    def __init__(self, answer: HTTPResponse) -> None:
        self._answer = answer

    @property
    def status(self) -> int:
        return self._answer.status

    def read(self) -> bytes:
        return self._answer.read()

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        while piece := self._answer.read1(_PIECE_BYTES):
            *lines, rest = (rest + piece).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if rest:
            yield rest


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Gives answers as they are: an error's body says what to do."""

    def http_response(self, request: urllib.request.Request, response: HTTPResponse) -> HTTPResponse:
        return response

    https_response = http_response


@dataclass(frozen=True, slots=True)
class Client:
    url: str
    key: str | None
    transport: Transport

    def get(self, path: str, **query: Any) -> Any:
        return self._ask("GET", path, query, None, CONNECT_DEADLINE_S)

    def save(self, path: str, to: Path) -> int:
        """Write an answer's body to a file that does not exist yet; returns its bytes. Half a file does not stay."""
        part = to.with_name(to.name + ".part")
        with self._open("GET", path, {}, None, DOWNLOAD_DEADLINE_S) as answer:
            if answer.status >= 400:
                raise _refusal(answer.status, answer.read())
            try:
                part.write_bytes(answer.read())
                os.replace(part, to)
            except OSError as e:
                part.unlink(missing_ok=True)
                fail(errors.PROBLEM, f"{to}: {e.strerror}")
        return to.stat().st_size

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, deadline_s: float = CONNECT_DEADLINE_S) -> Any:
        """``deadline_s`` is the service's own; the connection waits a little longer, so that it can answer 504."""
        given = {k: v for k, v in (body or {}).items() if v is not None}
        return self._ask("POST", path, {}, given, deadline_s + 10.0)

    def delete(self, path: str) -> Any:
        return self._ask("DELETE", path, {}, None, CONNECT_DEADLINE_S)

    def events(self, **query: Any) -> Iterator[dict[str, Any]]:
        """Follow the event stream. Keep-alive comments bound how long it may be silent."""
        with self._open("GET", "/events", query, None, CONNECT_DEADLINE_S) as answer:
            if answer.status != 200:
                raise _refusal(answer.status, answer.read())
            for line in answer:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

    def lines(self, path: str, *, deadline_s: float = CONNECT_DEADLINE_S, **query: Any) -> Iterator[str]:
        """Lines of text as they come. ``deadline_s`` bounds how long it may be silent."""
        with self._open("GET", path, query, None, deadline_s) as answer:
            if answer.status != 200:
                raise _refusal(answer.status, answer.read())
            for line in answer:
                yield line.decode(errors="replace").rstrip("\r\n")

    def stream(self, path: str, body: Mapping[str, Any], *, deadline_s: float) -> Iterator[dict[str, Any]]:
        """The data of a streamed answer's events. ``deadline_s`` bounds how long it may be silent."""
        with self._open("POST", path, {}, body, deadline_s) as answer:
            if answer.status != 200:
                raise _refusal(answer.status, answer.read())
            for line in answer:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line.removeprefix(b"data: "))

    def _ask(
        self, method: str, path: str, query: Mapping[str, Any], body: Mapping[str, Any] | None, deadline_s: float
    ) -> Any:
        with self._open(method, path, query, body, deadline_s) as answer:
            text = answer.read()
        if answer.status >= 400:
            raise _refusal(answer.status, text)
        try:
            return json.loads(text)
        except ValueError:
            fail(errors.UNREACHABLE, f"{self.url}: what answers there is no rotator: check --url")

    @contextmanager
    def _open(
        self, method: str, path: str, query: Mapping[str, Any], body: Mapping[str, Any] | None, deadline_s: float
    ) -> Iterator[Answer]:
        if not self.url.startswith(("http://", "https://")):
            fail(errors.USAGE, f"{self.url}: is no http URL: give e.g. --url http://127.0.0.1:8400")
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        given = urlencode({k: v for k, v in query.items() if v is not None and v != []}, doseq=True)
        url = f"{self.url.rstrip('/')}{path}{'?' if given else ''}{given}"
        try:
            with self.transport.send(method, url, headers, data, deadline_s) as answer:
                yield answer
        except TimeoutError:
            fail(errors.FAILED, f"{self.url}: no answer in {deadline_s:.0f} s: what was begun goes on; see `status`")
        except (OSError, ValueError) as e:
            if isinstance(e, ConnectionError) and not isinstance(e, ConnectionRefusedError):
                lost = "the connection broke before the answer was whole: what was begun may go on"
                fail(errors.UNREACHABLE, f"{self.url}: {lost}; see `rotator status`")
            reason = e.reason if isinstance(e, urllib.error.URLError) else e
            if isinstance(reason, TimeoutError):
                fail(errors.UNREACHABLE, f"{self.url}: no connection in {deadline_s:.0f} s: check --url")
            fail(errors.UNREACHABLE, f"{self.url}: cannot reach the service ({reason}): is `rotator serve` running?")


def engine_path(name: str, action: str = "") -> str:
    """The path of one engine; a slash in its name stays one."""
    return f"/engines/{quote(name)}{f'/{action}' if action else ''}"


def _refusal(status: int, text: bytes) -> CliError:
    """The service's problem as one line and an exit code."""
    try:
        problem = json.loads(text)
        lines = problem.get("errors") or []
        said = str(problem.get("detail") or problem.get("title") or "")
    except (ValueError, AttributeError):
        return CliError(errors.UNREACHABLE, f"HTTP {status} from what is no rotator: check --url")
    if len(lines) > 1 or any(str(line) not in said for line in lines):
        return CliError(_code(status, problem), *map(str, lines))
    if status == 401:
        said = f"{said}; give --key, or set ROTATOR_KEY"
    return CliError(_code(status, problem), said or f"HTTP {status}")


def _code(status: int, problem: Mapping[str, Any]) -> int:
    if status == 422 and problem.get("type") != "urn:rotator:problem:config":
        return errors.USAGE
    if status in _USAGE:
        return errors.USAGE
    if status in _STATUS_CODES:
        return _STATUS_CODES[status]
    return errors.FAILED if status in (500, 502, 504) else errors.PROBLEM
