"""As much of HCL2 as jobs are written in: blocks, expressions, templates. Our own reading, for want of a Nomad."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# What Nomad fills in when a task starts, not when the job is parsed.
RUNTIME = re.compile(r"\s*(node|attr|meta|env|device|unique)\b[.\[]|\s*NOMAD_\w+\s*$")
_IDENT = re.compile(r"[A-Za-z_][\w-]*")
_NUMBER = re.compile(r"\d+(\.\d+)?")
_HEREDOC = re.compile(r"<<(-?)(\w+)\n")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
_LEVELS = (("||",), ("&&",), ("==", "!="), ("<=", ">=", "<", ">"), ("+", "-"), ("*", "/", "%"))
_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "||": lambda a, b: a or b,
    "&&": lambda a, b: a and b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "%": lambda a, b: a % b,
}

Scope = Mapping[str, Any]
Expr = Callable[[Scope], Any]


class HclError(Exception):
    """In Nomad's form: place; summary; detail."""


def text_of(value: Any) -> str:
    """As HCL turns a value into a text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _merge(*maps: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for one in maps for key, value in one.items()}


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "concat": lambda *lists: [item for one in lists for item in one],
    "join": lambda separator, items: separator.join(map(text_of, items)),
    "merge": _merge,
    "format": lambda pattern, *values: pattern % values,
    "length": len,
    "tostring": text_of,
    "keys": sorted,
    # Types of variables.
    **{name: lambda _, name=name: name for name in ("list", "map", "set", "object", "tuple")},
}
TYPES = {name: name for name in ("string", "number", "bool", "any")}


@dataclass
class Block:
    kind: str
    labels: tuple[str, ...]
    attributes: dict[str, Expr] = field(default_factory=dict)
    blocks: list["Block"] = field(default_factory=list)


class Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def body(self, end: str = "") -> Block:
        found = Block("", ())
        while True:
            self._skip(lines=True)
            if self._at >= len(self._text) or (end and self._take(end)):
                return found
            name = self._ident()
            self._skip()
            if self._text.startswith("=", self._at) and not self._text.startswith("==", self._at):
                self._at += 1
                found.attributes[name] = self.expression()
            else:
                found.blocks.append(self._block(name))

    def _block(self, kind: str) -> Block:
        labels = []
        while not self._take("{"):
            labels.append(self._plain() if self._peek() == '"' else self._ident())
            self._skip()
        inner = self.body("}")
        return Block(kind, tuple(labels), inner.attributes, inner.blocks)

    # -- expressions -------------------------------------------------------------------------------------------------

    def expression(self) -> Expr:
        condition = self._binary(0)
        if not self._take("?"):
            return condition
        yes = self.expression()
        self._expect(":")
        no = self.expression()
        return lambda s: yes(s) if condition(s) else no(s)

    def _binary(self, level: int) -> Expr:
        if level == len(_LEVELS):
            return self._unary()
        left = self._binary(level + 1)
        while True:
            self._skip()
            operator = next((o for o in _LEVELS[level] if self._text.startswith(o, self._at)), None)
            if operator is None:
                return left
            self._at += len(operator)
            left = _apply(_OPERATORS[operator], left, self._binary(level + 1))

    def _unary(self) -> Expr:
        if self._take("!"):
            inner = self._unary()
            return lambda s: not inner(s)
        if self._take("-"):
            inner = self._unary()
            return lambda s: -inner(s)
        return self._traversed(self._primary())

    def _traversed(self, value: Expr) -> Expr:
        while True:
            if self._text.startswith(".", self._at):
                self._at += 1
                value = _index(value, _constant(self._ident()))
            elif self._text.startswith("[", self._at):
                self._at += 1
                value = _index(value, self.expression())
                self._expect("]")
            else:
                return value

    def _primary(self) -> Expr:
        self._skip()
        if match := _HEREDOC.match(self._text, self._at):
            return self._heredoc(match)
        first = self._peek()
        if first == '"':
            self._at += 1
            return _template(self._quoted())
        if self._take("["):
            return self._list()
        if self._take("{"):
            return self._object()
        if self._take("("):
            inner = self.expression()
            self._expect(")")
            return inner
        if number := _NUMBER.match(self._text, self._at):
            self._at = number.end()
            return _constant(float(number[0]) if number[1] else int(number[0]))
        return self._named(self._ident())

    def _named(self, name: str) -> Expr:
        if name in ("true", "false", "null"):
            return _constant({"true": True, "false": False, "null": None}[name])
        if self._text.startswith("(", self._at):
            self._at += 1
            return self._call(name)
        return lambda s: _look_up(s, name)

    def _call(self, name: str) -> Expr:
        if name not in FUNCTIONS:
            raise self._error(f'Call to unknown function; There is no function named "{name}"')
        given: list[Expr] = []
        while not self._take(")", lines=True):
            given.append(self.expression())
            self._skip(lines=True)
            self._take(",")
        return lambda s: FUNCTIONS[name](*(one(s) for one in given))

    def _list(self) -> Expr:
        if self._word("for"):
            return self._for("]")
        items: list[Expr] = []
        while not self._take("]", lines=True):
            items.append(self.expression())
            self._skip(lines=True)
            self._take(",")
        return lambda s: [item(s) for item in items]

    def _object(self) -> Expr:
        if self._word("for"):
            return self._for("}")
        pairs: list[tuple[Expr, Expr]] = []
        while not self._take("}", lines=True):
            self._skip(lines=True)
            key = _template(self._quoted_key()) if self._peek() == '"' else self._key()
            if not self._take("="):
                self._expect(":")
            pairs.append((key, self.expression()))
            self._skip(lines=True)
            self._take(",")
        return lambda s: {text_of(key(s)): value(s) for key, value in pairs}

    def _key(self) -> Expr:
        if self._take("("):
            inner = self.expression()
            self._expect(")")
            return inner
        return _constant(self._ident())

    def _for(self, end: str) -> Expr:
        names = [self._ident()]
        if self._take(","):
            self._skip()
            names.append(self._ident())
        if not self._word("in"):
            raise self._error("Invalid 'for' expression; 'in' is missing")
        source = self.expression()
        self._expect(":")
        self._skip(lines=True)
        key: Expr | None = None
        value = self.expression()
        if self._take("=>"):
            key, value = value, self.expression()
        self._skip(lines=True)
        wanted = self.expression() if self._word("if") else _constant(True)
        self._skip(lines=True)
        self._expect(end)
        return lambda s: _for_each(s, names, source(s), key, value, wanted)

    # -- texts -------------------------------------------------------------------------------------------------------

    def _quoted(self) -> list[str | Expr]:
        """The parts of a quoted template, its opening quote already taken."""
        parts: list[str | Expr] = [""]
        while True:
            char = self._text[self._at] if self._at < len(self._text) else ""
            if char in ("", "\n"):
                raise self._error("Unterminated template string; No closing marker was found for the string")
            if char == '"':
                self._at += 1
                return parts
            if char == "\\":
                self._escape(parts)
            elif not self._interpolation(parts):
                parts.append(char)
                self._at += 1

    def _quoted_key(self) -> list[str | Expr]:
        self._at += 1
        return self._quoted()

    def _escape(self, parts: list[str | Expr]) -> None:
        char = self._text[self._at + 1]
        if char == "u":
            parts.append(chr(int(self._text[self._at + 2 : self._at + 6], 16)))
            self._at += 6
            return
        parts.append(_ESCAPES[char])
        self._at += 2

    def _interpolation(self, parts: list[str | Expr]) -> bool:
        """Whether something of a template was taken."""
        for mark in ("${", "%{"):
            if self._text.startswith(mark[0] + mark, self._at):
                parts.append(mark)
                self._at += 3
                return True
        if not self._text.startswith("${", self._at):
            return False
        if RUNTIME.match(self._text, self._at + 2) or RUNTIME.match(self._text[self._at + 2 :].split("}")[0]):
            end = self._text.index("}", self._at) + 1
            parts.append(self._text[self._at : end])
            self._at = end
            return True
        self._at += 2
        parts.append(self.expression())
        self._expect("}")
        return True

    def _heredoc(self, match: re.Match[str]) -> Expr:
        self._at = match.end()
        lines = []
        while True:
            end = self._text.index("\n", self._at)
            line = self._text[self._at : end]
            self._at = end
            if line.strip() == match[2]:
                break
            lines.append(line)
            self._at += 1
        if match[1]:
            margin = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
            lines = [line[margin:] for line in lines]
        inner = Parser("".join(f"{line}\n" for line in lines))
        parts: list[str | Expr] = []
        while inner._at < len(inner._text):
            if not inner._interpolation(parts):
                parts.append(inner._text[inner._at])
                inner._at += 1
        return lambda s: "".join(p if isinstance(p, str) else text_of(p(s)) for p in parts)

    # -- characters --------------------------------------------------------------------------------------------------

    def _skip(self, *, lines: bool = False) -> None:
        blanks = " \t\r\n" if lines else " \t\r"
        while self._at < len(self._text):
            if self._text[self._at] in blanks:
                self._at += 1
            elif self._text[self._at] == "#" or self._text.startswith("//", self._at):
                self._at = self._text.find("\n", self._at) if "\n" in self._text[self._at :] else len(self._text)
            else:
                return

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, mark: str, *, lines: bool = False) -> bool:
        self._skip(lines=lines)
        if not self._text.startswith(mark, self._at):
            return False
        self._at += len(mark)
        return True

    def _expect(self, mark: str) -> None:
        if not self._take(mark, lines=True):
            raise self._error(f'Invalid expression; Expected "{mark}"')

    def _word(self, word: str) -> bool:
        self._skip(lines=True)
        match = _IDENT.match(self._text, self._at)
        if match is None or match[0] != word:
            return False
        self._at = match.end()
        return True

    def _ident(self) -> str:
        self._skip()
        match = _IDENT.match(self._text, self._at)
        if match is None:
            raise self._error("Invalid expression; Expected the start of an expression")
        self._at = match.end()
        return match[0]

    def _plain(self) -> str:
        self._at += 1
        return "".join(p for p in self._quoted() if isinstance(p, str))

    def _error(self, words: str) -> HclError:
        line = self._text.count("\n", 0, self._at) + 1
        column = self._at - (self._text.rfind("\n", 0, self._at))
        return HclError(f"input.hcl:{line},{column}-{column + 1}: {words}")


def _constant(value: Any) -> Expr:
    return lambda _: value


def _apply(operator: Callable[[Any, Any], Any], left: Expr, right: Expr) -> Expr:
    return lambda s: operator(left(s), right(s))


def _index(value: Expr, key: Expr) -> Expr:
    def find(scope: Scope) -> Any:
        name = key(scope)
        try:
            return value(scope)[name]
        except (KeyError, IndexError, TypeError):
            raise HclError(f'Unsupported attribute; This object does not have an attribute named "{name}"') from None

    return find


def _template(parts: list[str | Expr]) -> Expr:
    whole = [part for part in parts if part != ""]
    if len(whole) == 1 and not isinstance(whole[0], str):
        return whole[0]  # "${x}" is x itself, whatever its type
    return lambda s: "".join(p if isinstance(p, str) else text_of(p(s)) for p in whole)


def _look_up(scope: Scope, name: str) -> Any:
    if name not in scope:
        raise HclError(f'Unknown variable; There is no variable named "{name}"')
    return scope[name]


def _for_each(scope: Scope, names: list[str], source: Any, key: Expr | None, value: Expr, wanted: Expr) -> Any:
    pairs = sorted(source.items()) if isinstance(source, Mapping) else list(enumerate(source))
    made: list[tuple[Any, Any]] = []
    for index, item in pairs:
        inner = {**scope, **dict(zip(names, (index, item) if len(names) == 2 else (item,), strict=True))}
        if wanted(inner):
            made.append((key(inner) if key else None, value(inner)))
    return dict(made) if key else [one for _, one in made]
