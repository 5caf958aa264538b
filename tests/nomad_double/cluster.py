"""The cluster behind the double: one node, jobs, evaluations, allocations, deployments, and the events of it all."""

import asyncio
import contextlib
import copy
import itertools
import os
import signal
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.nomad_double.diff import job_diff
from tests.nomad_double.tasks import Argv, Task, raw_exec

Json = dict[str, Any]
EVENTS_MAX = 100  # Nomad's own buffer: who comes later has missed the rest
ZERO_TIME = "0001-01-01T00:00:00Z"
ENDED = ("complete", "failed", "lost")


class Cluster:
    def __init__(self, folder: Path, *, node: str = "gpu1", environ: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.node_name = node
        self.node_id = str(uuid.uuid4())
        self.argv: Argv = raw_exec
        self.environ = dict(os.environ if environ is None else environ)
        self.jobs: dict[str, Json] = {}
        self.evals: dict[str, Json] = {}
        self.allocs: dict[str, Json] = {}
        self.deployments: dict[str, Json] = {}
        self.tasks: dict[str, dict[str, Task]] = {}
        self.no_place: Json | None = None  # AllocMetric of every group, while set
        self.draining = False
        self.down = False
        self.deployments_fail = False
        self.events: deque[Json] = deque(maxlen=EVENTS_MAX)
        self.index = 10
        self._news = asyncio.Condition()
        self._background: set[asyncio.Task[None]] = set()

    # -- jobs --------------------------------------------------------------------------------------------------------

    def plan(self, job: Json) -> Json:
        registered = self.jobs.get(job["ID"])
        diff = job_diff(registered, {**job, "Stop": bool(job.get("Stop"))})
        failed = self._placement(job)
        return {
            "Annotations": {"DesiredTGUpdates": {}, "PreemptedAllocs": None},
            "CreatedEvals": None,
            "Diff": diff,
            "FailedTGAllocs": failed,
            "JobModifyIndex": registered["JobModifyIndex"] if registered else 0,
            "NextPeriodicLaunch": ZERO_TIME,
            "Warnings": "",
            "Index": self.index,
        }

    async def register(self, job: Json) -> str:
        """Keep a new version where it differs, and place what is missing. The evaluation's id."""
        old = self.jobs.get(job["ID"])
        changed = job_diff(old, {**job, "Stop": False})["Type"] != "None"
        index = self._next()
        version = 0 if old is None else old["Version"] + bool(changed)
        create = old["CreateIndex"] if old else index
        own = {"Version": version, "CreateIndex": create, "ModifyIndex": index, "JobModifyIndex": index, "Stop": False}
        self.jobs[job["ID"]] = {**copy.deepcopy(job), **own, "Status": "pending", "StatusDescription": ""}
        await self._event("Job", "JobRegistered", job["ID"], [job["ID"]], {"Job": self.jobs[job["ID"]]})
        return await self._evaluate(self.jobs[job["ID"]], "job-register", replace=changed)

    async def deregister(self, job_id: str, purge: bool) -> str:
        job = self.jobs.get(job_id)
        if job is None:
            return ""
        job["Stop"], job["JobModifyIndex"] = True, self._next()
        for evaluation in self.evals.values():
            if evaluation["JobID"] == job_id and evaluation["Status"] == "blocked":
                evaluation["Status"] = "canceled"
        await self._event("Job", "JobDeregistered", job_id, [job_id], {"Job": job})
        for alloc in self.of_job(job_id):
            self._stop_soon(alloc, "alloc not needed due to job update")
        self._settle(job_id)
        if purge:
            del self.jobs[job_id]
        return (await self._new_eval(job, "job-deregister"))["ID"]

    def of_job(self, job_id: str) -> list[Json]:
        return [a for a in self.allocs.values() if a["JobID"] == job_id]

    def live(self, job_id: str) -> list[Json]:
        return [a for a in self.of_job(job_id) if a["ClientStatus"] not in ENDED]

    # -- placing -----------------------------------------------------------------------------------------------------

    async def _evaluate(self, job: Json, why: str, *, replace: bool) -> str:
        evaluation = await self._new_eval(job, why)
        if replace:
            for alloc in self.live(job["ID"]):
                self._stop_soon(alloc, "alloc is being updated due to job update")
        missing = [g for g in job["TaskGroups"] if replace or not self.live_group(job["ID"], g["Name"])]
        failed = self._placement(job) if missing else None
        if failed:
            blocked = await self._new_eval(job, "queued-allocs", Status="blocked", FailedTGAllocs=failed)
            evaluation.update(FailedTGAllocs=failed, BlockedEval=blocked["ID"])
        else:
            deployment = await self._deploy(job) if missing and job.get("Update") else None
            for group in missing:
                await self._place(job, group, evaluation, deployment)
        evaluation.update(Status="complete", ModifyIndex=self._next())
        await self._event("Evaluation", "EvaluationUpdated", evaluation["ID"], [job["ID"]], {"Evaluation": evaluation})
        self._settle(job["ID"])
        return str(evaluation["ID"])

    def live_group(self, job_id: str, group: str) -> list[Json]:
        return [a for a in self.live(job_id) if a["TaskGroup"] == group]

    def _placement(self, job: Json) -> Json | None:
        """Why no group has a place; None where each has."""
        metric = self.no_place
        if metric is None and (self.draining or self.down):
            metric = {"NodesEvaluated": 0, "NodesAvailable": None, "ConstraintFiltered": None}
        ports = {
            port["Value"]
            for a in self.allocs.values()
            if a["ClientStatus"] not in ENDED and a["JobID"] != job["ID"]
            for port in _ports(self.jobs.get(a["JobID"], {}))
        }
        if metric is None and (taken := ports & {p["Value"] for p in _ports(job)}):
            metric = {"NodesEvaluated": 1, "DimensionExhausted": {f"network: reserved port collision {taken}": 1}}
        return {g["Name"]: metric for g in job["TaskGroups"]} if metric is not None else None

    async def _new_eval(self, job: Json, why: str, **more: Any) -> Json:
        index = self._next()
        evaluation = {
            "ID": str(uuid.uuid4()), "Namespace": job.get("Namespace") or "default", "Priority": 50,
            "Type": "service", "TriggeredBy": why, "JobID": job["ID"], "JobModifyIndex": job["JobModifyIndex"],
            "Status": "pending", "CreateIndex": index, "ModifyIndex": index, **more,
        }  # fmt: skip
        self.evals[evaluation["ID"]] = evaluation
        await self._event("Evaluation", "EvaluationUpdated", evaluation["ID"], [job["ID"]], {"Evaluation": evaluation})
        return evaluation

    async def _deploy(self, job: Json) -> Json:
        index = self._next()
        counts = {"DesiredTotal": 1, "PlacedAllocs": 1, "HealthyAllocs": 0, "UnhealthyAllocs": 0, "DesiredCanaries": 0}
        progress = {"ProgressDeadline": 600_000_000_000, "RequireProgressBy": ZERO_TIME, "AutoRevert": False}
        shape = {**counts, **progress, "AutoPromote": False, "Promoted": False, "PlacedCanaries": None}
        deployment = {
            "ID": str(uuid.uuid4()),
            "Namespace": job.get("Namespace") or "default",
            "JobID": job["ID"],
            "JobVersion": job["Version"],
            "JobModifyIndex": job["JobModifyIndex"],
            "JobSpecModifyIndex": job["JobModifyIndex"],
            "JobCreateIndex": job["CreateIndex"],
            "IsMultiregion": False,
            "TaskGroups": {g["Name"]: dict(shape) for g in job["TaskGroups"]},
            "Status": "running",
            "StatusDescription": "Deployment is running",
            "EvalPriority": 0,
            "CreateIndex": index,
            "ModifyIndex": index,
            "CreateTime": time.time_ns(),
            "ModifyTime": time.time_ns(),
        }
        self.deployments[deployment["ID"]] = deployment
        return deployment

    async def _place(self, job: Json, group: Json, evaluation: Json, deployment: Json | None) -> None:
        index = self._next()
        tasks = {t["Name"]: _task_state("pending") for t in group["Tasks"]}
        alloc: Json = {
            "ID": str(uuid.uuid4()), "EvalID": evaluation["ID"], "Name": f"{job['ID']}.{group['Name']}[0]",
            "Namespace": job.get("Namespace") or "default", "NodeID": self.node_id, "NodeName": self.node_name,
            "JobID": job["ID"], "JobType": "service", "JobVersion": job["Version"], "TaskGroup": group["Name"],
            "DesiredStatus": "run", "DesiredDescription": "", "ClientStatus": "pending", "ClientDescription": "",
            "DesiredTransition": {"Migrate": None, "Reschedule": None, "ForceReschedule": None},
            "TaskStates": tasks, "DeploymentStatus": None, "FollowupEvalID": "", "NextAllocation": "",
            "RescheduleTracker": None, "PreemptedAllocations": None, "PreemptedByAllocation": "",
            "CreateIndex": index, "ModifyIndex": index,
            "CreateTime": time.time_ns(), "ModifyTime": time.time_ns(),
        }  # fmt: skip
        self.allocs[alloc["ID"]] = alloc
        folder = self.folder / alloc["ID"] / "alloc" / "logs"
        self.tasks[alloc["ID"]] = {
            t["Name"]: Task(self.argv(job, t), self._environment(job, group, t, alloc), folder, t["Name"])
            for t in group["Tasks"]
        }
        await self._alloc_event(alloc)
        self._soon(self._run(job, group, alloc, deployment))

    def _environment(self, job: Json, group: Json, task: Json, alloc: Json) -> dict[str, str]:
        ports = {f"NOMAD_PORT_{p['Label']}": str(p["Value"]) for p in _ports({"TaskGroups": [group]})}
        meta = {f"NOMAD_META_{k}": str(v) for k, v in (job.get("Meta") or {}).items()}
        own = {
            "NOMAD_ALLOC_ID": alloc["ID"], "NOMAD_JOB_ID": job["ID"], "NOMAD_GROUP_NAME": group["Name"],
            "NOMAD_TASK_NAME": task["Name"], "NOMAD_NAMESPACE": alloc["Namespace"],
        }  # fmt: skip
        return {**self.environ, **own, **ports, **meta, **{k: str(v) for k, v in (task.get("Env") or {}).items()}}

    # -- running -----------------------------------------------------------------------------------------------------

    async def _run(self, job: Json, group: Json, alloc: Json, deployment: Json | None) -> None:
        tasks = self.tasks[alloc["ID"]]
        hooks = {t["Name"]: (t.get("Lifecycle") or {}).get("Hook") for t in group["Tasks"]}
        for name in [n for n, hook in hooks.items() if hook == "prestart"]:
            if not await self._prestart(alloc, name, tasks[name]):
                return
        mains = [n for n, hook in hooks.items() if not hook]
        for name in mains:
            try:
                await tasks[name].start()
            except OSError as e:
                await self._task_ended(alloc, name, 127, f"Driver Failure: {e.strerror}")
                return
            alloc["TaskStates"][name] = _task_state("running", _event("Started", "Task started by client"))
        alloc.update(ClientStatus="running", ClientDescription="Tasks are running")
        await self._alloc_event(alloc)
        if deployment is not None:
            good = not self.deployments_fail
            said = "Deployment completed successfully" if good else "Failed due to progress deadline"
            deployment.update(Status="successful" if good else "failed", StatusDescription=said)
            deployment["TaskGroups"][group["Name"]]["HealthyAllocs" if good else "UnhealthyAllocs"] = 1
            ids = [alloc["JobID"]]
            await self._event("Deployment", "DeploymentStatusUpdate", deployment["ID"], ids, {"Deployment": deployment})
        self._settle(alloc["JobID"])
        await asyncio.wait([asyncio.ensure_future(tasks[n].ended()) for n in mains], return_when="FIRST_COMPLETED")
        for name in mains:
            if tasks[name]._ended.done():
                await self._task_ended(alloc, name, await tasks[name].ended())

    async def _prestart(self, alloc: Json, name: str, task: Task) -> bool:
        await task.start()
        if task.pid is None:
            alloc["TaskStates"][name] = _task_state("dead", _event("Terminated", "Exit Code: 0"))
            return True
        code = await task.ended()
        if code:
            await self._task_ended(alloc, name, code)
        else:
            alloc["TaskStates"][name] = _task_state("dead", _event("Terminated", "Exit Code: 0"))
        return code == 0

    async def _task_ended(self, alloc: Json, name: str, code: int, said: str = "") -> None:
        if alloc["ClientStatus"] == "lost":
            return  # its node is down: nobody tells the servers
        wished = alloc["DesiredStatus"] == "stop"
        failed = code != 0 and not wished
        words = said or (f"Exit Code: {code}" if code >= 0 else f"Exit Code: {128 - code}, Signal: {-code}")
        state = _task_state("dead", _event("Terminated", words, code), failed=failed)
        alloc["TaskStates"][name] = state
        described = "Failed tasks" if failed else "All tasks have completed"
        alloc.update(ClientStatus="failed" if failed else "complete", ClientDescription=described)
        self._settle(alloc["JobID"])
        await self._alloc_event(alloc)

    def _stop_soon(self, alloc: Json, why: str) -> None:
        if alloc["ClientStatus"] in ENDED:
            return
        alloc.update(DesiredStatus="stop", DesiredDescription=why, ModifyIndex=self._next())
        self._soon(self._stop(alloc))

    async def _stop(self, alloc: Json) -> None:
        await self._alloc_event(alloc)
        job = self.jobs.get(alloc["JobID"], {})
        specs = {
            t["Name"]: t for g in job.get("TaskGroups") or () for t in g["Tasks"] if g["Name"] == alloc["TaskGroup"]
        }
        for name, task in self.tasks[alloc["ID"]].items():
            spec = specs.get(name, {})
            number = signal.Signals[spec.get("KillSignal") or "SIGINT"]
            await task.stop(number, (spec.get("KillTimeout") or 5_000_000_000) / 1e9)
        if alloc["ClientStatus"] == "pending":
            alloc.update(ClientStatus="complete", ClientDescription="All tasks have completed")
            await self._alloc_event(alloc)
        self._settle(alloc["JobID"])

    def _settle(self, job_id: str) -> None:
        """The job's own status, as Nomad derives it."""
        job = self.jobs.get(job_id)
        if job is None:
            return
        blocked = any(e["JobID"] == job_id and e["Status"] == "blocked" for e in self.evals.values())
        live = self.live(job_id)
        job["Status"] = "running" if live else "pending" if blocked and not job["Stop"] else "dead"

    # -- what befalls it ---------------------------------------------------------------------------------------------

    async def drain(self, *, end: bool = True) -> None:
        """The node is drained. ``end`` False: its allocations are only told that they will have to go."""
        self.draining = True
        for alloc in [a for a in self.allocs.values() if a["ClientStatus"] not in ENDED]:
            alloc["DesiredTransition"] = {**alloc["DesiredTransition"], "Migrate": True}
            if end:
                self._stop_soon(alloc, "alloc is being migrated")
            await self._alloc_event(alloc)
        if end:
            for job in [j for j in self.jobs.values() if not j["Stop"]]:
                await self._new_eval(job, "node-drain", Status="blocked", FailedTGAllocs=self._placement(job))

    async def lose(self, job_id: str) -> None:
        """The servers hear no more of the node. What runs there runs on."""
        self.down = True
        for alloc in self.live(job_id):
            alloc.update(ClientStatus="lost", ClientDescription="alloc is lost since its node is down")
            await self._alloc_event(alloc)
        self._settle(job_id)

    async def disconnect(self, job_id: str) -> None:
        for alloc in self.live(job_id):
            alloc.update(ClientStatus="unknown", ClientDescription="alloc is unknown since its node is disconnected")
            await self._alloc_event(alloc)

    async def reconnect(self, job_id: str) -> None:
        self.down = False
        for alloc in self.of_job(job_id):
            if alloc["ClientStatus"] in ("unknown", "lost"):
                alloc.update(ClientStatus="running", ClientDescription="Tasks are running")
                await self._alloc_event(alloc)
        self._settle(job_id)

    # -- events ------------------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self.index += 1
        return self.index

    async def _alloc_event(self, alloc: Json) -> None:
        alloc["ModifyIndex"] = self._next()
        await self._event("Allocation", "AllocationUpdated", alloc["ID"], [alloc["JobID"]], {"Allocation": alloc})

    async def _event(self, topic: str, kind: str, key: str, keys: list[str], payload: Json) -> None:
        event = {
            "Topic": topic, "Type": kind, "Key": key, "Namespace": "default", "FilterKeys": keys, "Index": self._next(),
            "Payload": copy.deepcopy(payload),
        }  # fmt: skip
        async with self._news:
            self.events.append(event)
            self._news.notify_all()

    async def follow(self, topics: Iterable[str], index: int, heartbeat_s: float) -> AsyncIterator[Json]:
        """Batches ({} for a heartbeat), those that the buffer still holds first."""
        wanted = [t.partition(":")[::2] for t in topics]
        seen = index
        yield {}
        while True:
            fresh = [e for e in self.events if e["Index"] > seen]
            for at, batch in itertools.groupby(fresh, key=lambda e: e["Index"]):
                seen = at
                if matching := [e for e in batch if _matches(e, wanted)]:
                    yield {"Index": at, "Events": matching}
            try:
                async with asyncio.timeout(heartbeat_s), self._news:
                    while not any(e["Index"] > seen for e in self.events):
                        await self._news.wait()
            except TimeoutError:
                yield {}

    # -- its own life ------------------------------------------------------------------------------------------------

    def _soon(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Kill every process that it started."""
        for tasks in self.tasks.values():
            for task in tasks.values():
                task.send(signal.SIGKILL)
        for job in list(self._background):
            job.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for tasks in self.tasks.values():
            for task in tasks.values():
                if task.pid is not None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(5):
                            await task.ended()


def _matches(event: Json, wanted: list[tuple[str, str]]) -> bool:
    if not wanted:
        return True
    keys = (event["Key"], *event["FilterKeys"], "*", "")
    return any(topic in (event["Topic"], "*") and key in keys for topic, key in wanted)


def _ports(job: Mapping[str, Any]) -> list[Json]:
    groups = job.get("TaskGroups") or ()
    return [p for g in groups for n in g.get("Networks") or () for p in n.get("ReservedPorts") or ()]


def _task_state(state: str, *events: Json, failed: bool = False) -> Json:
    return {
        "State": state, "Failed": failed, "Restarts": 0, "LastRestart": ZERO_TIME, "StartedAt": ZERO_TIME,
        "FinishedAt": ZERO_TIME, "Events": list(events), "Paused": "",
    }  # fmt: skip


def _event(kind: str, words: str, code: int = 0) -> Json:
    return {
        "Type": kind, "Time": time.time_ns(), "DisplayMessage": words, "Details": {}, "Message": "",
        "FailsTask": False, "ExitCode": code, "Signal": 0,
    }  # fmt: skip
