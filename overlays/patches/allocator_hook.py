"""The line that lets the rotator's allocator into releases whose plugins do not reach the allocator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from overlays.patch import Files, Patch, Verdict, bug, fixed
from overlays.patches._cumem import CUMEM, Rig


def edit(files: Files) -> None:
    files.source("cumem").append("""

from allocator.vllm.overlay import take_over

take_over(globals())
""")


def probe(files: Files) -> Verdict:
    taken: list[dict[str, Any]] = []
    Rig(files, {"allocator.vllm.overlay": SimpleNamespace(take_over=taken.append)})
    if not taken:
        return bug("nothing lets another allocator in")
    stock = taken[0].get("CuMemAllocator")
    if len(taken) > 1 or not (hasattr(stock, "get_instance") and hasattr(stock, "instance")):
        return bug("the allocator is offered something else than this file's CuMemAllocator")
    return fixed("the allocator is offered this file's CuMemAllocator, once")


PATCH = Patch(
    name="allocator-hook",
    targets={"cumem": CUMEM},
    releases=">=0.19.1,<0.26",
    why="these releases have no plugin that reaches the allocator",
    drop_when="no release before 0.25.1 is in use: from there on the plugin does it",
    upstream=(),
    required=False,
    opt_in=True,  # the engine cannot start where `allocator` is not installed
    edit=edit,
    probe=probe,
    after=("stream-aware-free", "transactional-wake", "driver-state"),
)
__all__ = ["PATCH"]
