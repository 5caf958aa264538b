"""Names as operators give them: an engine by name or alias, with near ones where there is none."""

from difflib import get_close_matches

from rotator.service.operations import EngineView, Operations, UnknownEngine
from rotator.service.problems import ProblemError

_NAMED_MAX = 8


def find_engine(ops: Operations, name: str) -> EngineView:
    """Raises ProblemError (404) with the names that come close."""
    try:
        return ops.engine(name)
    except UnknownEngine:
        near = close_names(name, ops)
        hint = f"close: {', '.join(near)}" if near else f"there {_some([e.name for e in ops.engines()])}"
        detail = f"there is no engine '{name[:200]}'; {hint}"
        raise ProblemError(404, "unknown-engine", "No such engine", detail, close_names=near) from None


def _some(names: list[str]) -> str:
    """What there is, in words; of many only the first."""
    if not names:
        return "is none at all"
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return f"{'is' if len(names) == 1 else 'are'} {', '.join(names[:_NAMED_MAX])}{more}"


def close_names(name: str, ops: Operations) -> list[str]:
    known = {word.lower(): word for e in ops.engines() for word in (e.name, *e.aliases)}
    wanted = name.lower()[:200]
    within = [word for low, word in known.items() if wanted and (wanted in low or low in wanted)]
    near = [known[low] for low in get_close_matches(wanted, known, n=3)]
    return list(dict.fromkeys((*near, *within)))[:3]
