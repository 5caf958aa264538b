"""The routes: paths, methods, queries and bodies that Nomad 2.0.6 knows, and what it answers to each."""

import json
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.nomad_double import shapes
from tests.nomad_double.cluster import Cluster, Json
from tests.nomad_double.golden import golden_key, load_goldens
from tests.nomad_double.hcl import HclError
from tests.nomad_double.jobspec import read_job
from tests.nomad_double.wire import Refusal, Reply, Request, Server

Handler = Callable[["NomadDouble", Request], Awaitable[Reply]]
_TRUE = ("true", "True", "1")


@dataclass(frozen=True)
class Route:
    """``pattern`` has * for one segment; ``query`` are the parameters that it takes beside namespace and region."""

    methods: tuple[str, ...]
    pattern: tuple[str, ...]
    query: frozenset[str]
    body: str | None
    handler: Handler


_ROUTES: list[Route] = []


def route(methods: str, pattern: str, query: str = "", body: str | None = None) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        _ROUTES.append(
            Route(tuple(methods.split()), tuple(pattern.split("/")), frozenset(query.split()), body, handler)
        )
        return handler

    return add


class NomadDouble:
    """``violations`` are requests that a real Nomad would not have understood; leaving the context fails on any.
    ``refused`` counts what faults refused."""

    def __init__(
        self,
        folder: Path,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        environ: Mapping[str, str] | None = None,
        heartbeat_s: float = 30.0,
        port: int = 0,
    ) -> None:
        self.cluster = Cluster(folder, environ=environ)
        self.goldens = load_goldens()
        self.violations: list[str] = []
        self.asked: list[str] = []
        self.leaderless = False
        self.conflicts = 0  # so many registrations find that somebody else was first
        self.token = token
        self.heartbeat_s = heartbeat_s
        self._scheme = "https" if tls else "http"
        self._server = Server(self._answer, tls, port)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()
        await self.cluster.close()
        assert kind is not None or not self.violations, self.violations

    @property
    def address(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.port}"

    async def start(self) -> None:
        """Listen, on the same port as before. What runs has run on meanwhile, as Nomad's tasks do without its agent."""
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()

    def cut_streams(self) -> int:
        return self._server.cut_streams()

    def teach(self, hcl: str, variables: str, job: Json) -> None:
        """What Nomad makes of this text with these variables, where that is to be something of the test's own."""
        self.goldens[golden_key(hcl, variables)] = job

    def log(self, job_id: str, text: str, kind: str = "stderr") -> None:
        """Words into the log of the job's first living task."""
        alloc = self.cluster.live(job_id)[0]
        next(t for t in self.cluster.tasks[alloc["ID"]].values() if t.started).write(kind, text)

    # -- answering ---------------------------------------------------------------------------------------------------

    async def _answer(self, request: Request) -> Reply:
        self.asked.append(f"{request.method} {request.path}")
        if request.segments[:1] != ("v1",) or "" in request.segments:
            self._violation(request, "no such path (a doubled or trailing slash?)")
            raise Refusal(404, "")
        path = request.segments[1:]
        matching = [
            r
            for r in _ROUTES
            if len(r.pattern) == len(path) and all(p in ("*", s) for p, s in zip(r.pattern, path, strict=True))
        ]
        matching.sort(key=lambda r: r.pattern.count("*"))
        if not matching:
            self._violation(request, "no such path")
            raise Refusal(404, "")
        best = [r for r in matching if r.pattern == matching[0].pattern]
        found = next((r for r in best if request.method in r.methods), None)
        if found is None:
            self._violation(request, "method")
            raise Refusal(405, "Invalid method")
        self._check(request, found)
        reply = await found.handler(self, request)
        reply.index = self.cluster.index
        return reply

    def _check(self, request: Request, found: Route) -> None:
        known = {"namespace", "region", *found.query}
        for name in request.query.keys() - known:
            self._violation(request, f"query '{name}'")
        if "namespace" not in request.query and found.pattern[0] not in ("nodes", "node", "status", "agent"):
            self._violation(request, "no namespace: it would be asked of 'default', whatever is configured")
        if found.body is not None:
            self._check_body(request, found.body)
        elif request.body:
            self._violation(request, "a body where there is none")
        if self.token:
            given = request.headers.get("x-nomad-token", "")
            if given != self.token:
                raise Refusal(403, "ACL token not found" if given else "Permission denied")
        if self.leaderless:
            raise Refusal(500, "No cluster leader")

    def _check_body(self, request: Request, name: str) -> None:
        if not request.body:
            raise Refusal(400, "Request body is empty")
        body = request.json()
        for key in body.keys() - shapes.BODIES[name]:
            self._violation(request, f"body key '{key}'")
        if (problem := shapes.duration_problem(body)) is not None:
            raise Refusal(400, problem)
        for problem in shapes.job_problems(body.get("Job") or {}):
            self._violation(request, problem)
        for key in (body.get("Submission") or {}).keys() - shapes.SUBMISSION:
            self._violation(request, f"Submission has no key '{key}'")

    def _violation(self, request: Request, what: str) -> None:
        self.violations.append(f"{request.method} {request.path}: {what}")

    async def lines(self, request: Request) -> AsyncIterator[bytes]:
        index = int(request.query.get("index") or 0)
        async for batch in self.cluster.follow(request.topics, index, self.heartbeat_s):
            yield json.dumps(batch, separators=(",", ":")).encode() + b"\n"


