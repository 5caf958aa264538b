"""Nomad's HTTP API for asyncio: python-nomad's requests, each in a thread and bounded, its answers as plain values.

python-nomad's classes are made here one by one: its ``Nomad`` lets the environment overrule what it is told (NOMAD_ADDR
beats an explicit host) and does not verify certificates unless asked to.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import requests
from nomad import api
from nomad.api.exceptions import BaseNomadException

from rotator.adapters.nomad_access import NomadAccess
from rotator.ports import LaunchConflict, LauncherAway, LaunchError, LaunchRefused

T = TypeVar("T")
Json = dict[str, Any]

THREADS_MAX = 4  # calls at once; further ones wait, within their own deadline
ERROR_CHARS = 600
# What a server says when it cannot speak for the cluster (HTTP 500, text/plain).
_LEADERLESS = ("no cluster leader", "not ready to serve consistent reads", "leadership lost", "no leader")
_ELSEWHERE = ("failed to get conn", "rpc error: eof", "connection refused", "no path to region", "i/o timeout")
_CONFLICT = "enforcing job modify index"
_NOT_NOMAD = "{} answers, but not as Nomad does: correct nomad.address"  # whose errors are plain text


@dataclass(frozen=True, slots=True)
class Planned:
    """What registering a job would do. ``job_modify_index`` is what it would replace: 0 where there is none."""

    job_modify_index: int
    diff: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[str, Any] = field(default_factory=dict)  # by task group: why it has no place
    warnings: str = ""

    @property
    def changed(self) -> bool:
        return str(self.diff.get("Type", "None")) != "None"


@dataclass(frozen=True, slots=True)
class Registered:
    """``eval_id`` is empty where nothing has to be placed."""

    eval_id: str
    modify_index: int
    warnings: str = ""


class NomadClient:
    """For one event loop. Every method raises LauncherAway (no answer, no leader, token refused), LaunchRefused (an
    error) or LaunchConflict, and nothing else. ``heard`` is told after each call: None, or why Nomad is away."""

    def __init__(
        self,
        access: NomadAccess,
        *,
        deadline_s: float = 10.0,
        heard: Callable[[LauncherAway | None], None] = lambda _: None,
    ) -> None:
        self.access = access
        self._deadline_s = deadline_s
        self._heard = heard
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="nomad")
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy, no netrc, no REQUESTS_CA_BUNDLE: Nomad is where we were told
        self._session.headers["User-Agent"] = "rotator"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Calls under way end by themselves, within their own timeouts; nobody waits for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._session.close()

    # -- jobs --------------------------------------------------------------------------------------------------------

    async def parse(self, hcl: str, variables: str = "") -> Json:
        """The job that this HCL2 text makes with these variables (the text of a variables file)."""
        body = {"JobHCL": hcl, "Variables": variables, "Canonicalize": True}
        return _mapping(await self._ask("parse a job", api.Jobs, "post", "parse", json=body))

    async def plan(self, job: Mapping[str, Any]) -> Planned:
        body = {"Job": dict(job), "Diff": True, "PolicyOverride": False}
        doing = f"plan job '{job.get('ID')}'"
        answer = _mapping(await self._ask(doing, api.Job, "post", str(job["ID"]), "plan", json=body))
        return Planned(
            int(answer.get("JobModifyIndex") or 0),
            answer.get("Diff") or {},
            answer.get("FailedTGAllocs") or {},
            answer.get("Warnings") or "",
        )

    async def register(
        self, job: Mapping[str, Any], *, modify_index: int, source: str = "", variables: str = ""
    ) -> Registered:
        """Only if the registered job is still that of ``modify_index`` (0: there must be none), else LaunchConflict."""
        body: Json = {"Job": dict(job), "EnforceIndex": True, "JobModifyIndex": modify_index, "PreserveCounts": False}
        if source:
            body["Submission"] = {"Source": source, "Format": "hcl2", "Variables": variables, "VariableFlags": {}}
        doing = f"register job '{job.get('ID')}'"
        answer = _mapping(await self._ask(doing, api.Job, "post", str(job["ID"]), json=body))
        return Registered(
            answer.get("EvalID") or "", int(answer.get("JobModifyIndex") or 0), answer.get("Warnings") or ""
        )

    async def job(self, job_id: str) -> Json | None:
        """None where there is no such job (or it was purged)."""
        return await self._found(f"read job '{job_id}'", api.Job, job_id)

    async def stop_job(self, job_id: str, *, purge: bool = False) -> str:
        """Deregister it: Nomad ends its allocations by their own kill timeouts. The evaluation's id, empty where there
        was nothing to stop."""
        params = {"purge": "true"} if purge else {}
        answer = await self._ask(f"stop job '{job_id}'", api.Job, "delete", job_id, params=params)
        return str(_mapping(answer).get("EvalID") or "")

    async def evaluation(self, eval_id: str) -> Json | None:
        return await self._found(f"read evaluation {eval_id}", api.Evaluation, eval_id)

    async def deployment(self, job_id: str) -> Json | None:
        """The job's latest deployment; None where it has none."""
        return await self._found(f"read the deployment of job '{job_id}'", api.Job, job_id, "deployment")

    # -- allocations and nodes ---------------------------------------------------------------------------------------

    async def allocations(self, job_id: str) -> tuple[Json, ...]:
        """As Nomad lists them, also those of earlier versions that it has not forgotten; empty for an unknown job."""
        doing = f"list the allocations of job '{job_id}'"
        return tuple(await self._ask(doing, api.Job, "get", job_id, "allocations", params={"all": "true"}) or ())

    async def logs(self, alloc_id: str, task: str, kind: str = "stderr", *, tail_bytes: int = 1 << 16) -> str:
        """The end of a task's log; empty where there is none yet, or where its node forgot it."""
        params = {"task": task, "type": kind, "origin": "end", "offset": tail_bytes, "plain": "true"}
        doing = f"read the {kind} of task '{task}'"
        try:
            return str(await self._ask(doing, _Logs, "get", alloc_id, params=params, as_text=True))
        except LaunchRefused as e:
            if e.status == 404:
                return ""
            raise

    async def signal(self, alloc_id: str, signal: str, task: str) -> None:
        body = {"Signal": signal, "Task": task}
        await self._ask(f"send {signal} to task '{task}'", _Allocation, "post", alloc_id, "signal", json=body)

    async def nodes(self) -> tuple[Json, ...]:
        return tuple(await self._ask("list nodes", api.Nodes, "get") or ())

    async def node(self, node_id: str) -> Json | None:
        return await self._found(f"read node {node_id}", api.Node, node_id)

    async def leader(self) -> str:
        return str(await self._ask("ask who leads", _Leader, "get"))

    # -- asking ------------------------------------------------------------------------------------------------------

    async def _found(self, doing: str, kind: type[api.base.Requester], *path: str) -> Json | None:
        try:
            answer = await self._ask(doing, kind, "get", *path)
        except LaunchRefused as e:
            if e.status == 404:
                return None
            raise
        return None if answer is None else _mapping(answer)

    async def _ask(
        self,
        doing: str,
        kind: type[api.base.Requester],
        method: str,
        *path: str,
        params: Mapping[str, Any] | None = None,
        json: Json | None = None,
        as_text: bool = False,
    ) -> Any:
        def call() -> Any:
            requester = self._requester(kind)
            words = {"namespace": self.access.namespace, **(params or {})}
            quoted = [quote(part, safe="") for part in path]
            answer = requester.request(*quoted, method=method, params=words, json=json)
            return _body(answer, as_text, self.access.address)

        try:
            async with asyncio.timeout(self._deadline_s):
                answer = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except TimeoutError:
            away = LauncherAway(f"Nomad ({self.access.address}) did not answer within {self._deadline_s:g} s: {doing}")
            self._heard(away)
            raise away from None
        except BaseNomadException as e:
            raise self._told(_error(doing, e, self.access)) from None
        except LaunchError as e:
            raise self._told(e) from None
        except requests.RequestException as e:
            raise self._told(LauncherAway(f"Nomad ({self.access.address}): {_short(str(e))}")) from None
        self._heard(None)
        return answer

    def _told(self, error: LaunchError) -> LaunchError:
        """A refusal is an answer, too."""
        self._heard(error if isinstance(error, LauncherAway) else None)
        return error

    def _requester(self, kind: type[api.base.Requester]) -> api.base.Requester:
        access = self.access
        return kind(
            address=access.address,
            namespace=access.namespace,
            token=access.read_token() or None,
            timeout=self._deadline_s,
            verify=access.verify,
            cert=access.cert or (),
            region=access.region or None,
            session=self._session,
        )


