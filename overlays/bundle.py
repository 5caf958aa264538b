"""Bundles on disk: written whole or not at all, side by side, one of each build marked as current.

ROOT/<hash>/manifest.json, ROOT/<hash>/files/vllm/...      bundles, never changed once they are there
ROOT/current/<version>-<build id>                          a link to the bundle that jobs shall mount
ROOT/.building-*                                           what an interrupted build left; the next one removes it
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from overlays import __version__, manifest
from overlays.build import Patched, Result, apply_all, digest
from overlays.errors import BundleBroken, OverlayError, RequiredFailed
from overlays.manifest import BuildFacts, FileFacts, Manifest, PatchFacts
from overlays.patch import Patch
from overlays.recording import Recorder
from overlays.sources import Source

_TEMPORARY = ".building-"
CURRENT = "current"


@dataclass(frozen=True, slots=True)
class Built:
    """A bundle, and whether it was there before."""

    path: Path
    manifest: Manifest
    existed: bool


def build(source: Source, patches: Sequence[Patch], root: Path, *, strict: bool = False, current: bool = True) -> Built:
    """Patch the build and write the bundle under `root`; the build itself is only read.

    Raises RequiredFailed (`strict`: for any patch that failed), SourceError, BundleBroken, OverlayError.
    """
    facts, files = compose(source, patches, strict=strict)
    with _locked(root):
        target = root / facts.bundle
        existed = target.exists()
        if existed:
            check(target)
        else:
            _write(root, target, facts, files)
        if current:
            make_current(root, target)
        return Built(target, manifest.read(target), existed)


def compose(source: Source, patches: Sequence[Patch], *, strict: bool = False) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and the files of a bundle, in memory. Raises RequiredFailed, SourceError."""
    recorder = Recorder(source)
    patched = apply_all(recorder, patches)
    blocking = [outcome for outcome in patched.failed if outcome.required or strict]
    blocking += [outcome for outcome in patched.outcomes if outcome.required and outcome.outside]
    if blocking:
        lines = "\n".join(f"  {outcome.patch}: {outcome.reason}" for outcome in blocking)
        raise RequiredFailed(f"no bundle for {source.name} ({source.version or 'no version'}):\n{lines}")
    files = {path: _marked(path, data) for path, data in sorted(patched.files.items())}
    return _manifest(recorder, patched, patches, files), files


def _marked(path: str, data: bytes) -> bytes:
    """The file with the line by which its module tells what it was compiled from. It must compile."""
    lead = b"" if data.endswith(b"\n") or not data else b"\n"
    marked = data + lead + f'__overlay__ = "{digest(data)}"\n'.encode()
    compile(marked, path, "exec", dont_inherit=True)
    return marked


def body_of(data: bytes) -> bytes:
    """What `__overlay__` in the last line is the hash of; a newline that was added for that line is left out."""
    body, _, last = data.removesuffix(b"\n").rpartition(b"\n")
    for candidate in (body + b"\n", body):
        if last == f'__overlay__ = "{digest(candidate)}"'.encode():
            return candidate
    raise BundleBroken("the last line is not the mark of the lines before it")


def _manifest(recorder: Recorder, patched: Patched, patches: Sequence[Patch], files: dict[str, bytes]) -> Manifest:
    identity = recorder.identity()
    seen = {path: digest(data) for path, data in sorted(recorder.seen.items()) if data is not None}
    by_name = {patch.name: patch for patch in patches}
    facts = Manifest(
        bundle="",
        tool=f"overlays {__version__}",
        build=BuildFacts(id=identity, version=recorder.version, name=recorder.name, files=seen),
        files=tuple(
            FileFacts(
                path=path,
                source_sha256=seen.get(path),
                sha256=digest(data),
                body_sha256=digest(patched.files[path]),
                bytes=len(data),
            )
            for path, data in files.items()
        ),
        patches=tuple(
            PatchFacts(
                name=outcome.patch,
                required=outcome.required,
                result=outcome.result.value,
                reason=outcome.reason,
                paths=outcome.paths if outcome.result is Result.APPLIED else (),
                upstream=by_name[outcome.patch].upstream,
                drop_when=by_name[outcome.patch].drop_when,
            )
            for outcome in patched.outcomes
        ),
    )
    return facts.model_copy(update={"bundle": facts.content_hash()})


