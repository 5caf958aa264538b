"""How a command ends: exit codes, and errors as one line."""

from typing import NoReturn

OK = 0
PROBLEM = 1  # it ran, and what it found is not well
USAGE = 2  # the command line or a value on it is wrong
UNREACHABLE = 3  # no service answers at the URL
REFUSED = 4  # the service will not: no key, no scope, or it makes no sense now
FAILED = 5  # it was begun and failed, or was not done by the deadline
INTERNAL = 70  # a fault of this program (sysexits' EX_SOFTWARE)
INTERRUPTED = 130  # Ctrl-C

MEANINGS = {
    OK: "well",
    PROBLEM: "a problem was found",
    USAGE: "wrong usage",
    UNREACHABLE: "the service cannot be reached",
    REFUSED: "refused: no key, no scope, or it makes no sense now",
    FAILED: "failed, or not done by the deadline",
    INTERNAL: "a fault of this program: please report it",
    INTERRUPTED: "interrupted",
}

EPILOG = (
    "Exit codes: 0 well, 1 a problem was found, 2 wrong usage, 3 the service cannot be reached, 4 refused, "
    "5 failed or not done by the deadline."
)


# What a stream that ends by itself may mean.
ENDED = "the service ended, or this key is no longer good; see `rotator status`"


class CliError(Exception):
    """Ends the command with a code and one line on stderr (more where there are more problems)."""

    def __init__(self, code: int, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.code = code


def fail(code: int, *lines: str) -> NoReturn:
    raise CliError(code, *lines)
