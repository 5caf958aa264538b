"""One file under edit: found by its syntax tree, spliced by position, every other byte as it was.

Offsets of `ast` count UTF-8 bytes, so all splicing is done in bytes. Changes are collected and made at once; two that
overlap are refused. Text to be inserted is written at column 0 and indented to where it goes.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from overlays.errors import ShapeUnknown

type_of_function = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Splice:
    """Bytes `start` to `end` become `text`."""

    start: int
    end: int
    text: bytes


class Source:
    """A Python file and the changes made to it so far. Raises ShapeUnknown if it is no Python."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        self.data = data
        try:
            self.tree = ast.parse(data)
        except (SyntaxError, ValueError) as error:
            raise ShapeUnknown(f"{path} is not Python that this interpreter reads: {error}") from None
        self._lines = _line_starts(data)
        self._splices: list[Splice] = []
        self.newline = "\r\n" if b"\r\n" in data else "\n"

    # Finding.

    def find(self, dotted: str) -> ast.AST:
        """The class or function at `dotted` ("CuMemAllocator.sleep"); of several the last, as Python takes it."""
        scope: ast.AST = self.tree
        for name in dotted.split("."):
            named = [node for node in _definitions(scope) if node.name == name]
            if not named:
                raise ShapeUnknown(f"{self.path} has no {dotted}")
            scope = named[-1]
        return scope

    def has(self, dotted: str) -> bool:
        try:
            self.find(dotted)
        except ShapeUnknown:
            return False
        return True

    def function(self, dotted: str) -> Function:
        node = self.find(dotted)
        if not isinstance(node, type_of_function):
            raise ShapeUnknown(f"{dotted} in {self.path} is no function")
        return node

    def klass(self, dotted: str) -> ast.ClassDef:
        node = self.find(dotted)
        if not isinstance(node, ast.ClassDef):
            raise ShapeUnknown(f"{dotted} in {self.path} is no class")
        return node

    def only(self, within: ast.AST, wanted: Callable[[ast.AST], bool], what: str) -> ast.AST:
        """The one node under `within` that `wanted` takes. None, or several, is a shape that nobody knows."""
        found = [node for node in ast.walk(within) if wanted(node)]
        if len(found) != 1:
            raise ShapeUnknown(f"{self.path} has {what} {len(found)} times, not once")
        return found[0]

    def text_of(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.data[start:end].decode()

    def span(self, node: ast.AST) -> tuple[int, int]:
        """First byte of the node and the byte after its last; decorators belong to what they decorate."""
        decorators = getattr(node, "decorator_list", None)
        first: Any = decorators[0] if decorators else node
        start = self._lines[first.lineno - 1] + first.col_offset
        if decorators:
            start = self.data.rfind(b"@", 0, start)
        return start, self._lines[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def first_statement(self, function: Function) -> ast.stmt:
        """The first statement of a body after its docstring."""
        body = function.body
        has_docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        if has_docstring and len(body) == 1:
            raise ShapeUnknown(f"{function.name} in {self.path} has nothing but a docstring")
        return body[1 if has_docstring else 0]

    # Changing. `text` stands at column 0 and needs no newline at its end.

    def insert_before(self, node: ast.stmt, text: str) -> None:
        """Put whole lines before a statement, as deep as it stands."""
        at = self._line_start(node)
        self._add(at, at, self._indented(text, self._indent(node)) + self.newline)

    def insert_after(self, node: ast.stmt, text: str) -> None:
        """Put whole lines after a statement, as deep as it stands."""
        at = self._line_end(node)
        lead = "" if self.data[:at].endswith(b"\n") or at == 0 else self.newline
        self._add(at, at, lead + self._indented(text, self._indent(node)) + self.newline)

    def replace(self, node: ast.AST, text: str) -> None:
        """Put `text` in the place of a statement, definition or expression; further lines are indented as its first."""
        start, end = self.span(node)
        indented = self._indented(text, self._indent(node)).lstrip(" \t")
        self._add(start, end, indented)

    def replace_body(self, function: Function, text: str) -> None:
        """Put `text` in the place of all statements of a function after its docstring; the signature stays."""
        first = self.first_statement(function)
        start, end = self.span(first)[0], self.span(function.body[-1])[1]
        self._add(start, end, self._indented(text, self._indent(first)).lstrip(" \t"))

    def append(self, text: str) -> None:
        """Put whole lines at the end of the file."""
        lead = "" if not self.data or self.data.endswith(b"\n") else self.newline
        self._add(len(self.data), len(self.data), lead + self._indented(text, "") + self.newline)

    def insert_after_imports(self, text: str) -> None:
        """Put whole lines after the leading run of docstring and imports at the top of the file."""
        last: ast.stmt | None = None
        for statement in self.tree.body:
            leading = isinstance(statement, ast.Import | ast.ImportFrom) or (
                last is None and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            )
            if not leading:
                break
            last = statement
        if last is None:
            self._add(0, 0, self._indented(text, "") + self.newline)
        else:
            self.insert_after(last, text)

    def result(self) -> bytes:
        """The file with all changes. Raises ShapeUnknown if they overlap or the result does not compile."""
        out, at = [], 0
        for splice in sorted(self._splices, key=lambda item: (item.start, item.end)):
            if splice.start < at:
                raise ShapeUnknown(f"two changes to {self.path} overlap at byte {splice.start}")
            out += [self.data[at : splice.start], splice.text]
            at = splice.end
        data = b"".join([*out, self.data[at:]])
        try:
            compile(data, self.path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            raise ShapeUnknown(f"{self.path} does not compile after the change: {error}") from None
        return data

    @property
    def changed(self) -> bool:
        return bool(self._splices)

    def _add(self, start: int, end: int, text: str) -> None:
        self._splices.append(Splice(start, end, text.encode()))

    def _indent(self, node: ast.AST) -> str:
        line = self.data[self._line_start(node) :]
        return line[: len(line) - len(line.lstrip(b" \t"))].decode()

    def _indented(self, text: str, indent: str) -> str:
        plain = textwrap.dedent(text).strip("\n")
        return self.newline.join(indent + line if line.strip() else "" for line in plain.split("\n"))

    def _line_start(self, node: ast.AST) -> int:
        start, _ = self.span(node)
        return self.data.rfind(b"\n", 0, start) + 1

    def _line_end(self, node: ast.AST) -> int:
        _, end = self.span(node)
        newline = self.data.find(b"\n", end)
        return len(self.data) if newline < 0 else newline + 1


def _definitions(scope: ast.AST) -> Iterator[ast.ClassDef | Function]:
    """Classes and functions directly in `scope`, also those under an `if` or a `try` of it."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _definitions(node)


def _line_starts(data: bytes) -> list[int]:
    starts = [0]
    for index, byte in enumerate(data):
        if byte == 0x0A:
            starts.append(index + 1)
    return starts
