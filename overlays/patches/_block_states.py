"""How the class of overlays/payload/block_states.py gets into cumem.py, for the two patches that need it."""

from __future__ import annotations

import ast
from importlib import resources

from overlays.errors import ShapeUnknown
from overlays.source import Function, Source

SET_UP = '''

def _overlay_frugal(device):
    """Whether host and device share their memory, so that nothing may be held twice."""
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


overlay_blocks = BlockStates(
    create_and_map=create_and_map,
    unmap_and_release=unmap_and_release,
    copy=lambda to, source, size: libcudart.cudaMemcpy(to, source, size),
    synchronize=torch.cuda.synchronize,
    frugal=_overlay_frugal,
    log=logger,
)
'''


CLASS = "CuMemAllocator"
IMPORTS = """

import ctypes
from collections.abc import Callable
from typing import Any


"""


def put_in(source: Source) -> None:
    """Append the class and its one instance, and let sleep and wake_up go by it. Raises ShapeUnknown."""
    text = resources.files("overlays.payload").joinpath("block_states.py").read_text()
    lines = text.splitlines()
    parts = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    classes = "\n\n\n".join("\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in parts)
    source.append(IMPORTS + classes + SET_UP)
    _sleep(source)
    _wake(source)


def _sleep(source: Source) -> None:
    loop = record_loop(source, source.function(f"{CLASS}.sleep"))
    skips = any(
        isinstance(node, ast.If) and source.text_of(node.test) == "data.is_asleep" and _has_continue(node)
        for node in loop.body
    )
    source.insert_before(
        loop.body[0],
        "overlay_blocks.settle(data)" if skips else "if overlay_blocks.settle(data):\n    continue",
    )
    source.replace(_statement_of(source, loop, "unmap_and_release"), "overlay_blocks.fall_asleep(data)")


def _has_continue(node: ast.If) -> bool:
    return any(isinstance(child, ast.Continue) for child in node.body)


def _statement_of(source: Source, loop: ast.For, name: str) -> ast.stmt:
    """The statement directly in the loop that makes the call: the call itself, or a `try` around nothing but it."""
    for statement in loop.body:
        if not calls(source, statement, name):
            continue
        if isinstance(statement, ast.Expr):
            return statement
        marks = isinstance(statement, ast.Try) and [source.text_of(node) for node in statement.finalbody]
        if isinstance(statement, ast.Try) and len(statement.body) == 1 and marks == ["data.is_asleep = True"]:
            return statement
    raise ShapeUnknown(f"{source.path}: sleep does not unmap as the patch knows it")


def _wake(source: Source) -> None:
    loop = record_loop(source, source.function(f"{CLASS}.wake_up"))
    chooser = _chooser(source, loop)
    address, data = _names(source, loop)
    source.replace(
        loop,
        f"def overlay_fresh({address}, {data}):\n"
        + indented(f"handle = {data}.handle\n" + _fresh(source, chooser))
        + f"\n\noverlay_wanted = lambda {data}: {source.text_of(chooser.test)}\n"
        + "overlay_blocks.wake(self.pointer_to_data, overlay_wanted, overlay_fresh)",
    )


def _names(source: Source, loop: ast.For) -> tuple[str, str]:
    match loop.target:
        case ast.Tuple(elts=[ast.Name(id=address), ast.Name(id=data)]):
            return address, data
    raise ShapeUnknown(f"{source.path}: wake_up loops over something else than addresses and records")


def _chooser(source: Source, loop: ast.For) -> ast.If:
    """The `if` that chooses by tag which blocks wake; before it there may only be one that passes over the awake."""
    *before, last = loop.body
    known = all(isinstance(node, ast.If) and source.text_of(node.test) == "not data.is_asleep" for node in before)
    if known and isinstance(last, ast.If) and not last.orelse and calls(source, last, "create_and_map"):
        return last
    raise ShapeUnknown(f"{source.path}: wake_up does not choose its blocks as the patch knows it")


def _fresh(source: Source, chooser: ast.If) -> str:
    """What a release does with a block that has no host copy: nothing, or zeros on some platforms."""
    *before, copy = chooser.body
    texts = [source.text_of(node) for node in before]
    known = texts[:2] == ["handle = data.handle", "create_and_map(handle)"] and texts[2:] in (
        [],
        ["data.is_asleep = False"],
    )
    if not known or not isinstance(copy, ast.If) or source.text_of(copy.test) != "data.cpu_backup_tensor is not None":
        raise ShapeUnknown(f"{source.path}: wake_up does something to a block that the patch does not know")
    if not copy.orelse:
        return "pass"
    first = copy.orelse[0]
    if len(copy.orelse) != 1 or not isinstance(first, ast.If) or first.orelse:
        raise ShapeUnknown(f"{source.path}: what a wake does with blocks that have no host copy is unknown")
    return f"if {source.text_of(first.test)}:\n" + indented("\n".join(source.text_of(node) for node in first.body))


def indented(text: str) -> str:
    return "\n".join(f"    {line}" if line.strip() else "" for line in text.split("\n"))


def record_loop(source: Source, function: Function) -> ast.For:
    """The loop over all records in a method of the allocator."""
    for node in function.body:
        if isinstance(node, ast.For) and "self.pointer_to_data" in source.text_of(node.iter):
            return node
    raise ShapeUnknown(f"{source.path}: {function.name} does not loop over pointer_to_data")


def calls(source: Source, within: ast.AST, name: str) -> list[ast.Call]:
    """Calls of a function by its plain or dotted name ("unmap_and_release", "self._python_free_callback")."""
    return [node for node in ast.walk(within) if isinstance(node, ast.Call) and source.text_of(node.func) == name]
