"""Names as operators give them: an engine by name or alias, with near ones where there is none."""

from difflib import get_close_matches

from rotator.service.operations import EngineView, Operations, UnknownEngine
from rotator.service.problems import ProblemError


def find_engine(ops: Operations, name: str) -> EngineView:
    """Raises ProblemError (404) with the names that come close."""
    try:
        return ops.engine(name)
    except UnknownEngine:
        near = close_names(name, ops)
        hint = f"close: {', '.join(near)}" if near else "GET /engines lists them"
        detail = f"there is no engine '{name[:200]}'; {hint}"
        raise ProblemError(404, "unknown-engine", "No such engine", detail, close_names=near) from None


def close_names(name: str, ops: Operations) -> list[str]:
    known = {word.lower(): word for e in ops.engines() for word in (e.name, *e.aliases)}
    wanted = name.lower()[:200]
    within = [word for low, word in known.items() if wanted and (wanted in low or low in wanted)]
    near = [known[low] for low in get_close_matches(wanted, known, n=3)]
    return list(dict.fromkeys((*near, *within)))[:3]
