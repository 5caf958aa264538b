"""What the releases of vLLM do differently, as far as sleeping and waking go.

up to 0.16   /sleep ignores ``mode``: requests in flight are lost
from 0.17    ``mode=abort|wait|keep``; the ``scheduling`` tag resumes a paused scheduler
up to 0.23   any wake resumes the scheduler, also one of the weights alone: frozen requests would then run on
             memory that is not mapped, or on weights that are not loaded
from 0.24    a partial wake stays paused until every tag is awake
up to 0.31   /sleep and /wake_up answer with an empty body
from 0.32    they answer with a JSON body that says what became of the engine
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from rotator.core.values import Level

Release = tuple[int, int, int]

OLDEST_KNOWN: Release = (0, 19, 0)
NEWEST_KNOWN: Release = (0, 33, 0)
_MODE_SINCE: Release = (0, 17, 0)
_PARTIAL_WAKE_PAUSED_SINCE: Release = (0, 24, 0)
_VERSION = re.compile(r"^\s*v?(\d+)\.(\d+)(?:\.(\d+))?")


class Mode(StrEnum):
    """What a sleep does with requests in flight. vLLM's own default, abort, is only ever an operator's force."""

    KEEP = "keep"
    WAIT = "wait"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to speak to one release. ``note`` says, in words, what about the version needs an operator's eye."""

    version: str
    knows_mode: bool
    partial_wake_stays_paused: bool
    note: str = ""

    def sleep_mode(self, level: Level, *, abort: bool) -> Mode:
        """The mode to ask for. Before 0.24 a level-2 wake resumes before the weights are back: nothing may be frozen
        over it, so requests in flight finish first."""
        if abort:
            return Mode.ABORT
        if level is Level.DISCARD and not self.partial_wake_stays_paused:
            return Mode.WAIT
        return Mode.KEEP


def parse_release(version: str) -> Release | None:
    """``0.26.1.dev3+g12ab`` -> (0, 26, 1). None where it tells nothing: a fork's own words, or ``0.1.dev…``, which is
    what a build from a source tree without tags calls itself."""
    found = _VERSION.match(version)
    if found is None:
        return None
    major, minor, patch = (int(part or 0) for part in found.groups())
    return None if (major, minor) < (0, 2) else (major, minor, patch)


def dialect_of(version: str) -> Dialect:
    """The dialect of a version as /version gives it. One that cannot be parsed is spoken to as the newest release is,
    but nothing is taken for granted that could lose a stream."""
    release = parse_release(version)
    if release is None:
        note = f"version '{version}' tells no release: streams are not frozen on it, and it is woken whole"
        return Dialect(version, knows_mode=False, partial_wake_stays_paused=False, note=note)
    note = ""
    if release < OLDEST_KNOWN:
        note = f"version {version} is older than 0.19, the oldest that is known to work"
    elif release[:2] > NEWEST_KNOWN[:2]:
        note = f"version {version} is newer than 0.33, the newest that is known: spoken to as 0.33"
    return Dialect(version, release >= _MODE_SINCE, release >= _PARTIAL_WAKE_PAUSED_SINCE, note)
