"""What an engine's server and its callers have in common."""

from typing import Protocol

HTML = b"<html><body>502 Bad Gateway</body></html>"
Reply = tuple[int, bytes]


class Lost(Exception):
    """The connection closes without an answer."""


class Wire(Protocol):
    """A client's connection, as far as the engine's end of it goes."""

    @property
    def busy(self) -> bool: ...

    def lost(self) -> None: ...

    def finish_early(self) -> None: ...
