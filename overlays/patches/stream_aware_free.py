"""A free waits for the kernels that still use the memory, before it is unmapped (vLLM #43020)."""

from __future__ import annotations

import ast

from overlays.errors import ShapeUnknown
from overlays.patch import Files, Patch, Target, Verdict, bug, fixed
from overlays.patches._cumem import CUMEM, Rig
from overlays.source import Function, Source


def edit(files: Files) -> None:
    source = files.source("cumem")
    function = source.function("CuMemAllocator._python_free_callback")
    source.insert_after(
        looked_up(source, function),
        """
        # The C side unmaps as soon as this returns, whatever the device still runs on it.
        torch.cuda.synchronize(data.handle[0])
        """,
    )


def looked_up(source: Source, function: Function) -> ast.Assign:
    """The statement that takes the record out of the table; what is freed is known from there on."""
    for statement in function.body:
        if isinstance(statement, ast.Assign) and "pointer_to_data.pop(" in source.text_of(statement):
            return statement
    raise ShapeUnknown(f"{source.path}: the free callback does not take its record out of pointer_to_data")


def probe(files: Files) -> Verdict:
    rig = Rig(files)
    block = rig.allocate("weights", size=4096)
    rig.order.clear()
    rig.free(block)
    if "unmap" not in rig.order:
        return bug(f"a free unmapped nothing: {rig.order}")
    if "synchronize" not in rig.order[: rig.order.index("unmap")]:
        return bug(f"a free unmaps without waiting for the device: {rig.order}")
    return fixed("a free waits for the device before it unmaps")


PATCH = Patch(
    name="stream-aware-free",
    targets={"cumem": CUMEM},
    releases=">=0.19.1,<0.34",
    why="memory is unmapped under running kernels: CUDA_ERROR_ILLEGAL_ADDRESS, and the next wake fails",
    drop_when="the oldest release in use is 0.22, which waits itself",
    upstream=("vLLM #43020",),
    required=True,
    edit=edit,
    probe=probe,
)
__all__ = ["PATCH", "Target"]
