"""How much of large request bodies may be held at one time: each has its own bound, but many clients come at once."""

from rotator.service.responses import ApiError

_AGAIN_S = 2.0


class Bodies:
    """Counts what came in more than one piece; a single piece is small, and bounded by the number of connections."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._held_bytes = 0

    def hold(self, piece_bytes: int) -> None:
        """Raises ApiError (503) where that would be too much."""
        if self._held_bytes + piece_bytes > self.bytes_max:
            message = f"more than {self.bytes_max} bytes of large requests are under way: come again in {_AGAIN_S:g} s"
            raise ApiError(503, message, "bodies_too_large", "server_error", retry_after_s=_AGAIN_S, closes=True)
        self._held_bytes += piece_bytes

    def let_go(self, held_bytes: int) -> None:
        self._held_bytes -= held_bytes
