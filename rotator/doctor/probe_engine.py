"""An engine's command and Python environment, read from files: nothing is run, nothing imported. Blocking."""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rotator.doctor.facts import Launch, Software
from rotator.doctor.judge_engine import DEEP_GEMM

_PACKAGES = ("torch", "vllm", "deep_gemm", "flashinfer_python", "rotator", "triton", "xgrammar")
_PREFIXES = ("nvidia_nccl",)
_SITES = ("lib/python3*/site-packages", "lib64/python3*/site-packages", "lib/python3*/dist-packages")
_LOCAL_SITES = ("local/lib/python3*/dist-packages",)
_ENTRY = re.compile(r"^\s*from\s+([A-Za-z_]\w*)[\w.]*\s+import\s+", re.MULTILINE)
_FIRST_LINE_MAX = 512


@dataclass(frozen=True, slots=True)
class Program:
    """Where a command's program lies and what would run it, by paths as the engine sees them."""

    path: str
    problem: str = ""
    interpreter: str = ""
    package: str = ""

    @property
    def prefix(self) -> str:
        """The environment's root: the folder above bin. Links are not followed: a venv's python is one."""
        return self.prefixes[0] if self.prefixes else ""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Of the interpreter, and of the program itself: one of a user's own packages lies beside them."""
        homes = (home for home in (self.interpreter, self.path) if "/" in home)
        return tuple(dict.fromkeys(os.path.dirname(os.path.dirname(home)) for home in homes))


def find_program(root: Path, command: tuple[str, ...], path: str, workdir: str | None) -> Program:
    """``path`` is the PATH that the engine would have."""
    word = command[0]
    if workdir is not None and not _under(root, workdir).is_dir():
        return Program(workdir, "workdir-missing")
    if "/" in word:
        where = os.path.join(workdir or "", word)
    else:
        found = _which(root, word, path)
        if found is None:
            return Program(word, "missing", package=_package_of(word))
        where = found
    file = _under(root, where)
    if not os.path.lexists(file) or not file.exists():
        return Program(where, "missing", _python_beside(root, where), _package_of(word))
    if file.is_dir():
        return Program(where, "folder")
    if not os.access(file, os.X_OK):
        return Program(where, "not-executable")
    return _script(root, where, file, path)


def _script(root: Path, where: str, file: Path, path: str) -> Program:
    head = _head(file)
    if not head.startswith("#!"):
        is_python = re.match(r"python3?(\.\d+)?$", os.path.basename(where))
        return Program(where, interpreter=where if is_python else "")
    words = shlex.split(head[2:].splitlines()[0]) if head[2:].strip() else []
    if not words:
        return Program(where, "interpreter-missing", "(nothing)")
    interpreter: str | None = words[0]
    if os.path.basename(words[0]) == "env" and len(words) > 1:
        name = next((w for w in words[1:] if not w.startswith("-") and "=" not in w), "")
        interpreter = _which(root, name, path)
        if interpreter is None:
            return Program(where, "interpreter-missing", name)
    if interpreter is None or not _under(root, interpreter).exists():
        return Program(where, "interpreter-missing", interpreter or "")
    imported = (name for name in _ENTRY.findall(head) if name not in sys.stdlib_module_names)
    return Program(where, interpreter=interpreter, package=next(imported, "") if "python" in interpreter else "")


def _package_of(word: str) -> str:
    """What a vanished program would have started: an entry point is called as its package, mostly."""
    return os.path.basename(word).replace("-", "_")


def _python_beside(root: Path, where: str) -> str:
    """The interpreter of the environment in whose bin the program should lie."""
    folder = os.path.dirname(where)
    return next((f"{folder}/{n}" for n in ("python", "python3") if _under(root, f"{folder}/{n}").exists()), "")


def look_at_launch(
    root: Path, engine: str, command: tuple[str, ...], path: str, workdir: str | None, *, has_path: bool = False
) -> Launch:
    """``has_path``: Python is told to look elsewhere too, so that nobody here can say what is missing."""
    program = find_program(root, command, path, workdir)
    packages = environment(root, *program.prefixes)
    version = packages.get(program.package)
    problem = program.problem
    is_missed = bool(program.package and packages) and version is None and not has_path
    if not problem and is_missed and program.package not in _others(root, program):
        problem = "import-missing"
    return Launch(engine, program.path, problem, program.interpreter, program.package, version, command)


