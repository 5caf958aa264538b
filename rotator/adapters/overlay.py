"""Asks an engine's workers which vLLM files they run, and holds that to the manifest of its overlay bundle.

The manifest's shape is that of `docs/overlays.md`: `files`, each with `path`, `sha256` and `body_sha256`.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rotator.config import EngineConfig
from rotator.core.overlay import BundledFile, RunFile, strangers
from rotator.ports import EngineRefused

_ASK_S = 30.0  # workers hash a few files
_QUOTED_MAX = 4  # differences; one is enough to know


class Workers(Protocol):
    async def attest(self, url: str, paths: Sequence[str], *, deadline_s: float) -> Sequence[Any]:
        """Each rank's answer as it came. Raises EngineError."""
        ...


class OverlayCheck:
    """See ``rotator.service.world.OverlayCheck``."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    async def __call__(self, engine: EngineConfig, url: str) -> str | None:
        if engine.overlay_manifest is None:
            return None
        try:
            bundle = await asyncio.to_thread(read_manifest, engine.overlay_manifest)
        except ValueError as error:
            return str(error)
        try:
            answers = await self._workers.attest(url, [item.path for item in bundle], deadline_s=_ASK_S)
        except EngineRefused as error:
            return f"its workers cannot tell which files they run: the overlay is not mounted where they load: {error}"
        ranks = [_run_files(answer) for answer in answers]
        found = strangers(bundle, ranks) if ranks else ("no rank answered",)
        if not found:
            return None
        more = f"; and {len(found) - _QUOTED_MAX} more" if len(found) > _QUOTED_MAX else ""
        return f"it does not run the overlay {engine.overlay_manifest}: {'; '.join(found[:_QUOTED_MAX])}{more}"


def read_manifest(path: Path) -> tuple[BundledFile, ...]:
    """Raises ValueError with what an operator has to do."""
    try:
        facts = json.loads(path.read_bytes())
        files = tuple(BundledFile(f["path"], f["sha256"], f["body_sha256"]) for f in facts["files"])
    except OSError as error:
        raise ValueError(f"cannot read overlay_manifest {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"overlay_manifest {path} is no manifest of an overlay bundle") from None
    if facts.get("format") != 1:
        raise ValueError(f"overlay_manifest {path} has format {facts.get('format')}, and only 1 is known")
    return files


def _run_files(answer: Any) -> tuple[RunFile, ...]:
    """What one rank told, of what it told in the right shape."""
    told = answer.get("files") if isinstance(answer, dict) else None
    entries = [entry for entry in told if isinstance(entry, dict)] if isinstance(told, list) else []
    return tuple(
        RunFile(
            path=str(entry.get("path")),
            file=str(entry.get("file") or ""),
            sha256=str(entry.get("sha256") or ""),
            loaded="loaded" in entry,
            mark=entry.get("loaded"),
        )
        for entry in entries
    )
