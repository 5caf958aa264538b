"""A build that remembers what was read of it: those files, and no version, are what a bundle is for."""

from __future__ import annotations

from overlays.build import digest
from overlays.errors import SourceError
from overlays.sources import Source

# The files by which builds are told apart: what sleeping goes through. A build without any of them is no vLLM.
IDENTITY = (
    "vllm/device_allocator/__init__.py",
    "vllm/device_allocator/cumem.py",
    "vllm/v1/engine/core.py",
    "vllm/v1/executor/abstract.py",
    "vllm/v1/worker/gpu_model_runner.py",
    "vllm/v1/worker/gpu_worker.py",
    "vllm/v1/worker/worker_base.py",
)


class Recorder:
    """Hands on to a source and keeps what it answered. A file is read once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.seen: dict[str, bytes | None] = {}

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def version(self) -> str:
        return self._source.version

    def paths(self) -> tuple[str, ...]:
        return self._source.paths()

    def read(self, path: str) -> bytes | None:
        if path not in self.seen:
            self.seen[path] = self._source.read(path)
        return self.seen[path]

    def identity(self) -> str:
        """A hash over `IDENTITY`, the same whichever patches are chosen. Raises SourceError."""
        found = {path: data for path in IDENTITY if (data := self.read(path)) is not None}
        if not found:
            raise SourceError(f"{self.name} has none of the files by which a vLLM is known")
        return digest("".join(f"{path} {digest(data)}\n" for path, data in found.items()).encode())
