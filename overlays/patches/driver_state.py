"""A block is asleep only if the driver unmapped it, and is unmapped once (vLLM #45565, #36651, #35489)."""

from __future__ import annotations

import ast

from overlays.errors import ShapeUnknown
from overlays.patch import Files, Patch, Verdict, bug, fixed
from overlays.patches._block_states import CLASS, calls, put_in
from overlays.patches._cumem import CUMEM, GRANULARITY, DriverError, Rig
from overlays.source import Source


def edit(files: Files) -> None:
    source = files.source("cumem")
    if not source.has("BlockStates"):
        put_in(source)
    _discard(source)
    _free(source)
    _trim(source)


def _discard(source: Source) -> None:
    if not source.has(f"{CLASS}.discard"):
        return
    for call in calls(source, source.function(f"{CLASS}.discard"), "unmap_and_release"):
        source.replace(call, "overlay_blocks.fall_asleep(data)")


def _free(source: Source) -> None:
    free = source.function(f"{CLASS}._python_free_callback")
    pops = calls(source, free, "self.pointer_to_data.pop")
    keeps = [
        node
        for node in ast.walk(source.function(f"{CLASS}.__init__"))
        if isinstance(node, ast.Attribute) and source.text_of(node) == "self._python_free_callback"
    ]
    if len(pops) != 1 or len(keeps) != 1:
        raise ShapeUnknown(f"{source.path}: the free callback is not set up as the patch knows it")
    source.replace(pops[0], f"overlay_blocks.take(self.pointer_to_data, {free.args.args[1].arg})")
    source.replace(keeps[0], "overlay_blocks.guarded(self.pointer_to_data, self._python_free_callback)")


def _trim(source: Source) -> None:
    """What the allocator itself frees, segments that torch does not use: once, and torch's own free knows of it."""
    done = 0
    for block in ast.walk(source.klass(CLASS)):
        for body in (getattr(block, "body", None), getattr(block, "orelse", None)):
            if isinstance(body, list):
                done += _trim_in(source, body)
    if done != 1:
        raise ShapeUnknown(f"{source.path}: unused segments are given back in {done} places, not in one")


def _trim_in(source: Source, body: list[ast.stmt]) -> int:
    done = 0
    for index, statement in enumerate(body):
        made = calls(source, statement, "self._python_free_callback") if _plain(statement) else []
        if not made:
            continue
        address = source.text_of(made[0].args[0])
        source.replace(statement, f"overlay_blocks.trim(self.pointer_to_data, {address})")
        if isinstance(statement, ast.Assign):
            following = body[index + 1]
            if source.text_of(following) != f"unmap_and_release({source.text_of(statement.targets[0])})":
                raise ShapeUnknown(f"{source.path}: what an unused segment's handle is for is unknown")
            source.replace(following, "pass")
        done += 1
    return done


def _plain(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr | ast.Assign)


def probe(files: Files) -> Verdict:
    for check in (_refused_unmap, _free_while_asleep, _old_error, _trimmed_then_freed):
        found = check(files)
        if found:
            return bug(found)
    return fixed("blocks are asleep only if the driver unmapped them, and are unmapped once")


def _refused_unmap(files: Files) -> str:
    """An unmap that the driver refuses in a sleep: the block is awake, keeps its bytes, and sleeps the next time."""
    rig = Rig(files)
    block = rig.allocate("weights", fill=0x11)
    rig.driver.fail["unmap"] = 0
    try:
        rig.allocator.sleep(offload_tags=("weights",))
    except DriverError:
        pass
    else:
        return "a sleep says nothing of an unmap that failed"
    if rig.content(block) != 0x11:
        return "an unmap that failed lost the block"
    try:
        rig.allocator.sleep(offload_tags=("weights",))
        rig.allocator.wake_up()
    except DriverError as error:
        return f"after an unmap that failed every later wake fails: {error}"
    if rig.content(block) != 0x11:
        return "after an unmap that failed the block sleeps no more, or comes back with other bytes"
    return ""


def _free_while_asleep(files: Files) -> str:
    """A tensor that dies asleep: nothing is unmapped that is not mapped, and nothing is left to fail later."""
    rig = Rig(files)
    kept = rig.allocate("weights", fill=0x11)
    block = rig.allocate("weights", size=4 * GRANULARITY)
    rig.allocator.sleep(offload_tags=("weights",))
    try:
        rig.free(block)
    except Exception as error:
        return f"a free while asleep breaks the callback: {error}"
    if rig.driver.error:
        return f"a free while asleep unmaps what is not mapped, and its error stays: {rig.driver.error}"
    rig.allocator.wake_up()
    if rig.content(kept) != 0x11 or rig.driver.physical_bytes() != GRANULARITY:
        return "a free while asleep upsets the next wake"
    return ""


def _old_error(files: Files) -> str:
    """The error of an earlier out of memory, which the next call raises: that call is done whole, or undone whole."""
    rig = Rig(files)
    block = rig.allocate("weights", fill=0x11)
    rig.allocator.sleep(offload_tags=("weights",))
    rig.driver.error = "out of memory"
    try:
        rig.allocator.wake_up()
    except DriverError:
        rig.allocator.wake_up()
    if rig.driver.physical_bytes() != GRANULARITY:
        return f"an old error leaks memory: {rig.driver.physical_bytes()} bytes held, {GRANULARITY} mapped"
    return "" if rig.content(block) == 0x11 else "an old error loses weights"


def _trimmed_then_freed(files: Files) -> str:
    """A segment that the region gave back at its end, and that torch frees later."""
    rig = Rig(files)
    with rig.allocator.use_memory_pool(tag="weights"):
        block = rig.allocate("weights")
        rig.segments.append({"address": block, "allocated_size": 0})
    if rig.driver.physical_bytes():
        return "an unused segment stays"
    try:
        rig.free(block)
    except Exception as error:
        return f"torch's own free of a segment that was given back breaks the callback: {type(error).__name__} {error}"
    if rig.driver.error or rig.driver.reserved:
        return f"torch's own free of a segment that was given back leaves {rig.driver.error or 'its address'}"
    return ""


PATCH = Patch(
    name="driver-state",
    targets={"cumem": CUMEM},
    releases=">=0.19.1,<0.34",
    why="one unmap that fails, or one free while asleep, and every later wake fails with 'invalid argument'",
    drop_when="a release keeps blocks awake whose unmap failed and frees sleeping ones without an unmap",
    upstream=("vLLM #45565", "vLLM #36651", "vLLM #35489"),
    required=True,
    edit=edit,
    probe=probe,
    after=("stream-aware-free", "transactional-wake"),
)
__all__ = ["PATCH"]
