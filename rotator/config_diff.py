"""What a changed configuration file asks for: which engines it concerns, and what a running service takes as it is."""

from dataclasses import dataclass
from typing import Any

from rotator.config import EngineConfig, FleetConfig
from rotator.config_base import Section

# What the service is built around at its start: sockets, the ledger, the devices it watches.
_NEEDS_SERVICE_RESTART = (
    *("bind", "state_dir", "devices.gpus", "ledger", "webhooks", "watchdog.every_s", "page", "nomad", "http"),
    *("log", "telemetry"),
)
_UNSHOWN = ("keys",)  # digests of secrets: their names are shown, never their values


@dataclass(frozen=True, slots=True)
class Changes:
    """Engines by name; settings as one line each, ``place: old -> new``.

    An engine in none of the first three is left alone, whatever happens to the others. ``restart_needed`` are engines
    whose running process was started with something else: they go on as they are until they are next started.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    restart_needed: tuple[str, ...] = ()
    live_applied: tuple[str, ...] = ()
    service_restart_needed: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        return bool(self.lines())

    def lines(self) -> tuple[str, ...]:
        """One line a change, for an operator."""
        return (
            *(f"engine '{n}': added" for n in self.added),
            *(f"engine '{n}': removed" for n in self.removed),
            *(f"engine '{n}': started differently from now on; restart it to apply" for n in self.restart_needed),
            *(f"{line} (applied)" for line in self.live_applied),
            *(f"{line} (restart the service to apply)" for line in self.service_restart_needed),
        )


def describe_changes(old: FleetConfig, new: FleetConfig) -> Changes:
    """Compare two validated files. Pure; the order follows the files'."""
    before = {e.name: e for e in old.engines}
    after = {e.name: e for e in new.engines}
    kept = [(before[n], e) for n, e in after.items() if n in before]
    live = [line for pair in kept for line in _engine_lines(*pair)]
    held: list[str] = []
    for place, line in _setting_lines(old, new):
        needs_restart = any(place == p or place.startswith(f"{p}.") for p in _NEEDS_SERVICE_RESTART)
        (held if needs_restart else live).append(line)
    return Changes(
        added=tuple(n for n in after if n not in before),
        removed=tuple(n for n in before if n not in after),
        restart_needed=tuple(b.name for a, b in kept if a.spec_hash() != b.spec_hash()),
        live_applied=tuple(live),
        service_restart_needed=tuple(held),
    )


# Exactly what EngineConfig.spec_hash covers: these make an engine's process what it is.
_STARTED_WITH = frozenset({"launcher", "command", "env", "gpus", "workdir", "url", "port", "node", "job"})


def _engine_lines(old: EngineConfig, new: EngineConfig) -> list[str]:
    """What of an engine's section applies without touching its process."""
    changed = [f for f in EngineConfig.model_fields if getattr(old, f) != getattr(new, f)]
    return [
        f"engine '{new.name}'.{f}: {_shown(getattr(old, f))} -> {_shown(getattr(new, f))}"
        for f in changed
        if f not in _STARTED_WITH
    ]


def _setting_lines(old: Section, new: Section, prefix: str = "") -> list[tuple[str, str]]:
    """(place, line) for every setting outside the engines that differs."""
    found: list[tuple[str, str]] = []
    for field in type(new).model_fields:
        a, b = getattr(old, field), getattr(new, field)
        place = f"{prefix}{field}"
        if a == b or place == "engines":
            continue
        if isinstance(a, Section) and isinstance(b, Section):
            found += _setting_lines(a, b, f"{place}.")
        elif place in _UNSHOWN:
            found.append((place, f"{place}: {_names(a)} -> {_names(b)}"))
        else:
            found.append((place, f"{place}: {_shown(a)} -> {_shown(b)}"))
    return found


def _names(keys: Any) -> str:
    return ", ".join(key.name for key in keys) or "none"


def _shown(value: Any) -> str:
    match value:
        case None:
            return "unset"
        case Section():
            return value.model_dump_json(exclude_defaults=True)
        case tuple():
            return "[" + ", ".join(map(str, value)) + "]"
    return str(value)
