"""The end of a log, bounded in lines and in characters: all of it is sent to each viewer whenever it has changed."""

from collections import deque

LINES_MAX = 400
LINE_CHARS_MAX = 2_000  # a line of a progress bar or a dump may be endless
CHARS_MAX = 100_000


class LogLines:
    """What comes in beyond a bound pushes the oldest out."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._lines: deque[str] = deque()
        self._chars = 0
        self._dropped = False

    def add(self, text: str) -> None:
        """Whole lines, without the last line's end."""
        for line in text.split("\n"):
            over = len(line) - LINE_CHARS_MAX
            kept = line if over <= 0 else f"{line[:LINE_CHARS_MAX]} … {over} more characters"
            self._lines.append(kept)
            self._chars += len(kept)
            while len(self._lines) > LINES_MAX or self._chars > CHARS_MAX:
                self._chars -= len(self._lines.popleft())
                self._dropped = True

    def text(self, more: str) -> str:
        """What is shown; ``more`` says first where the rest is, once there is a rest that was dropped."""
        return "\n".join([more, *self._lines] if self._dropped else self._lines)
