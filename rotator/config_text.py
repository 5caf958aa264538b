"""The configuration file as text: strict YAML in, one line a problem out, each with its place and its fix."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


class TextProblem(Exception):
    """The text is not a mapping that could be validated. ``str()`` is one line."""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses what it would otherwise take silently: the same key twice, of which the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise TextProblem(f"line {line}: key '{key.value}' is given twice in one place: remove one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_mapping(text: str) -> dict[str, Any]:
    """The mapping that the text holds. Raises TextProblem."""
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as e:
        at = f"line {e.problem_mark.line + 1}, column {e.problem_mark.column + 1}" if e.problem_mark else "file"
        raise TextProblem(f"{at}: not valid YAML: {' '.join((e.problem or 'unreadable').split())}") from None
    except (yaml.YAMLError, RecursionError) as e:
        raise TextProblem(f"file: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(data, dict):
        raise TextProblem("file: not a mapping: it needs at least 'engines:'")
    return data


def problem_lines(error: ValidationError, data: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """One line for each problem. A value that fits no member of a union is one problem, not one a member."""
    lines: dict[str, None] = {}
    places: set[str] = set()
    for detail in error.errors():
        if detail["type"] == "too_short" and len(detail["input"]):
            continue  # it counts what is left without the entries that were refused: those have their own lines
        loc = _within(detail["loc"], data)
        place = _place(loc, data)
        if len(loc) < len(detail["loc"]) and place in places:
            continue
        places.add(place)
        lines[f"{place}: {_what(detail, loc, model)}"] = None
    return list(lines)


def _within(loc: Sequence[str | int], data: Any) -> tuple[str | int, ...]:
    """The part of pydantic's location that is also a place in the file: it adds the union's member it tried."""
    found: list[str | int] = []
    for i, part in enumerate(loc):
        if isinstance(data, dict) and (part in data or i == len(loc) - 1):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            break
        found.append(part)
    return tuple(found)


def _place(loc: Sequence[str | int], data: Any) -> str:
    """The location in words: an engine goes by its name where it has one."""
    match loc:
        case ("engines", int() as i, *rest):
            engine = data["engines"][i]
            name = engine.get("name") if isinstance(engine, dict) else None
            return ".".join([f"engine '{name}'" if isinstance(name, str) else f"engines.{i}", *map(str, rest)])
    return ".".join(map(str, loc)) or "file"


def _what(detail: ErrorDetails, loc: Sequence[str | int], model: type[BaseModel]) -> str:
    """What is wrong, and the fix."""
    match detail["type"]:
        case "extra_forbidden":
            near = get_close_matches(str(loc[-1]), _keys_at(loc[:-1], model), n=1)
            return f"unknown key: {f'did you mean {near[0]!r}?' if near else 'remove it'}"
        case "missing":
            return "is missing: add it"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "should be a mapping of keys to values"
        case "tuple_type" | "list_type":
            return "should be a list: write it as [a, b] or as lines that begin with '- '"
        case "too_short":
            return "is empty: give at least one entry"
        case "value_error":
            return detail["msg"].removeprefix("Value error, ")
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    given = detail["input"]
    return f"{message}, not {given!r}" if isinstance(given, str | int | float | bool | None) else message


def _keys_at(loc: Iterable[str | int], model: type[BaseModel]) -> list[str]:
    """The keys that the model allows at a place."""
    for part in loc:
        if isinstance(part, str):
            field = model.model_fields.get(part)
            inner = next(_models_in(field.annotation), None) if field else None
            if inner is None:
                return []
            model = inner
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
