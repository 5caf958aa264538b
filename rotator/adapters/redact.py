"""Takes secrets out of text that is kept as evidence: by what they look like, by their names, by their values."""

import re
from collections.abc import Callable, Mapping

HIDDEN = "[hidden]"
_NAMES = r"(?:api[-_]?key|access[-_]?key|auth[-_]?token|hf[-_]?token|token|secret|password|passwd|credential)s?"
# Every repetition that something must follow is bounded: a line of one letter must not take seconds.
_PATTERNS = (
    # name=value, name: value, "name": "value", --name value
    (
        re.compile(rf"""(?i)\b([\w-]{{0,64}}{_NAMES}["']?\s*[=:]\s*["']?)(?!\d+(?:\.\d+)?\b)[^\s"',;&]+"""),
        rf"\1{HIDDEN}",
    ),
    (re.compile(rf"(?i)(--[\w-]{{0,64}}{_NAMES}\s+)(?!-)\S+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b((?:proxy-)?authorization[\"']?\s*[=:]\s*[\"']?)[^\r\n\"']+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"\b(?:hf|sk|rk|rs|ghp|gho|glpat|xox[abp])[-_][A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"(?i)([a-z][a-z0-9+.-]{0,20}://[^\s:/@]{1,256}:)[^\s/@]{1,4096}@"), rf"\1{HIDDEN}@"),
)
_SECRET_NAME = re.compile(r"(?i)(key|token|secret|passw|credential)")
_VALUE_CHARS_MIN = 8  # a shorter value is likelier a word than a secret


def redactor(environ: Mapping[str, str]) -> Callable[[str], str]:
    """A function that hides secrets in text. ``environ`` names some: their values are hidden wherever they stand."""
    values = sorted(
        {value for name, value in environ.items() if _SECRET_NAME.search(name) and len(value) >= _VALUE_CHARS_MIN},
        key=len,
        reverse=True,
    )

    def redact(text: str) -> str:
        for value in values:
            text = text.replace(value, HIDDEN)
        for pattern, shown in _PATTERNS:
            text = pattern.sub(shown, text)
        return text

    return redact