def _others(root: Path, program: Program) -> set[str]:
    """Packages that were put there in another way than by an installer (an editable install, a folder)."""
    names: set[str] = set()
    for site in sites(root, *program.prefixes):
        with contextlib.suppress(OSError):
            for name in os.listdir(site):
                if name.endswith((".pth", ".egg-link")) and "distutils" not in name:
                    names.add(program.package)  # it may lead anywhere: give it the benefit of the doubt
                names.add(name.removesuffix(".py"))
    return names


# -- the environment ---------------------------------------------------------------------------------------------------


def look_at_software(root: Path, engine: str, program: Program, model_type: str = "") -> Software:
    found = sites(root, *program.prefixes)
    if not found:
        return Software(engine, model_type=model_type)
    python = program.interpreter or _python_beside(root, program.path) or f"{program.prefix}/bin/python"
    packages = environment(root, *program.prefixes)
    modules = frozenset(m for m in DEEP_GEMM if any(_is_module(site, m) for site in found))
    return Software(engine, program.prefix, python, packages, _torch_cuda(found), modules, model_type=model_type)


def sites(root: Path, *prefixes: str) -> list[Path]:
    """The folders that Python would look for packages in, for environments at these places."""
    found: list[Path] = []
    for prefix in prefixes:
        base = _under(root, prefix)
        patterns = _SITES if prefix != "/usr" else (*_LOCAL_SITES, *_SITES)
        found += [p for pattern in patterns for p in _glob(base, pattern)]
        if prefix == "/usr/local":
            found += _glob(_under(root, "/usr"), "lib/python3*/dist-packages")
    return found


def environment(root: Path, *prefixes: str) -> Mapping[str, str]:
    """Versions by distribution (with underscores), of those that matter here."""
    versions: dict[str, str] = {}
    for site in sites(root, *prefixes):
        with contextlib.suppress(OSError):
            for name in os.listdir(site):
                if name.endswith(".dist-info"):
                    package, _, version = name.removesuffix(".dist-info").partition("-")
                    package = package.lower().replace("-", "_")
                    if package in _PACKAGES or package.startswith(_PREFIXES):
                        versions.setdefault(package, version)
        for package in ("vllm", "torch"):
            if package in versions and not (site / package).is_dir() and not _elsewhere(site):
                del versions[package]  # its notes are there, its files are not
            elif package not in versions and (found := _own_version(site / package)):
                versions[package] = found
    return versions


def _elsewhere(site: Path) -> bool:
    """Whether packages may lie outside of the folder: an editable install."""
    return any(p.name.startswith("__editable__") or p.suffix == ".egg-link" for p in _glob(site, "*.pth"))


def _own_version(package: Path) -> str | None:
    """What a package's files say, where no installer left a note: it was unpacked by hand."""
    for name in ("_version.py", "version.py"):
        if match := re.search(
            r"""^(?:__version__|version)\b[^=]*=\s*(?:version\s*=\s*)?['"]([^'"]+)""",
            _head(package / name, 1 << 14),
            re.M,
        ):
            return match[1]
    return "unknown" if (package / "__init__.py").is_file() else None


def _torch_cuda(found: list[Path]) -> str | None:
    """The CUDA that torch was built for, "" for none. None where there is no torch to look at."""
    for site in found:
        text = _head(site / "torch/version.py", 1 << 14)
        if match := re.search(r"^cuda\b[^=]*=\s*(?:'([^']*)'|\"([^\"]*)\"|None)", text, re.MULTILINE):
            is_amd = re.search(r"^hip\b[^=]*=\s*['\"]", text, re.MULTILINE)
            return None if is_amd else match[1] or match[2] or ""
    return None


def _is_module(site: Path, name: str) -> bool:
    where = site / name.replace(".", "/")
    return (where / "__init__.py").is_file() or where.with_suffix(".py").is_file()


# -- paths -------------------------------------------------------------------------------------------------------------


def _which(root: Path, name: str, path: str) -> str | None:
    for folder in path.split(":"):
        file = _under(root, folder or ".") / name
        if name and file.is_file() and os.access(file, os.X_OK):
            return f"{folder.rstrip('/')}/{name}"
    return None


def _under(root: Path, path: str) -> Path:
    """A path as it lies below the root; relative ones are as they are."""
    return root / path.lstrip("/") if path.startswith("/") else Path(path)


def _head(file: Path, size: int = _FIRST_LINE_MAX) -> str:
    with contextlib.suppress(OSError), file.open("rb") as opened:
        return opened.read(size).decode(errors="replace")
    return ""


def _glob(folder: Path, pattern: str) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.glob(pattern))
    return []
