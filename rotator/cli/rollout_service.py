"""The running service as a rollout needs it, over its REST API."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.parse import quote

from rotator.cli import errors
from rotator.cli.client import Client, engine_path
from rotator.cli.errors import CliError
from rotator.rollout.ports import Away, Refused

_TEXT = ("content", "reasoning_content", "reasoning")


class RestService:
    """Implements rollout.ports.Service. Blocking; prompts that go together go out in threads."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def look(self) -> None:
        try:
            self._client.get("/readyz")
        except (CliError, HTTPException) as e:
            raise Away(f"the service is not ready: {e}") from None

    def engine(self, name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._get(engine_path(name))
        return found

    def gpus(self) -> Sequence[Mapping[str, Any]]:
        return list(self._get("/gpus"))

    def started_as(self, engine: str) -> str:
        rows = self._get("/ledger", table="engines", engine=engine, limit=1)["rows"]
        return str(rows[0]["spec_hash"]) if rows else ""

    def last_stop(self, engine: str) -> Mapping[str, Any] | None:
        rows = self._get("/ledger", table="transitions", engine=engine, action="stop", limit=1)["rows"]
        return dict(rows[0]) if rows else None

    # -- commands ----------------------------------------------------------------------------------------------------

    def wake(self, engine: str, *, deadline_s: float) -> None:
        self._command("/wake", {"model": engine}, deadline_s)

    def sleep(self, engine: str, *, deadline_s: float) -> None:
        self._command("/sleep", {"model": engine}, deadline_s)

    def start(self, engine: str, *, deadline_s: float) -> None:
        self._command(engine_path(engine, "start"), {}, deadline_s)

    def stop(self, engine: str, *, deadline_s: float) -> None:
        self._command(engine_path(engine, "stop"), {}, deadline_s)

    def release(self, engine: str) -> None:
        self._post(engine_path(engine, "release"), None)

    def reload(self) -> tuple[str, ...]:
        return tuple(self._post("/config/reload", None)["changes"])

    def cordon(self, gpu: str, reason: str | None) -> None:
        action = "cordon" if reason is not None else "uncordon"
        self._post(f"/gpus/{quote(gpu)}/{action}", {"reason": reason} if reason is not None else None)

    def _command(self, path: str, body: Mapping[str, Any], deadline_s: float) -> None:
        bounded_s = min(deadline_s, 86_400.0)
        self._post(path, {**body, "wait": True, "deadline_s": bounded_s}, deadline_s=bounded_s)

    def _post(self, path: str, body: Mapping[str, Any] | None, *, deadline_s: float = 120.0) -> Any:
        try:
            return self._client.post(path, body, deadline_s=deadline_s)
        except (CliError, HTTPException) as e:
            raise _sorted(e) from None

    def _get(self, path: str, **query: Any) -> Any:
        try:
            return self._client.get(path, **query)
        except (CliError, HTTPException) as e:
            raise _sorted(e) from None

    # -- asking ------------------------------------------------------------------------------------------------------

    def ask(self, engine: str, prompts: Sequence[str], *, tokens: int, deadline_s: float) -> list[str]:
        def one(prompt: str) -> str:
            body = {**_chat(engine, prompt, tokens), "stream": False}
            answer = self._post("/v1/chat/completions", body, deadline_s=deadline_s)
            message = (answer.get("choices") or [{}])[0].get("message") or {}
            return "\n".join(str(message[name]) for name in _TEXT if message.get(name))

        with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
            return list(pool.map(one, prompts))

    def pace(self, engine: str, *, tokens: int, deadline_s: float) -> tuple[float, float]:
        prompt = "Write a long story about a lighthouse keeper who repairs clocks."
        more = {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        began_s, first_s, last_s, counted, pieces = time.monotonic(), 0.0, 0.0, 0, 0
        try:
            body = {**_chat(engine, prompt, tokens), **more}
            for chunk in self._client.stream("/v1/chat/completions", body, deadline_s=deadline_s):
                if "error" in chunk:
                    raise Refused(f"its answer broke off: {chunk['error']}")
                counted = (chunk.get("usage") or {}).get("completion_tokens", counted)
                if any((c.get("delta") or {}).get(f) for c in chunk.get("choices") or () for f in _TEXT):
                    last_s = time.monotonic()
                    first_s = first_s or last_s
                    pieces += 1
        except (CliError, HTTPException) as e:
            raise _sorted(e) from None
        if pieces < 2:
            raise Refused(f"its answer had {pieces} pieces: no speed can be told from it")
        return ((counted or pieces) - 1) / max(1e-9, last_s - first_s), first_s - began_s


def _chat(engine: str, prompt: str, tokens: int) -> dict[str, Any]:
    return {
        "model": engine,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
    }


def _sorted(error: CliError | HTTPException) -> Exception:
    """Nobody there is no answer about the engine, and neither is a key that does not do: that ends the command."""
    if isinstance(error, HTTPException):
        return Away(f"the service's answer broke off: {error!r}")
    if error.code == errors.UNREACHABLE:
        return Away(f"the service cannot be reached: {error}")
    if error.code == errors.USAGE or ("key" in str(error) and error.code == errors.REFUSED):
        return error
    return Refused(str(error))
