"""The system's own Chromium, and what to do where there is none: ``python -m bench.chromium`` prints which one."""

import shutil
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def executable() -> str:
    """Raises FileNotFoundError that says what to install."""
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    raise FileNotFoundError(
        f"none of {', '.join(NAMES)} is installed: run 'make browser' as root, or 'apt install chromium'"
    )


def main() -> int:
    try:
        print(executable())
    except FileNotFoundError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
