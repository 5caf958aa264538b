"""A wake happens whole or not at all, and no host copy goes before all bytes are back (vLLM #34600)."""

from __future__ import annotations

from overlays.errors import ShapeUnknown
from overlays.patch import Files, Patch, Verdict, bug, fixed
from overlays.patches._block_states import put_in
from overlays.patches._cumem import CUMEM, GRANULARITY, DriverError, Rig

BLOCKS = 3
CALLS = ("create", "map", "set_access", "copy_in")  # what a wake asks of the driver


def edit(files: Files) -> None:
    source = files.source("cumem")
    if source.has("BlockStates"):
        raise ShapeUnknown("the states of blocks are in already, and a wake is still not whole")
    put_in(source)


def probe(files: Files) -> Verdict:
    for call in CALLS:
        for count in range(BLOCKS):
            if found := _failing(files, call, count):
                return bug(f"{call} {count + 1} of {BLOCKS} fails in a wake: {found}")
    return fixed("a wake that fails anywhere is undone with its host copies kept, and the next one brings all back")


def _failing(files: Files, call: str, count: int) -> str:
    """What is wrong after the `count`th such call failed for good; "" if nothing is."""
    rig = Rig(files)
    fills = {rig.allocate("weights", fill=fill): fill for fill in range(0x21, 0x21 + BLOCKS)}
    if any(rig.content(block) != fill for block, fill in fills.items()):
        return "the rig does not work"
    rig.allocator.sleep(offload_tags=("weights",))
    rig.driver.lasting = {call: count}
    try:
        rig.allocator.wake_up()
    except DriverError:
        rig.driver.lasting = {}
    else:
        return "the wake says nothing"
    if rig.driver.physical_bytes():
        return f"{rig.driver.physical_bytes() // GRANULARITY} blocks stay in device memory"
    rig.driver.error = ""
    try:
        rig.allocator.wake_up()
    except DriverError as error:
        return f"the next wake fails as well: {error}"
    lost = [block for block, fill in fills.items() if rig.content(block) != fill]
    return f"after the next wake {len(lost)} of {BLOCKS} blocks have other bytes" if lost else ""


PATCH = Patch(
    name="transactional-wake",
    targets={"cumem": CUMEM},
    releases=">=0.19.1,<0.34",
    why="a wake that runs out of memory keeps what it got, and after a failed copy the next wake leaves wrong weights",
    drop_when="a release undoes a failed wake and keeps every host copy until the wake is whole",
    upstream=("vLLM #34600", "vLLM #34602"),
    required=True,
    edit=edit,
    probe=probe,
    after=("stream-aware-free",),
)
__all__ = ["PATCH"]