# -- jobs ------------------------------------------------------------------------------------------------------------


@route("POST PUT", "jobs/parse", body="parse")
async def _parse(nomad: NomadDouble, request: Request) -> Reply:
    body = request.json()
    hcl, variables = body.get("JobHCL") or "", body.get("Variables") or ""
    if not hcl:
        raise Refusal(400, "Job spec is empty")
    job = nomad.goldens.get(golden_key(hcl, variables))
    try:
        return Reply(job if job is not None else read_job(hcl, variables))
    except HclError as e:
        raise Refusal(400, f"Failed to parse job: {e}") from None


@route("POST PUT", "job/*/plan", body="plan")
async def _plan(nomad: NomadDouble, request: Request) -> Reply:
    job = _job_of(request)
    return Reply(nomad.cluster.plan(job))


@route("POST PUT", "job/*", body="register")
async def _register(nomad: NomadDouble, request: Request) -> Reply:
    return await _registered(nomad, request, _job_of(request))


@route("POST PUT", "jobs", body="register")
async def _register_any(nomad: NomadDouble, request: Request) -> Reply:
    return await _registered(nomad, request, request.json().get("Job") or {})


async def _registered(nomad: NomadDouble, request: Request, job: Json) -> Reply:
    body, cluster = request.json(), nomad.cluster
    current = cluster.jobs.get(job["ID"])
    if nomad.conflicts:
        nomad.conflicts -= 1
        if current is None:
            raise Refusal(500, "Enforcing job modify index 0: job already exists")
        current["JobModifyIndex"] = cluster.index = cluster.index + 1
    if body.get("EnforceIndex"):
        wanted = int(body.get("JobModifyIndex") or 0)
        prefix = f"Enforcing job modify index {wanted}: "
        if wanted == 0 and current is not None:
            raise Refusal(500, f"{prefix}job already exists")
        if wanted and current is None:
            raise Refusal(500, f"{prefix}job does not exist")
        if current is not None and current["JobModifyIndex"] != wanted:
            index = current["JobModifyIndex"]
            raise Refusal(500, f"{prefix}job exists with conflicting job modify index: {index}")
    for group in job.get("TaskGroups") or ():
        if not group.get("Tasks"):
            raise Refusal(500, f"1 error occurred:\n\t* Task group {group['Name']} validation failed: Missing tasks")
    eval_id = await cluster.register(job)
    index = cluster.jobs[job["ID"]]["JobModifyIndex"]
    return Reply(
        {
            "EvalID": eval_id, "EvalCreateIndex": index, "JobModifyIndex": index, "Warnings": "", "Index": index,
            "LastContact": 0, "KnownLeader": False, "NextToken": "",
        }
    )  # fmt: skip


def _job_of(request: Request) -> Json:
    job: Json | None = request.json().get("Job")
    if not job:
        raise Refusal(400, "Job must be specified")
    if job.get("ID") != request.segments[2]:
        raise Refusal(400, "Job ID does not match name")
    return job


@route("GET", "jobs", query="prefix")
async def _jobs(nomad: NomadDouble, request: Request) -> Reply:
    keys = ("ID", "Name", "Type", "Status", "Stop", "ModifyIndex", "JobModifyIndex")
    return Reply([{k: j.get(k) for k in keys} for j in nomad.cluster.jobs.values()])


@route("GET", "job/*")
async def _job(nomad: NomadDouble, request: Request) -> Reply:
    job = nomad.cluster.jobs.get(request.segments[2])
    if job is None:
        raise Refusal(404, "job not found")
    return Reply(job)


@route("DELETE", "job/*", query="purge global eval_priority no_shutdown_delay")
async def _deregister(nomad: NomadDouble, request: Request) -> Reply:
    eval_id = await nomad.cluster.deregister(request.segments[2], request.query.get("purge") in _TRUE)
    index = nomad.cluster.index
    return Reply(
        {
            "EvalID": eval_id, "EvalCreateIndex": index if eval_id else 0, "JobModifyIndex": index, "VolumeEvalID": "",
            "VolumeEvalIndex": 0, "Index": index, "LastContact": 0, "KnownLeader": False, "NextToken": "",
        }
    )  # fmt: skip


@route("GET", "job/*/allocations", query="all")
async def _job_allocations(nomad: NomadDouble, request: Request) -> Reply:
    return Reply(nomad.cluster.of_job(request.segments[2]))


