"""Takes secrets out of text that is kept as evidence: by what they look like, by their names, by their values."""

import re
from collections.abc import Callable, Iterator, Mapping

HIDDEN = "[hidden]"
_NAMES = r"(?:api[-_]?key|access[-_]?key|auth[-_]?token|hf[-_]?token|token|secret|password|passwd|credential)s?"
# Every repetition that something must follow is bounded: a line of one letter must not take seconds.
_PATTERNS = (
    # name=value, name: value, "name": "value", \"name\": \"value\", name=b'value', name=['value', 'value']
    (
        re.compile(
            rf"""(?i)\b([\w-]{{0,64}}{_NAMES}\\{{0,3}}["']?\s*[=:]\s*"""
            r"""(?:(?P<list>\[\s*)(?=["'])|(?P<double>b?\\{0,3}")|(?P<single>b?\\{0,3}'))?)"""
            r"""(?(list)[^\]]{1,4096}|(?(double)[^"\\\n]{1,4096}|(?(single)[^'\\\n]{1,4096}"""
            r"""|(?!\d+(?:\.\d+)?\b)[^\s"',;&\[\\]+)))"""
        ),
        rf"\1{HIDDEN}",
    ),
    # --name value, "--name", "value"
    (re.compile(rf"""(?i)(--[\w-]{{0,64}}{_NAMES}(?:\s+|["'],\s*)["']?)(?!-)[^\s"']+"""), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b((?:proxy-)?authorization[\"']?\s*[=:]\s*[\"']?)[^\r\n\"']+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"\b(?:hf|sk|rk|rs|ghp|gho|github_pat|glpat|xox[abp])[-_][A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"), HIDDEN),
    (re.compile(r"(?i)([a-z][a-z0-9+.-]{0,20}://[^\s:/@]{1,256}:)[^\s/@]{1,4096}@"), rf"\1{HIDDEN}@"),
)
_SECRET_NAME = re.compile(r"(?i)(key|token|secret|passw|credential)")
_PIECE_CHARS = 16 << 10  # a search holds the interpreter's lock until it is done: some milliseconds
_VALUE_CHARS_MIN = 8  # a shorter value is likelier a word than a secret


def redactor(environ: Mapping[str, str]) -> Callable[[str], str]:
    """A function that hides secrets in text. ``environ`` names some: their values are hidden wherever they stand."""
    values = sorted(
        {value for name, value in environ.items() if _SECRET_NAME.search(name) and len(value) >= _VALUE_CHARS_MIN},
        key=len,
        reverse=True,
    )

    def hide(text: str) -> str:
        for value in values:
            text = text.replace(value, HIDDEN)
        for pattern, shown in _PATTERNS:
            text = pattern.sub(shown, text)
        return text

    def redact(text: str) -> str:
        return "".join(map(hide, _pieces(text)))

    return redact


def _pieces(text: str) -> Iterator[str]:
    """Cut at ends of lines, but not where the next line may be the value of what this one names."""
    begun, chars = list[str](), 0
    for line in text.splitlines(keepends=True):
        begun.append(line)
        chars += len(line)
        if chars >= _PIECE_CHARS and not line.rstrip().endswith((",", ":", "=", "\\")):
            yield "".join(begun)
            begun, chars = [], 0
    yield "".join(begun)