class _Leader(api.base.Requester):  # type: ignore[misc] # python-nomad is untyped
    ENDPOINT = "status/leader"


class _Logs(api.base.Requester):  # type: ignore[misc] # as above
    ENDPOINT = "client/fs/logs"


class _Allocation(api.base.Requester):  # type: ignore[misc] # as above
    ENDPOINT = "client/allocation"


def _body(answer: requests.Response, as_text: bool, address: str) -> Any:
    """What was answered, decoded. Raises LauncherAway where that is not Nomad's."""
    if as_text:
        return answer.content.decode(errors="replace")
    try:
        return json.loads(answer.content)
    except ValueError:
        raise LauncherAway(_NOT_NOMAD.format(address)) from None


def _mapping(answer: Any) -> Json:
    if not isinstance(answer, dict):
        raise LaunchRefused("Nomad answered with something else than an object: is this a Nomad of another time?")
    return answer


def _error(doing: str, error: BaseNomadException, access: NomadAccess) -> LaunchError:
    answer = error.nomad_resp
    if not isinstance(answer, requests.Response):
        return LauncherAway(f"Nomad ({access.address}) cannot be reached: {_reason(answer)}: could not {doing}")
    text = _short(answer.text) or answer.reason or "no text"
    lower = text.lower()
    if answer.status_code == 403:
        return LauncherAway(
            f"Nomad refuses our token ({text}): could not {doing} in namespace '{access.namespace}': "
            "give a token whose policy allows it (docs/nomad.md lists what it needs)",
            "token",
        )
    if _CONFLICT in lower:
        return LaunchConflict(f"could not {doing}: somebody changed it meanwhile ({text}): plan again")
    if any(words in lower for words in _LEADERLESS):
        return LauncherAway(f"Nomad has no leader now ({text}): could not {doing}", "leader")
    if answer.status_code in (429, 502, 503, 504) or (
        answer.status_code == 500 and any(words in lower for words in _ELSEWHERE)
    ):
        return LauncherAway(f"Nomad ({access.address}) could not {doing}: {answer.status_code} {text}")
    if "html" in answer.headers.get("Content-Type", ""):
        return LauncherAway(_NOT_NOMAD.format(access.address))
    return LaunchRefused(f"Nomad would not {doing}: {text}", answer.status_code)


def _reason(error: object) -> str:
    """The last of the causes that requests and urllib3 wrap into each other: what an operator can act on."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "its certificate is not signed by an authority that we know: give nomad.ca_file"
    if "WRONG_VERSION_NUMBER" in text:
        return "it does not speak TLS: give its address with http://"
    if "Failed to resolve" in text:
        return "there is no host of that name"
    if "Connection refused" in text:
        return "nobody listens there"
    if isinstance(error, requests.exceptions.Timeout):
        return "it does not answer in time"
    return _short(text)


def _short(text: str) -> str:
    return " ".join(text.split())[:ERROR_CHARS]
