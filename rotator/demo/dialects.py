"""What the stub says and does differently from release to release. Written from vLLM's own behaviour, apart from what
the service's adapter knows, so that each can find the other wrong."""

import re
from dataclasses import dataclass

LEVELS = (0, 1, 2)
MODES = ("abort", "wait", "keep")
WAKE_TAGS = ("weights", "kv_cache", "scheduling")


@dataclass(frozen=True, slots=True)
class StubDialect:
    version: str
    takes_mode: bool  # else a sleep leaves requests in flight to their fate, which is abort
    resumes_on_partial_wake: bool
    json_bodies: bool
    checks_arguments: bool
    operation_metrics: bool


def stub_dialect(version: str) -> StubDialect:
    """By the first two numbers of the version; one without them is spoken as the newest."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else (0, 33)
    return StubDialect(
        version=version,
        takes_mode=release >= (0, 17),
        resumes_on_partial_wake=release < (0, 24),
        json_bodies=release >= (0, 32),
        checks_arguments=release >= (0, 32),
        operation_metrics=release >= (0, 32),
    )
