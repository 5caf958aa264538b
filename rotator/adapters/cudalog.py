"""Errors of CUDA, the driver, NCCL and memory in what an engine logged: what an operator looks for first."""

import re

LINES_MAX = 3
LINE_CHARS = 300
LAST_LINES = 5

# As CUDA's runtime and driver, cuBLAS, NCCL, PyTorch and the kernel's NVRM lines name their errors.
_TROUBLE = re.compile(
    r"CUDA(?: driver| runtime)? error\b|\bCUDA_ERROR_[A-Z_]+|\bcudaError[A-Z]\w*|\bCUBLAS_STATUS_(?!SUCCESS)[A-Z_]+"
    r"|\bNCCL (?:error|WARN)\b|\bnccl(?:Unhandled|System|Internal|Remote)\w*Error\b|\bNVRM: Xid\b"
    r"|torch\.(?:cuda\.)?OutOfMemoryError|\bCUDA out of memory\b|an illegal memory access was encountered"
    r"|\bdevice-side assert triggered\b|\buncorrectable ECC error\b",
)
_VARIABLE = re.compile(r"0x[0-9a-f]+|\d+")


def cuda_errors(text: str) -> tuple[str, ...]:
    """The first lines that name such an error, oldest first, each kind once (ranks repeat each other)."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := _TROUBLE.search(line):
            start = max(0, match.start() - LINE_CHARS // 2)
            shown = " ".join(line[start : start + LINE_CHARS].split())
            found.setdefault(_VARIABLE.sub("#", line[match.start() :])[:80], shown)
    return tuple(found.values())[:LINES_MAX]


def evidence(text: str) -> str:
    """On one line: errors of CUDA where there are any, then the last lines; empty for an empty log."""
    errors = cuda_errors(text)
    last = [line.strip()[:LINE_CHARS] for line in text.splitlines() if line.strip()][-LAST_LINES:]
    parts = [f"CUDA: {' | '.join(errors)}"] if errors else []
    return "; ".join([*parts, *([f"last log lines: {' | '.join(last)}"] if last else [])])
