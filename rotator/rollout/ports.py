"""What a rollout needs of the world, as Protocols. Whoever implements them raises only what is here."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rotator.ports import RotatorError
from rotator.rollout.judge import Version


class RolloutError(RotatorError):
    """A rollout cannot go on, or cannot begin: what, and what to do."""


class Away(RolloutError):
    """Service or Nomad does not answer: it says nothing about the engine, and the step is tried again."""


class StepFailed(RolloutError):
    """A step came to a bad end; the text has the evidence, ``facts`` the numbers."""

    def __init__(self, words: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(words)
        self.facts = dict(facts or {})


class Refused(RolloutError):
    """The service would not, or could not do what it was told. What to make of it depends on the engine's state."""


class Service(Protocol):
    """The running service's REST API. Every method raises Away; those that command also raise Refused."""

    def look(self) -> None:
        """Return if it is ready to be commanded."""
        ...

    def engine(self, name: str) -> Mapping[str, Any]: ...
    def gpus(self) -> Sequence[Mapping[str, Any]]: ...

    def started_as(self, engine: str) -> str:
        """The spec hash of what was last started, by the ledger."""
        ...

    def last_stop(self, engine: str) -> Mapping[str, Any] | None:
        """The newest transition 'stop' of the journal."""
        ...

    def wake(self, engine: str, *, deadline_s: float) -> None: ...
    def sleep(self, engine: str, *, deadline_s: float) -> None: ...
    def start(self, engine: str, *, deadline_s: float) -> None: ...
    def stop(self, engine: str, *, deadline_s: float) -> None: ...
    def release(self, engine: str) -> None: ...
    def reload(self) -> tuple[str, ...]: ...
    def cordon(self, gpu: str, reason: str | None) -> None:
        """None lets work on it again."""
        ...

    def ask(self, engine: str, prompts: Sequence[str], *, tokens: int, deadline_s: float) -> list[str]:
        """The answers to prompts that are all asked at once."""
        ...

    def pace(self, engine: str, *, tokens: int, deadline_s: float) -> tuple[float, float]:
        """(tokens a second, seconds to the first) of one streamed answer through the gateway."""
        ...


class Fleet(Protocol):
    """The fleet file and what is known by it."""

    def read(self) -> str: ...

    def write(self, text: str) -> None:
        """Whole or not at all. Raises RolloutError."""
        ...

    def version(self, text: str, engine: str, vllm: str) -> Version:
        """What the engine is by this text of the file; ``vllm`` as the running engine tells it. Raises RolloutError."""
        ...

    def start_deadline_s(self, engine: str) -> float: ...

    def nomad_away(self, engine: str) -> str:
        """Why Nomad cannot be asked to start or stop this engine, '' where it can or takes no part."""
        ...


class Baselines(Protocol):
    """What was measured of an engine's versions, in the ledger. Raises Away where the ledger cannot be reached."""

    def get(self, engine: str, version: str) -> Mapping[str, Any] | None: ...
    def put(self, engine: str, version: Version, facts: Mapping[str, Any]) -> None: ...


class Environments(Protocol):
    """Python environments of engines without images. Every method raises StepFailed."""

    def archive(self, engine: str) -> Mapping[str, Any]:
        """Keep it whole; returns the archive's ``name``."""
        ...

    def install(self, engine: str) -> Mapping[str, Any]: ...
    def restore(self, engine: str, name: str) -> Mapping[str, Any]: ...


class Clock(Protocol):
    def now_s(self) -> float: ...
    def wall_s(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...
