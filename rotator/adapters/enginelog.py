"""An engine's log file: one a engine, appended to by its launches, rotated by size when a launch begins."""

import os
from datetime import UTC, datetime
from pathlib import Path

HEADER = "=== rotator: "
_SECRET_WORDS = ("key", "token", "secret", "password")


def rotate(path: Path, *, above_bytes: int, keep: int) -> None:
    """Move ``path`` to ``path.1`` (and so on, the last ``keep`` stay) if it is larger than ``above_bytes``."""
    try:
        if path.stat().st_size <= above_bytes:
            return
    except FileNotFoundError:
        return
    for number in range(keep - 1, 0, -1):
        older = _numbered(path, number)
        if older.exists():
            older.replace(_numbered(path, number + 1))
    path.replace(_numbered(path, 1))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def open_for_launch(path: Path, command: tuple[str, ...], at: datetime | None = None) -> int:
    """Open the log for appending, write a header line and return the file descriptor. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    when = (at or datetime.now(UTC)).isoformat(timespec="seconds")
    try:
        os.write(descriptor, f"{HEADER}{when} {' '.join(redacted(command))}\n".encode(errors="replace"))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def redacted(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command without the values of options that name a secret (``--api-key x``, ``--hf-token=x``)."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        option, equals, _ = word.partition("=")
        secret = option.startswith("-") and any(name in option.lower().split("-") for name in _SECRET_WORDS)
        shown.append("…" if hide_next and not word.startswith("--") else f"{option}=…" if secret and equals else word)
        hide_next = secret and not equals
    return tuple(" ".join(word.split()) for word in shown)


def tail(path: Path, *, max_bytes: int = 1 << 18) -> str:
    """The end of what the latest launch wrote; empty where there is nothing or no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - max_bytes))
            text = file.read(max_bytes).decode(errors="replace")
    except OSError:
        return ""
    _, header, latest = f"\n{text}".rpartition(f"\n{HEADER}")
    return latest.partition("\n")[2] if header else text
