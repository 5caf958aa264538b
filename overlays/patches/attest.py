"""A worker tells which patched files it runs, so that a mount that missed is found before it matters."""

from __future__ import annotations

import ast
import hashlib
import sys
from importlib import resources
from types import SimpleNamespace

from overlays.patch import Files, Patch, Target, Verdict, bug, fixed

WRAPPER = "WorkerWrapperBase"
METHOD = '''
def overlay_attest(self, paths):
    """Which files of `paths` this worker runs; see the bundle's manifest."""
    from vllm import __file__ as package

    answer = overlay_attest_files(list(paths))
    return {"rank": getattr(self, "rpc_rank", 0), "package": package, **answer}
'''


def edit(files: Files) -> None:
    source = files.source("worker")
    wrapper = source.klass(WRAPPER)
    source.insert_after(wrapper.body[-1], "\n" + METHOD)
    text = resources.files("overlays.payload").joinpath("attest.py").read_text()
    source.append("\n\n" + _embedded(text))


def _embedded(text: str) -> str:
    """The functions of the payload as part of another module, under names that nothing there has."""
    lines = text.splitlines()
    keep = (ast.FunctionDef, ast.Import, ast.ImportFrom, ast.Assign)
    parts = [
        "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(text).body
        if isinstance(node, keep) and not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
    ]
    joined = "\n".join(parts)
    names = {"def attest(": "def overlay_attest_files(", "_one(": "_overlay_attest_one("}
    names |= {"_would_load(": "_overlay_would_load(", "PATHS_MAX": "OVERLAY_PATHS_MAX"}
    for old, new in names.items():
        joined = joined.replace(old, new)
    return joined


def probe(files: Files) -> Verdict:
    module = files.load("worker", {"vllm": SimpleNamespace(__file__="/where/vllm/__init__.py")})
    method = getattr(module.WorkerWrapperBase, "overlay_attest", None)
    if method is None:
        return bug("a worker cannot be asked which files it runs")
    asked = "json/decoder.py"  # any module with a file will do
    answer = method(SimpleNamespace(rpc_rank=3), [asked])
    file = sys.modules["json.decoder"].__file__ or ""
    with open(file, "rb") as opened:
        digest = hashlib.sha256(opened.read()).hexdigest()
    told = answer["files"][0]
    if answer["rank"] != 3 or (told["path"], told["file"], told["sha256"]) != (asked, file, digest):
        return bug(f"a worker tells the wrong file: {told}")
    return fixed("a worker tells path and hash of the files that it runs")


PATCH = Patch(
    name="attest",
    targets={
        "worker": Target(
            paths=("vllm/v1/worker/worker_base.py",),
            shape=lambda tree: any(isinstance(node, ast.ClassDef) and node.name == WRAPPER for node in tree.body),
            search=("vllm/v1/*.py",),
            needle=b"class WorkerWrapperBase",
        )
    },
    releases=">=0.19.1,<0.34",
    why="a mount that missed the vLLM that the engine loads goes unnoticed, and every patch with it",
    drop_when="never: no release knows of our bundles",
    upstream=(),
    required=True,
    edit=edit,
    probe=probe,
)
__all__ = ["PATCH"]
