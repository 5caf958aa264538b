"""The fleet file as it stands now: people edit it, and a service reads it at its start and at a reload."""

from dataclasses import replace

from rotator.config import ConfigError, FleetConfig
from rotator.sim.faults.fleet import fleet_config
from rotator.sim.faults.script import Edit
from rotator.sim.faults.shape import EngineShape, Shape


class FleetFile:
    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._engines = {e.name: e for e in shape.engines}
        self._away: set[str] = set()
        self._broken = False
        self._read: FleetConfig | None = None

    def read(self) -> FleetConfig:
        """Raises ConfigError while somebody has broken it."""
        if self._broken:
            raise ConfigError(["engines: this is no list: mend it"])
        if self._read is None:
            kept = tuple(e for e in self._engines.values() if e.name not in self._away)
            self._read = fleet_config(replace(self._shape, engines=kept))
        return self._read

    def edit(self, edit: Edit) -> None:
        """The last engine stays: a file without any is refused like a broken one."""
        self._read, self._broken = None, edit.how == "break"
        match edit.how:
            case "remove" if len(self._away | {edit.engine}) < len(self._engines):
                self._away.add(edit.engine)
            case "add":
                self._away.discard(edit.engine)
            case "calendar":
                self._shape = replace(self._shape, windows=())
            case "idle":
                self._shape = replace(self._shape, idle_sleep_s=None if self._shape.idle_sleep_s else 9.0)
            case "command" | "pin" | "unpin" | "priority" | "levels":
                self._engines[edit.engine] = _changed(self._engines[edit.engine], edit.how)

    def mend(self) -> None:
        """Whoever broke it or took engines out has put that right."""
        self._read, self._broken = None, False
        self._away.clear()


def _changed(engine: EngineShape, how: str) -> EngineShape:
    match how:
        case "command":  # it runs with another one until it is next started
            return replace(engine, revision=engine.revision + 1)
        case "pin" | "unpin":
            return replace(engine, pin=how == "pin")
        case "priority":
            return replace(engine, priority=1 - engine.priority)
    return replace(engine, levels=(2,) if engine.levels[0] == 1 else (1,))
