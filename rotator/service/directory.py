"""The gateway's view of the fleet: which engine is behind a name, and where it listens."""

from collections.abc import Iterable, Sequence

from rotator.core.lifecycle import is_live
from rotator.core.values import EngineName, State
from rotator.service.fleet import Fleet
from rotator.service.records import EngineRuntime
from rotator.service.routes import Target


class FleetDirectory:
    """Reads the fleet in place: single look-ups in the event loop's thread, between two steps of the loop's task."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def resolve(self, model: str) -> Target | None:
        name = self._fleet.names.get(model)
        return None if name is None else _target(self._fleet.engines[name], model)

    def targets(self) -> Iterable[Target]:
        return [_target(self._fleet.engines[engine], name) for name, engine in self._fleet.names.items()]

    def state(self, engine: EngineName) -> str:
        runtime = self._fleet.engines.get(engine)
        return runtime.state.value if runtime else "unknown"

    def running(self) -> Sequence[Target]:
        """STARTING engines do not answer yet, and STOPPING ones not any more."""
        return [
            _target(e, e.name)
            for e in self._fleet.engines.values()
            if is_live(e.state) and e.state not in (State.STARTING, State.STOPPING)
        ]


def _target(engine: EngineRuntime, requested: str) -> Target:
    config = engine.config
    return Target(engine.name, engine.url, config.model, requested, config.overrides, config.fallback)
