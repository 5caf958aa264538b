"""Values as HCL literals: what a file of variables is made of."""

from collections.abc import Mapping, Sequence
from typing import Any

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def literal(value: Any) -> str:
    """A string, number, truth value, list or mapping of those as an HCL literal on one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case str():
            return _quoted(value)
        case Mapping():
            return "{" + ", ".join(f"{_quoted(k)} = {literal(v)}" for k, v in sorted(value.items())) + "}"
        case Sequence():
            return "[" + ", ".join(map(literal, value)) + "]"
    raise TypeError(f"{type(value).__name__} is no HCL value")


def _quoted(text: str) -> str:
    """``${`` and ``%{`` would begin a template: they are doubled, and stand for themselves."""
    escaped = "".join(_ESCAPES.get(c, c if c >= " " else f"\\u{ord(c):04x}") for c in text)
    return '"' + escaped.replace("${", "$${").replace("%{", "%%{") + '"'


def var_file(values: Mapping[str, Any]) -> str:
    """A file of variables, one a line, in order of their names: the same values give the same text."""
    return "".join(f"{name} = {literal(value)}\n" for name, value in sorted(values.items()))
