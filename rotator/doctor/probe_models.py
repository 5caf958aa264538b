"""Model folders and overlays: is every file there, and whole? Reads headers, not weights. Blocking."""

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rotator.doctor.facts import Model, OverlayFile, Shard

_INDEX = "model.safetensors.index.json"
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "tokenizer_config.json",
)
_HEADER_BYTES_MAX = 100_000_000  # safetensors' own bound
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.gguf")
_SHOWN_MAX = 20


def look_at_model(engine: str, folder: Path, shown: str, *, weights: bool = True) -> Model:
    """``shown`` is the path as the fleet file names it. Without ``weights`` they come from elsewhere, or in a form that
    is not known here."""
    try:
        if not folder.is_dir():
            exists = folder.exists()
            why = "" if not exists else "it is a file" if folder.suffix != ".gguf" else ""
            return Model(engine, shown, exists and not why, trouble=why, has_tokenizer=True)
        if not weights:
            return Model(engine, shown, True, model_type=model_type(folder))
        return _folder(engine, folder, shown)
    except OSError as e:
        return Model(engine, shown, False, trouble=f"{e.filename or shown}: {e.strerror}")


def _folder(engine: str, folder: Path, shown: str) -> Model:
    trouble, shards = "", tuple[Shard, ...]()
    try:
        shards = tuple(_shards(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        trouble = f"{shown}/{_INDEX}: {str(e) or type(e).__name__}"
    weights = shards or any(next(folder.glob(p), None) for p in _OTHER_WEIGHTS)
    if not weights and not trouble:
        shards = (Shard("model.safetensors", None),)
    incomplete = tuple(p.name for p in folder.glob(".cache/huggingface/download/**/*.incomplete"))
    config = folder / "config.json"
    return Model(
        engine,
        shown,
        True,
        shards,
        incomplete[:_SHOWN_MAX],
        config.is_file() or (folder / "params.json").is_file(),
        any((folder / name).is_file() for name in _TOKENIZERS),
        model_type(folder),
        trouble,
    )


def model_type(folder: Path) -> str:
    """As config.json says; empty where it does not."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return str(json.loads((folder / "config.json").read_bytes()).get("model_type") or "")
    return ""


def _shards(folder: Path) -> Iterator[Shard]:
    """Raises ValueError and its like for an index that makes no sense."""
    index = folder / _INDEX
    if not index.is_file():
        for file in sorted(folder.glob("*.safetensors")):
            yield _shard(file, ())
        return
    by_file: dict[str, list[str]] = {}
    for tensor, name in json.loads(index.read_bytes())["weight_map"].items():
        by_file.setdefault(str(name), []).append(tensor)
    for name, tensors in sorted(by_file.items()):
        if "/" in name or name.startswith("."):
            raise ValueError(f"it names a file outside of the folder: {name}")
        yield _shard(folder / name, tuple(tensors))


def _shard(file: Path, tensors: tuple[str, ...]) -> Shard:
    try:
        size = file.stat().st_size  # a link of the hub's cache that leads nowhere counts as missing
    except FileNotFoundError:
        return Shard(file.name, None)
    header = _header(file, size)
    if header is None:
        return Shard(file.name, size)
    length, entries = header
    ends = [int(e["data_offsets"][1]) for name, e in entries.items() if name != "__metadata__"]
    absent = sum(1 for tensor in tensors if tensor not in entries)
    return Shard(file.name, size, 8 + length + max(ends, default=0), absent)


def _header(file: Path, size: int) -> tuple[int, Mapping[str, Any]] | None:
    """Its length and what it says; None for what is no safetensors file."""
    with file.open("rb") as opened, contextlib.suppress(ValueError, KeyError, TypeError, struct.error):
        (length,) = struct.unpack("<Q", opened.read(8))
        if 2 <= length <= min(_HEADER_BYTES_MAX, size - 8):
            entries = json.loads(opened.read(length))
            return (length, entries) if isinstance(entries, dict) else None
    return None


# -- overlays ----------------------------------------------------------------------------------------------------------


def look_at_overlay(engine: str, manifest: Path) -> Iterator[OverlayFile]:
    """Every file of a bundle beside its hash. Raises ValueError for a manifest that says nothing usable."""
    try:
        facts = json.loads(manifest.read_bytes())
        if facts["format"] != 1:
            raise ValueError(f"it has format {facts['format']}, and only 1 is known")
        wanted = {str(entry["path"]): str(entry["sha256"]) for entry in facts["files"]}
    except OSError as e:
        raise ValueError(e.strerror or str(e)) from None
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"it is no manifest of a bundle ({e!r})") from None
    for path, sha256 in sorted(wanted.items()):
        if path.startswith("/") or ".." in Path(path).parts:
            raise ValueError(f"it names a file outside of the bundle: {path}")
        yield OverlayFile(str(manifest.parent), path, sha256, _sha256(manifest.parent / "files" / path), engine)


def _sha256(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None
