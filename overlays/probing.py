"""Run one file of vLLM without vLLM, torch or a GPU: imports are answered by fakes.

What the caller gives is taken; the standard library is real; everything else becomes `Anything`, which can be called,
indexed, compared, entered, inherited from and used as a decorator, is false, and returns more of itself.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

_count = itertools.count()


class ProbeModule(types.ModuleType):
    """A module under probe. Attributes are whatever the file defines."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the file under probe defines no {name}")


class Anything:
    """Swallows whatever is done to it. A call with one function gives that function back: it is a decorator then."""

    def __init__(self, name: str = "anything") -> None:
        self.__name__ = self.__qualname__ = name
        self.__version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        child = Anything(f"{self.__name__}.{name}")
        self.__dict__[name] = child
        return child

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType | type):
            return args[0]
        return Anything(f"{self.__name__}()")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        derived = any(isinstance(base, type) and issubclass(base, _Base) for base in bases)
        return (_Base,) if not derived and _first_stub(bases) is self else ()

    def __instancecheck__(self, instance: object) -> bool:
        return False

    def __subclasscheck__(self, subclass: type) -> bool:
        return False

    def __getitem__(self, key: object) -> Any:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def __index__(self) -> int:
        return 0

    def _same(self, *_: object) -> Any:
        return self

    __or__ = __ror__ = __and__ = __rand__ = __add__ = __radd__ = __sub__ = __rsub__ = _same
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __neg__ = _same
    __pow__ = __rpow__ = __lshift__ = __rshift__ = __invert__ = _same

    def _no(self, other: object) -> bool:
        return False

    __lt__ = __le__ = __gt__ = __ge__ = _no


class _Base:
    """What a class under probe inherits from where its real base is outside the file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def stub(name: str = "stub", **attributes: object) -> Anything:
    """A stub in which some things are real: `stub("torch", empty=make_tensor, cuda=stub("torch.cuda", ...))`."""
    made = Anything(name)
    made.__dict__.update(attributes)
    return made


def _first_stub(bases: tuple[Any, ...]) -> Any:
    return next((base for base in bases if isinstance(base, Anything)), None)


@functools.lru_cache(maxsize=32)  # probes load one file again and again
def _compiled(data: bytes, path: str) -> types.CodeType:
    return compile(data, path, "exec", dont_inherit=True)


def load(data: bytes, path: str, modules: Mapping[str, object] | None = None) -> ProbeModule:
    """Execute the file. Raises whatever the file raises at import."""
    name = f"overlays_probe_{next(_count)}"
    module = ProbeModule(name)
    module.__file__ = path
    package = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    fakes = _Fakes(package, path.endswith("/__init__.py"), dict(modules or {}))
    scope = vars(module)
    scope["__builtins__"] = {**vars(builtins), "__import__": fakes.answer}
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(_compiled(data, path), scope)  # noqa: S102 - running the file is what a probe is
    finally:
        del sys.modules[name]
    return module


class _Fakes:
    """Answers `import` for one file under probe."""

    def __init__(self, package: str, is_package: bool, given: dict[str, object]) -> None:
        self._package = package if is_package else package.rpartition(".")[0]
        self._given = given
        self._made: dict[str, Anything] = {}

    def answer(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: tuple[str, ...] | None = (),
        level: int = 0,
    ) -> Any:
        if level:
            parent = self._package.split(".")
            name = ".".join([*parent[: len(parent) - level + 1], *([name] if name else [])])
        if name not in self._given and name.partition(".")[0] in sys.stdlib_module_names:
            return builtins.__import__(name, None, None, fromlist or (), 0)
        if fromlist:
            return self._with_children(name, fromlist)
        for depth in range(1, name.count(".") + 2):
            self._module(".".join(name.split(".")[:depth]))
        return self._module(name.partition(".")[0])

    def _with_children(self, name: str, fromlist: tuple[str, ...]) -> Any:
        """For `from name import child`: a child may be a module that was given under its full name."""
        module = self._module(name)
        for child in fromlist:
            full = f"{name}.{child}"
            if full in self._given and not hasattr(module, child):
                setattr(module, child, self._given[full])
        return module

    def _module(self, name: str) -> Any:
        if name in self._given:
            value = self._given[name]
            if isinstance(value, ImportError):
                raise value
        else:
            value = self._made.setdefault(name, Anything(name))
        parent, _, child = name.rpartition(".")
        if parent:
            holder = self._module(parent)
            if isinstance(holder, Anything):
                setattr(holder, child, value)
        return value
