"""Which of vLLM's files this process runs: for a worker's answer to a service, or by hand inside a container.

    python attest.py vllm/device_allocator/cumem.py ...

prints the same JSON. Stands alone: it runs where nothing else of this project is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from typing import Any

PATHS_MAX = 256


def attest(paths: list[str]) -> dict[str, Any]:
    """For each module path ("vllm/device_allocator/cumem.py"): the file, its SHA-256, and the mark of the loaded code.

    `loaded` is the `__overlay__` of the module as it runs here, null if it carries none, and absent if this process has
    not imported it: then `file` is what it would import.
    """
    if len(paths) > PATHS_MAX:
        raise ValueError(f"more than {PATHS_MAX} paths")
    return {"pid": os.getpid(), "files": [_one(path) for path in paths]}


def _one(path: str) -> dict[str, Any]:
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None) if module is not None else _would_load(name)
    answer: dict[str, Any] = {"path": path, "file": file, "sha256": None}
    if module is not None:
        answer["loaded"] = getattr(module, "__overlay__", None)
    if file is not None:
        try:
            with open(file, "rb") as opened:
                answer["sha256"] = hashlib.sha256(opened.read()).hexdigest()
        except OSError as error:
            answer["error"] = str(error)
    return answer


def _would_load(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return spec.origin if spec is not None else None


if __name__ == "__main__":
    print(json.dumps(attest(sys.argv[1:]), indent=2))