@route("GET", "job/*/summary")
async def _summary(nomad: NomadDouble, request: Request) -> Reply:
    job_id = request.segments[2]
    job = nomad.cluster.jobs.get(job_id)
    if job is None:
        raise Refusal(404, "job not found")
    running = {g["Name"]: {"Running": len(nomad.cluster.live_group(job_id, g["Name"]))} for g in job["TaskGroups"]}
    return Reply({"JobID": job_id, "Namespace": "default", "Summary": running, "CreateIndex": job["CreateIndex"]})


@route("GET", "job/*/deployment")
async def _deployment(nomad: NomadDouble, request: Request) -> Reply:
    found = [d for d in nomad.cluster.deployments.values() if d["JobID"] == request.segments[2]]
    return Reply(found[-1] if found else None)


@route("GET", "evaluation/*")
async def _evaluation(nomad: NomadDouble, request: Request) -> Reply:
    evaluation = nomad.cluster.evals.get(request.segments[2])
    if evaluation is None:
        raise Refusal(404, "eval not found")
    return Reply({k: v for k, v in evaluation.items() if v not in (None, "", 0)})


# -- allocations, nodes, the agent -----------------------------------------------------------------------------------


@route("GET", "allocations")
async def _allocations(nomad: NomadDouble, request: Request) -> Reply:
    return Reply(list(nomad.cluster.allocs.values()))


@route("GET", "allocation/*")
async def _allocation(nomad: NomadDouble, request: Request) -> Reply:
    return Reply(_alloc(nomad, request.segments[2], "alloc not found"))


@route("POST PUT", "client/allocation/*/signal", body="signal")
async def _signal(nomad: NomadDouble, request: Request) -> Reply:
    alloc = _alloc(nomad, request.segments[3], "Unknown allocation")
    body = request.json()
    tasks = nomad.cluster.tasks[alloc["ID"]]
    if body["Task"] not in tasks:
        raise Refusal(500, f'task named "{body["Task"]}" not found')
    tasks[body["Task"]].send(signal.Signals[body["Signal"]])
    return Reply({"Index": 0})


@route("GET", "client/fs/logs/*", query="task type follow offset origin plain")
async def _logs(nomad: NomadDouble, request: Request) -> Reply:
    query = request.query
    if not query.get("task"):
        raise Refusal(400, "must provide task name")
    if query.get("type") not in ("stdout", "stderr"):
        raise Refusal(400, "must provide log type (stdout/stderr)")
    alloc = _alloc(nomad, request.segments[4], f'Unknown allocation "{request.segments[4]}"')
    task = nomad.cluster.tasks[alloc["ID"]].get(query["task"])
    if task is None:
        raise Refusal(400, f'unknown task name "{query["task"]}"')
    if not task.started:
        raise Refusal(404, f'task "{query["task"]}" not started yet. No logs available')
    text, offset = task.read(query["type"]), int(query.get("offset") or 0)
    part = text[max(0, len(text) - offset) :] if query.get("origin") == "end" else text[offset:]
    assert query.get("plain") in _TRUE, "framed logs are not asked for"
    return Reply(text=part)


def _alloc(nomad: NomadDouble, alloc_id: str, unknown: str) -> Json:
    if alloc_id not in nomad.cluster.allocs:
        raise Refusal(404, unknown)
    return nomad.cluster.allocs[alloc_id]


@route("GET", "nodes", query="prefix resources os")
async def _nodes(nomad: NomadDouble, request: Request) -> Reply:
    return Reply([_node_of(nomad)])


@route("GET", "node/*")
async def _node(nomad: NomadDouble, request: Request) -> Reply:
    if request.segments[2] != nomad.cluster.node_id:
        raise Refusal(404, "node not found")
    return Reply(_node_of(nomad))


def _node_of(nomad: NomadDouble) -> Json:
    cluster = nomad.cluster
    return {
        "Address": "127.0.0.1", "ID": cluster.node_id, "Datacenter": "dc1", "Name": cluster.node_name,
        "NodePool": "gpu", "NodeClass": "", "Version": "2.0.6", "Drain": cluster.draining,
        "SchedulingEligibility": "ineligible" if cluster.draining else "eligible",
        "Status": "down" if cluster.down else "ready", "StatusDescription": "", "Drivers": {}, "HostVolumes": None,
        "LastDrain": None, "CreateIndex": 7, "ModifyIndex": 9,
    }  # fmt: skip


@route("GET", "status/leader")
async def _leader(nomad: NomadDouble, request: Request) -> Reply:
    return Reply("127.0.0.1:4647")


@route("GET", "agent/self")
async def _self(nomad: NomadDouble, request: Request) -> Reply:
    member: dict[str, Any] = {"Name": "n.global", "Tags": {"build": "2.0.6"}, "Status": "alive"}
    config = {"Region": "global", "Datacenter": "dc1", "ACL": {"Enabled": bool(nomad.token)}}
    return Reply({"config": config, "member": member, "stats": {"nomad": {"leader": "true"}}})


@route("GET", "event/stream", query="index")
async def _stream(nomad: NomadDouble, request: Request) -> Reply:
    return Reply(stream=nomad.lines(request))