def check(bundle: Path) -> Manifest:
    """The manifest of a bundle that is whole. Raises BundleBroken with what is wrong."""
    facts = manifest.read(bundle)
    wrong = [f"its content is {facts.content_hash()}"] if facts.bundle != facts.content_hash() else []
    if not bundle.is_symlink() and bundle.name != facts.bundle:
        wrong.append(f"it lies in a folder named {bundle.name}")
    stated = {item.path: item for item in facts.files}
    found = {p.relative_to(bundle / manifest.FILES).as_posix(): p for p in _files_in(bundle / manifest.FILES)}
    wrong += [f"{path} is missing" for path in sorted(stated.keys() - found.keys())]
    wrong += [f"{path} does not belong to it" for path in sorted(found.keys() - stated.keys())]
    for path in sorted(stated.keys() & found.keys()):
        data = found[path].read_bytes()
        if found[path].is_symlink() or digest(data) != stated[path].sha256:
            wrong.append(f"{path} has other bytes: SHA-256 {digest(data)}, not {stated[path].sha256}")
        elif digest(body_of(data)) != stated[path].body_sha256:
            wrong.append(f"{path} bears another mark than the manifest says")
    if wrong:
        raise BundleBroken(f"bundle {facts.bundle} in {bundle} was altered or is incomplete: {'; '.join(wrong)}")
    return facts


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]


def mounts(bundle: Path, facts: Manifest, root: str) -> dict[str, str]:
    """Host path -> path in the container; `root` is the folder there that holds the package `vllm`."""
    place = root.rstrip("/")
    return {str((bundle / manifest.FILES / item.path).absolute()): f"{place}/{item.path}" for item in facts.files}


def bundles(root: Path) -> list[Path]:
    """All bundles under a root, by name."""
    if not root.is_dir():
        raise OverlayError(f"{root} is no folder with bundles; build one with: python -m overlays build --out {root}")
    return sorted(path for path in root.iterdir() if (path / manifest.NAME).is_file() and not path.is_symlink()
                  and not path.name.startswith("."))  # fmt: skip


def current_of(root: Path) -> dict[str, str]:
    """Build ("0.26.0-1f2e3d4c5b6a") -> name of its current bundle."""
    folder = root / CURRENT
    if not folder.is_dir():
        return {}
    return {link.name: Path(os.readlink(link)).name for link in sorted(folder.iterdir()) if link.is_symlink()}


def build_name(facts: Manifest) -> str:
    return f"{facts.build.version or 'unknown'}-{facts.build.id[:12]}"


def make_current(root: Path, bundle: Path) -> None:
    """Point the link of the bundle's build at it, in one step. Raises BundleBroken if it is not whole, OverlayError."""
    facts = check(bundle)
    folder = root / CURRENT
    with _told(root):
        folder.mkdir(exist_ok=True)
        temporary = folder / f"{_TEMPORARY}{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("..") / bundle.name)
        temporary.replace(folder / build_name(facts))
        _sync(folder)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One build under a root at a time; what earlier ones left half done is removed."""
    with _told(root):
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with _told(root):
            for left in root.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(left)
        yield
    finally:
        os.close(handle)


def _write(root: Path, target: Path, facts: Manifest, files: dict[str, bytes]) -> None:
    """Everything under another name, onto the disk, then renamed."""
    with _told(root):
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=root))
        try:
            for path, data in files.items():
                _write_file(temporary / manifest.FILES / path, data)
            (temporary / manifest.FILES).mkdir(exist_ok=True)
            _write_file(temporary / manifest.NAME, facts.model_dump_json(indent=2).encode() + b"\n")
            temporary.chmod(0o755)
            for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
                _sync(folder)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(root)


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
    path.chmod(0o444)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _told(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or root
        raise OverlayError(f"cannot write {place}: {error.strerror}; choose a folder of your own with --out") from None


def strangers(facts: Manifest, source: Source) -> list[str]:
    """Files of a build that are not those which the bundle was built from, a line each."""
    found = []
    for path, sha in facts.build.files.items():
        data = source.read(path)
        if data is None or digest(data) != sha:
            there = "is not there" if data is None else f"is {digest(data)}"
            wanted = f"the bundle is for vLLM {facts.build.version or 'of no version'}, where it is {sha}"
            found.append(f"{path} of {source.name} {there}; {wanted}")
    return found
