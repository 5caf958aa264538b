"""What is worth knowing and changes no engine's state: Nomad is away, a job has drifted, a node is drained."""

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from rotator.adapters.nomad_client import NomadClient
from rotator.adapters.nomad_files import JobText
from rotator.adapters.nomad_job import marked_like
from rotator.adapters.nomad_words import diff_lines
from rotator.core.values import EngineName
from rotator.ports import LauncherAway, LauncherNews, LaunchError

LAUNCHER = "nomad"
DRIFT_LINES = 8

JobOf = Callable[[], Awaitable[tuple[JobText, dict[str, Any]]]]


class Notes:
    """Tells each thing once, when it begins, changes, and is over."""

    def __init__(self, told: Callable[[LauncherNews], None]) -> None:
        self._told = told
        self._standing: dict[tuple[EngineName | None, str], LauncherNews] = {}
        self._checked: dict[EngineName, tuple[int, JobText]] = {}
        self._deployed: dict[EngineName, str] = {}
        self._client: NomadClient | None = None
        self.back: Callable[[], None] = lambda: None  # Nomad answers again

    def attach(self, client: NomadClient) -> None:
        self._client = client

    def tell(self, engine: EngineName | None, topic: str, kind: str, text: str) -> None:
        """``text`` stands from now on; empty: nothing is to be said of ``topic`` any more."""
        key = engine, topic
        standing = self._standing.get(key)
        if text and (standing is None or standing.text != text):
            self._standing[key] = LauncherNews(LAUNCHER, engine, topic, kind, text)
            self._told(self._standing[key])
        elif not text and standing is not None:
            del self._standing[key]
            self._told(
                LauncherNews(LAUNCHER, engine, topic, f"{standing.kind}_over", f"over: {standing.text}", over=True)
            )

    def heard(self, away: LauncherAway | None) -> None:
        """After each call to Nomad. The words are by kind, not by call: else each call would be news."""
        standing = self._standing.get((None, "away"))
        if away is None:
            self.tell(None, "away", "", "")
            if standing is not None:
                self.back()
        elif standing is None or standing.kind != f"nomad.{away.kind}":
            self.tell(
                None, "away", f"nomad.{away.kind}", f"{away}. Engines that serve go on; none can be started or stopped"
            )

    def stream_broken(self, error: LaunchError | None) -> None:
        """Lists still tell, only later. Where nothing answers, that is told by ``heard``."""
        text = f"{error}: allocations are listed from time to time instead" if error is not None else ""
        self.tell(None, "stream", "nomad.stream", text)

    @contextlib.contextmanager
    def about(self, engine: EngineName) -> Iterator[None]:
        """What was said of an engine's allocation is over with it."""
        try:
            yield
        finally:
            self._checked.pop(engine, None)
            self._deployed.pop(engine, None)
            for _, topic in [key for key in self._standing if key[0] == engine]:
                self.tell(engine, topic, "", "")

    async def look_at_deployment(self, engine: EngineName, job_id: str) -> None:
        """Raises LaunchError. A deployment that ended well is not asked for again."""
        if self._client is None or self._deployed.get(engine) == "successful":
            return
        deployment: Mapping[str, Any] = await self._client.deployment(job_id) or {}
        status = self._deployed[engine] = str(deployment.get("Status") or "")
        bad = status in ("failed", "paused", "cancelled", "blocked")
        words = f"Nomad's deployment is {status}: {deployment.get('StatusDescription') or 'it does not say why'}"
        self.tell(engine, "deployment", "nomad.deployment", words if bad else "")

    async def look_for_drift(self, engine: EngineName, job_id: str, job_of: JobOf) -> None:
        """Compare what is registered with what the fleet file says now. Asks for a plan only where either has changed.
        Raises LaunchError."""
        if self._client is None:
            return
        registered = await self._client.job(job_id)
        if registered is None or registered.get("Stop"):
            return
        try:
            text, job = await job_of()
        except LauncherAway:
            raise
        except LaunchError as e:
            self.tell(engine, "drift", "nomad.drift", f"nobody can say whether it drifted: {e}")
            return
        seen = int(registered.get("JobModifyIndex") or 0), text
        if self._checked.get(engine) == seen:
            return
        planned = await self._client.plan(marked_like(job, registered))
        self._checked[engine] = seen
        lines = diff_lines(planned.diff) if planned.changed else ()
        words = "; ".join(lines[:DRIFT_LINES])
        more = f" and {len(lines) - DRIFT_LINES} more" if len(lines) > DRIFT_LINES else ""
        said = f"its registered job differs from what the fleet file says (old -> new): {words}{more}"
        self.tell(engine, "drift", "nomad.drift", said if lines else "")
