"""torch's allocator settings, as far as a region needs them: no expandable segments inside, all as before after it.

A pool with an allocator of its own and expandable segments do not go together: torch would map the segment itself and
never ask the pool's allocator (pytorch#147851). torch parses a settings string as a whole and resets every option that
the string lacks, so one option is changed by writing the whole string that is in force.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from allocator.errors import TorchUnsupported

# In the order in which torch looks at them.
ENVIRONMENT_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_OPTION = "expandable_segments"


def from_environment(environ: Mapping[str, str]) -> str:
    """The settings that the process was started with, or an empty string."""
    return next((environ[name] for name in ENVIRONMENT_NAMES if environ.get(name)), "")


def is_expandable(settings: str) -> bool:
    fields = (field.partition(":") for field in settings.split(","))
    return any(name.strip() == _OPTION and value.strip().lower() in ("true", "1") for name, _, value in fields)


def with_expandable(settings: str, enabled: bool) -> str:
    """`settings` with this one option changed and every other field as it was."""
    others = [field.strip() for field in settings.split(",") if field.strip()]
    kept = [field for field in others if field.partition(":")[0].strip() != _OPTION]
    return ",".join([*kept, f"{_OPTION}:{enabled}"])


class Settings:
    """What is in force in this process. Safe to use from several threads: the last region to end restores."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._lock = threading.Lock()
        self._regions = 0
        self._to_restore = ""

    @contextmanager
    def without_expandable_segments(self) -> Iterator[None]:
        """Raises TorchUnsupported when they are on and cannot be switched off."""
        with self._lock:
            if self._regions == 0:
                self._to_restore = self._switch_off()
            self._regions += 1
        try:
            yield
        finally:
            with self._lock:
                self._regions -= 1
                if self._regions == 0 and self._to_restore:
                    self._write(self._to_restore)

    def _switch_off(self) -> str:
        """The settings to restore; empty when there was nothing to switch off."""
        settings, enabled = self._in_force()
        if not enabled:
            return ""
        self._write(with_expandable(settings, enabled=False))
        if self._in_force()[1]:
            raise TorchUnsupported(
                "expandable segments stay on although torch was told to switch them off: start without "
                f"expandable_segments:True in {' and '.join(ENVIRONMENT_NAMES)}"
            )
        return with_expandable(settings, enabled=True)

    def _in_force(self) -> tuple[str, bool]:
        """The settings string, and whether expandable segments are on: as the allocator says, else the environment."""
        live = self._live()
        text = next((live[name] for name in ENVIRONMENT_NAMES if isinstance(live.get(name), str)), None)
        settings = from_environment(os.environ) if text is None else text
        state = live.get(_OPTION)
        return settings, bool(state) if state is not None else is_expandable(settings)

    def _live(self) -> Mapping[str, Any]:
        # A write at run time shows only here. The reader is private and its form has changed, hence the wide guard.
        try:
            settings = self._torch.cuda.memory._snapshot().get("allocator_settings")
        except (AttributeError, TypeError, RuntimeError):
            return {}
        return settings if isinstance(settings, Mapping) else {}

    def _write(self, settings: str) -> None:
        write = getattr(self._torch._C, "_accelerator_setAllocatorSettings", None)
        write = write or getattr(self._torch.cuda.memory, "_set_allocator_settings", None)
        if write is None:
            raise TorchUnsupported("expandable segments are on, and this torch has no call to switch them off")
        write(settings)
