"""Which engines listen here, by name: from the agent's file, and as the service declares them."""

from collections.abc import Mapping

ENGINES_MAX = 1024


class TooMany(Exception):
    """No room for another engine's name."""


class Engines:
    """``own_port`` is the agent's: it is no engine."""

    def __init__(self, fixed: Mapping[str, int], own_port: int = 0) -> None:
        self._fixed = dict(fixed)
        self._declared: dict[str, int] = {}
        self.own_port = own_port

    def port(self, name: str) -> int | None:
        """Where it listens on loopback. The file's word goes before the service's."""
        return self._fixed.get(name, self._declared.get(name))

    def declare(self, name: str, port: int) -> None:
        """Raises TooMany, and ValueError for the agent's own port."""
        if port == self.own_port:
            raise ValueError(f"port {port} is the agent's own")
        if name not in self._declared and len(self._declared) >= ENGINES_MAX:
            raise TooMany
        self._declared[name] = port

    def drop(self, name: str) -> None:
        self._declared.pop(name, None)

    def all(self) -> dict[str, int]:
        return {**self._declared, **self._fixed}
