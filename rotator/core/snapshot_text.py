"""Snapshots and policies as plain JSON values and back, by the types of their fields.

Fields with their default are left out, so that a snapshot is small; unknown names are ignored and missing ones get
their default, so that one written by another release can still be planned from.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from rotator.core.values import Snapshot

T = TypeVar("T")
_SPECIAL = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}  # JSON has no word for these


class SnapshotError(ValueError):
    """The value is none that was written from a snapshot."""


def to_plain(value: Any) -> Any:
    """Dataclasses, enums, tuples, sets and mappings as what JSON knows."""
    if is_dataclass(value):
        return {
            f.name: to_plain(getattr(value, f.name))
            for f in fields(value)
            if not _is_default(f, getattr(value, f.name))
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(to_plain(k)): to_plain(v) for k, v in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(to_plain(v) for v in value)
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (_SPECIAL["inf"], _SPECIAL["-inf"])):
        return str(value)
    return value


def snapshot_of(plain: Any) -> Snapshot:
    """Raises SnapshotError."""
    try:
        return of_plain(Snapshot, plain)
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise SnapshotError(f"it is no snapshot: {e}") from None


def of_plain(kind: type[T], plain: Any) -> T:
    """The reverse of ``to_plain``. Raises TypeError, ValueError or KeyError for what does not fit the type."""
    made: T = _reader(cast("Any", kind))(plain)
    return made


def _is_default(field: "Field[Any]", value: Any) -> bool:
    if field.default is not MISSING:
        return bool(value == field.default)
    return field.default_factory is not MISSING and bool(value == field.default_factory())


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of this type from plain ones."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass_reader(kind)
    if origin in (Union, UnionType):
        (one,) = [_reader(k) for k in inner if k is not NoneType]
        return lambda plain: None if plain is None else one(plain)
    if origin is tuple:
        return _tuple_reader(inner)
    if origin is frozenset:
        one = _reader(inner[0])
        return lambda plain: frozenset(one(v) for v in plain)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        key, one = _reader(inner[0]), _reader(inner[1])
        return lambda plain: {key(k): one(v) for k, v in plain.items()}
    if kind is float:
        return lambda plain: _SPECIAL[plain] if isinstance(plain, str) else float(plain)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    return lambda plain: plain


def _tuple_reader(inner: tuple[Any, ...]) -> Callable[[Any], Any]:
    if len(inner) == 2 and inner[1] is Ellipsis:
        one = _reader(inner[0])
        return lambda plain: tuple(one(v) for v in plain)
    each = [_reader(k) for k in inner]
    return lambda plain: tuple(one(v) for one, v in zip(each, plain, strict=True))


def _dataclass_reader(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    readers = {f.name: _reader(hints[f.name]) for f in fields(kind) if f.init}
    return lambda plain: kind(**{name: read(plain[name]) for name, read in readers.items() if name in plain})
