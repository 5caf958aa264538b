"""Engines as Nomad jobs: parsed, planned, registered against what is there, followed, stopped, found again.

Nomad only places and ends. Whether an engine runs, comes back after a crash, or serves is the service's business: its
jobs neither restart nor reschedule, and what Nomad does not know (it is down, it lost a node) is never read as an exit.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rotator.adapters import cudalog
from rotator.adapters.nomad_access import access_of
from rotator.adapters.nomad_client import Json, NomadClient
from rotator.adapters.nomad_files import JobText, Render, keep_log, read_job
from rotator.adapters.nomad_job import (
    Life,
    Verdict,
    engine_tasks,
    is_live,
    job_problems,
    judge,
    marked,
    stranger,
)
from rotator.adapters.nomad_nodes import Agents, check_nodes
from rotator.adapters.nomad_notes import Notes
from rotator.adapters.nomad_pids import AllocationProcesses
from rotator.adapters.nomad_presence import NomadRef, Presence, ref_of
from rotator.adapters.nomad_watch import Follower, NomadWatch
from rotator.adapters.nomad_words import META_LAUNCH, placement_words, short_id
from rotator.config_nomad import NomadConfig
from rotator.core.values import EngineName
from rotator.ports import Handle, LauncherAway, LauncherNews, LaunchError, LaunchSpec

LAUNCHER = "nomad"

AGAIN_S = 2.0  # between questions that Nomad did not answer, and looks at what it lost sight of
LOOKS_MAX = 3  # so often nothing is left of an engine that Nomad lost before it counts as gone
STOP_MARGIN_S = 150.0  # beyond the grace: kill timeouts and the gate that waits for VRAM after the end
POLL_S = 0.1


class NomadLauncher:
    """A Launcher for one event loop; ``connect`` makes one. ``service_id`` marks its jobs."""

    def __init__(
        self,
        client: NomadClient,
        watch: NomadWatch,
        notes: Notes,
        service_id: str,
        *,
        render: Render,
        agents: Agents | None = None,
        processes: AllocationProcesses | None = None,
        place_deadline_s: float = 60.0,
        resync_s: float = 30.0,
    ) -> None:
        self._client = client
        self._watch = watch
        self._notes = notes
        self._service_id = service_id
        self._render = render
        self._agents = agents
        self._presence = Presence(agents, processes or AllocationProcesses())
        self._place_deadline_s = place_deadline_s
        self._resync_s = resync_s
        self._specs: dict[EngineName, LaunchSpec] = {}
        self._parsed: dict[EngineName, tuple[JobText, Json]] = {}
        self._kept: dict[EngineName, str] = {}  # what was last copied of its log

    async def close(self) -> None:
        await self._watch.close()
        await self._client.close()

    # -- start -------------------------------------------------------------------------------------------------------

    async def start(self, spec: LaunchSpec) -> Handle:
        text, job = await self._job_of(spec)
        if problems := job_problems(job, port=_port(spec)):
            raise LaunchError(f"engine '{spec.engine}', job '{job['ID']}': {'; '.join(problems)}")
        await self._must_be_free(spec, str(job["ID"]))
        await check_nodes(self._agents, spec.engine, str(job["ID"]), spec.nodes)
        launch = secrets.token_hex(6)
        job = marked(job, engine=spec.engine, service=self._service_id, launch=launch)
        planned = await self._client.plan(job)
        if planned.failed:
            raise LaunchError(f"engine '{spec.engine}': Nomad has no place for it: {placement_words(planned.failed)}")
        with self._watch.following(str(job["ID"])) as follower:
            done = await self._client.register(
                job, modify_index=planned.job_modify_index, source=text.hcl, variables=text.variables
            )
            allocs = await self._placed(spec, job, done.eval_id, follower)
        return self._handle(spec, job, launch, allocs)

    async def _job_of(self, spec: LaunchSpec) -> tuple[JobText, Json]:
        """Its job, as its file is now. Nomad parses each text once."""
        text, ours = await read_job(spec, self._render), self._client.access.namespace
        known = self._parsed.get(spec.engine)
        if known is None or known[0] != text:
            job = await self._client.parse(text.hcl, text.variables)
            if (namespace := job.get("Namespace") or ours) != ours:
                raise LaunchError(
                    f"engine '{spec.engine}': its job is for namespace '{namespace}', and nomad.namespace is '{ours}': "
                    "make them equal"
                )
            known = self._parsed[spec.engine] = text, job
        self._specs[spec.engine] = spec
        return known

    async def _must_be_free(self, spec: LaunchSpec, job_id: str) -> None:
        registered = await self._client.job(job_id)
        is_over = registered is None or registered.get("Status") == "dead"
        if not is_over and (whose := stranger(registered or {}, engine=spec.engine, service=self._service_id)):
            raise LaunchError(f"engine '{spec.engine}': {whose}")
        if running := [a for a in await self._client.allocations(job_id) if is_live(a)]:
            names = ", ".join(map(short_id, running))
            raise LaunchError(
                f"engine '{spec.engine}': job '{job_id}' has allocation {names} already: it is ended first"
            )

    async def _placed(self, spec: LaunchSpec, job: Json, eval_id: str, follower: Follower) -> tuple[Json, ...]:
        """Its allocations, once Nomad has placed it. Where it does not, the job is taken back: a place found later
        would start an engine that nobody waits for."""
        job_id, wanted = str(job["ID"]), len(job["TaskGroups"])
        give_up_at_s = asyncio.get_running_loop().time() + self._place_deadline_s
        why = "it did not say why"
        while asyncio.get_running_loop().time() < give_up_at_s:
            with contextlib.suppress(LauncherAway):
                allocs = tuple(a for a in await self._client.allocations(job_id) if a.get("EvalID") == eval_id)
                if len(allocs) >= wanted:
                    return allocs
                evaluation = await self._client.evaluation(eval_id) or {}
                if failed := evaluation.get("FailedTGAllocs"):
                    why = placement_words(failed)
                    break
                if evaluation.get("Status") in ("failed", "canceled"):
                    why = f"its evaluation is {evaluation['Status']}: {evaluation.get('StatusDescription', '')}"
                    break
            await follower.changed(within_s=1.0)
        await self._client.stop_job(job_id)
        raise LaunchError(f"engine '{spec.engine}': Nomad has not placed job '{job_id}': {why}")

    def _handle(self, spec: LaunchSpec, job: Json, launch: str, allocs: Iterable[Json]) -> Handle:
        tasks = engine_tasks(job, spec.job.task if spec.job else "")
        mine = sorted((a for a in allocs if a.get("TaskGroup") in tasks), key=lambda a: str(a["Name"]))
        ref = NomadRef(
            str(job["ID"]),
            tuple(str(a["ID"]) for a in mine),
            tuple(tasks[str(a["TaskGroup"])] for a in mine),
            launch,
            _port(spec) if not any(spec.nodes) else 0,
            tuple(spec.nodes),
            spec.log_path,
        )
        return Handle(
            spec.engine, LAUNCHER, spec.url, {**asdict(ref), "allocs": list(ref.allocs), "tasks": list(ref.tasks)}
        )

    # -- find --------------------------------------------------------------------------------------------------------

    async def find(self, spec: LaunchSpec, ref: Mapping[str, Any] | None) -> Handle | None:
        known = NomadRef.of(ref)
        try:
            return await self._find(spec, known)
        except LauncherAway:
            # Nomad's being away is no reason to let go of an engine that is known, and is there.
            if known is None or not known.allocs or not await self._presence.is_there(spec.engine, known):
                raise
            self._specs[spec.engine] = spec
            return Handle(spec.engine, LAUNCHER, spec.url, dict(ref or {}))

    async def _find(self, spec: LaunchSpec, known: NomadRef | None) -> Handle | None:
        wanted: Json | None = None
        if spec.job is not None:
            _, wanted = await self._job_of(spec)
            job_id = str(wanted["ID"])
        elif known is not None:
            job_id = known.job_id
        else:
            return None
        registered = await self._client.job(job_id)
        allocs = await self._client.allocations(job_id)
        live = [a for a in allocs if is_live(a) or await self._is_lost_and_there(spec, a)]
        waits = registered is not None and not registered.get("Stop") and registered.get("Status") != "dead"
        if not (live or waits):
            return None
        registered = registered or wanted
        if registered is None:
            return None  # Nomad is ending what is left of a job that was purged
        if whose := stranger(registered, engine=spec.engine, service=self._service_id):
            raise LaunchError(f"engine '{spec.engine}': {whose}")
        launch = str((registered.get("Meta") or {}).get(META_LAUNCH) or "")
        return self._handle(spec, registered, launch, live)

    async def _is_lost_and_there(self, spec: LaunchSpec, alloc: Json) -> bool:
        if alloc.get("ClientStatus") != "lost":
            return False
        return bool(await self._presence.local(spec.engine, frozenset({str(alloc["ID"])})))

    # -- watching ----------------------------------------------------------------------------------------------------

    async def is_alive(self, handle: Handle) -> bool:
        """False once Nomad saw it end. No answer says nothing: it counts as alive."""
        ref = ref_of(handle)
        try:
            verdict = judge(await self._client.allocations(ref.job_id), ref.allocs)
        except LaunchError:
            return True
        return verdict.life is not Life.ENDED

    async def wait_exit(self, handle: Handle) -> str:
        ref = ref_of(handle)
        misses = 0
        with self._watch.following(ref.job_id) as follower, self._notes.about(handle.engine):
            while True:
                verdict = await self._verdict(ref)
                if verdict.life is Life.ENDED:
                    break
                missing = verdict.life is Life.UNCERTAIN and not await self._presence.is_there(handle.engine, ref)
                misses = misses + 1 if missing else 0
                if misses >= LOOKS_MAX:
                    verdict = Verdict(Life.ENDED, f"{verdict.words}, and nothing of it answers")
                    break
                await self._note(handle, ref, verdict)
                again_s = AGAIN_S if verdict.life is Life.UNCERTAIN else self._resync_s
                await follower.changed(within_s=again_s)
        told = await self.evidence(handle)
        return f"{verdict.words}; {told}" if told else verdict.words

    async def _verdict(self, ref: NomadRef) -> Verdict:
        """What Nomad says of it, as soon as it says anything. Its silence is told by the client, once."""
        while True:
            try:
                return judge(await self._client.allocations(ref.job_id), ref.allocs)
            except LaunchError:
                await asyncio.sleep(AGAIN_S)

    async def _note(self, handle: Handle, ref: NomadRef, verdict: Verdict) -> None:
        serves = " (it serves on)" if verdict.life is Life.UNCERTAIN else ""
        self._notes.tell(handle.engine, "node", "nomad.allocation", f"{verdict.words}{serves}" if verdict.words else "")
        with contextlib.suppress(LaunchError):
            await self._notes.look_at_deployment(handle.engine, ref.job_id)
            if (spec := self._specs.get(handle.engine)) and spec.job is not None:
                await self._notes.look_for_drift(handle.engine, ref.job_id, lambda: self._job_of(spec))
            self._notes.tell(handle.engine, "log", "engine.cuda_error", await self._cuda_errors(ref))

    async def _cuda_errors(self, ref: NomadRef) -> str:
        return " | ".join(error for text in await self._logs(ref) for error in cudalog.cuda_errors(text))

    async def _logs(self, ref: NomadRef) -> list[str]:
        """Of every rank: what it printed, then its errors."""
        texts = []
        for alloc, task in zip(ref.allocs, ref.tasks, strict=False):
            printed = await self._client.logs(alloc, task, "stdout")
            texts.append(printed + await self._client.logs(alloc, task, "stderr"))
        return texts

    async def evidence(self, handle: Handle) -> str:
        ref = ref_of(handle)
        try:
            texts = await self._logs(ref)
        except LaunchError:
            return ""
        whole = "\n".join(texts)
        if ref.log_path and whole.strip() and self._kept.get(handle.engine) != whole:
            self._kept[handle.engine] = whole
            await asyncio.to_thread(keep_log, Path(ref.log_path), whole, ref.allocs)
        return "; ".join(found for text in texts if (found := cudalog.evidence(text)))

    async def pids(self, handle: Handle) -> frozenset[int]:
        return await self._presence.pids(handle.engine, ref_of(handle))

    # -- stop --------------------------------------------------------------------------------------------------------

    async def stop(self, handle: Handle, *, grace_s: float) -> None:
        ref = ref_of(handle)
        if grace_s <= 0:
            await self._kill(ref)
        await self._client.stop_job(ref.job_id)
        clock = asyncio.get_running_loop().time
        kill_at_s = clock() + max(0.0, grace_s)
        give_up_at_s, killed = kill_at_s + STOP_MARGIN_S, grace_s <= 0
        allocs = set(ref.allocs)
        with self._watch.following(ref.job_id) as follower:
            while live := [a for a in await self._client.allocations(ref.job_id) if is_live(a)]:
                allocs.update(str(a["ID"]) for a in live)
                if not killed and clock() >= kill_at_s:
                    killed = True
                    await self._kill(ref)
                if clock() >= give_up_at_s:
                    said = ", ".join(f"{short_id(a)} ({a.get('ClientStatus')}, on {a.get('NodeName')})" for a in live)
                    raise LaunchError(f"engine '{handle.engine}': Nomad has not ended allocation {said}")
                await follower.changed(within_s=min(1.0, max(POLL_S, kill_at_s - clock())))
        await self._presence.end(handle.engine, ref, frozenset(allocs))

    async def _kill(self, ref: NomadRef) -> None:
        """SIGKILL to its own tasks at once, not to what waits for its VRAM afterwards. Deregistering does the rest, and
        also ends one that could not be signalled."""
        for alloc in await self._client.allocations(ref.job_id):
            states = alloc.get("TaskStates") or {}
            for task in set(ref.tasks) & {name for name, state in states.items() if state.get("State") == "running"}:
                with contextlib.suppress(LaunchError):
                    await self._client.signal(str(alloc["ID"]), "SIGKILL", task)


def connect(
    config: NomadConfig,
    environ: Mapping[str, str],
    service_id: str,
    *,
    told: Callable[[LauncherNews], None],
    render: Render,
    agents: Agents | None = None,
) -> NomadLauncher:
    """A launcher for this Nomad; asks it nothing yet. Raises LaunchError for an address or a file that cannot be."""
    access = access_of(config, environ)
    access.ssl_context()
    notes = Notes(told)
    client = NomadClient(access, deadline_s=config.deadline_s, heard=notes.heard)
    notes.attach(client)
    watch = NomadWatch(access, notes.stream_broken)
    notes.back = watch.hurry
    return NomadLauncher(
        client,
        watch,
        notes,
        service_id,
        render=render,
        agents=agents,
        place_deadline_s=config.place_deadline_s,
        resync_s=config.resync_s,
    )


def _port(spec: LaunchSpec) -> int:
    """On which it listens, on its own machine."""
    return spec.port or urlsplit(spec.url).port or 0
