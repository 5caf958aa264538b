"""Kernels that are installed, and which one a reboot would start. Reads files below a root; blocking."""

import contextlib
import gzip
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rotator.doctor.facts import Kernel, KernelFacts

_MODULE = re.compile(r"nvidia\.ko(\.(xz|gz|zst))?$")
_TITLE = re.compile(r"""^\s*(menuentry|submenu)\s+(?:'([^']*)'|"([^"]*)")(.*)$""")
_ID = re.compile(r"""(?:--id\s+|menuentry_id_option\s+)['"]?([^'"\s{]+)""")
_LINUX = re.compile(r"^\s*linux(?:efi|16)?\s+\S*?vmlinu[xz]-(\S+)")
_WHERE = ("updates", "extra", "weak-updates", "kernel")


@dataclass(slots=True)
class Entry:
    """An entry of GRUB's menu; a submenu has ``entries``."""

    title: str
    id: str = ""
    release: str | None = None
    entries: list["Entry"] = field(default_factory=list)


def read_kernel(root: Path) -> KernelFacts:
    running = _text(root / "proc/sys/kernel/osrelease").strip()
    menu = parse_menu(_text(root / "boot/grub/grub.cfg") or _text(root / "boot/grub2/grub.cfg"))
    titles = {release: path for path, release in _flat(menu)}
    releases = _releases(root)
    installed = tuple(_kernel(root, r, titles.get(r)) for r in releases)
    following, because = next_kernel(root, menu, releases)
    version = _text(root / "sys/module/nvidia/version").strip() or None
    return KernelFacts(running, installed, following, because, version, boots_here=bool(releases))


def read_loaded(root: Path) -> KernelFacts:
    """Only what runs: a few reads, for the look before a launch."""
    running = _text(root / "proc/sys/kernel/osrelease").strip()
    version = _text(root / "sys/module/nvidia/version").strip() or None
    return KernelFacts(running, module_version=version, boots_here=False)


def _releases(root: Path) -> list[str]:
    """Kernels that can be booted, oldest first."""
    found = {p.name.removeprefix("vmlinuz-") for p in _glob(root / "boot", "vmlinuz-*")}
    return sorted((r for r in found if not r.startswith("0-rescue") and not r.endswith(".old")), key=version_key)


def version_key(release: str) -> tuple[tuple[int, str], ...]:
    """Orders 6.17.0-9 before 6.17.0-22."""
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in re.findall(r"\d+|[a-z]+", release.lower()))


# -- modules -----------------------------------------------------------------------------------------------------------


def _kernel(root: Path, release: str, menu_entry: str | None) -> Kernel:
    files = tuple(_modules(root, release))
    version = next((v for file in files if (v := module_version(file))), None)
    return Kernel(release, tuple(f"/{f.relative_to(root)}" for f in files), version, menu_entry)


def _modules(root: Path, release: str) -> Iterator[Path]:
    """Files called nvidia.ko, as depmod knows them; looked for where it has not run."""
    for base in (root / "lib/modules" / release, root / "usr/lib/modules" / release):
        listed = [line.partition(":")[0] for line in _text(base / "modules.dep").splitlines()]
        named = [base / path for path in listed if _MODULE.search(path.rpartition("/")[2])]
        found = [path for path in named if path.exists()]
        if not found:
            found = [p for folder in _WHERE for p in _glob(base / folder, "**/nvidia.ko*") if _MODULE.match(p.name)]
        if found:
            yield from found
            return


def module_version(file: Path) -> str | None:
    """What a module says it is. None for a compression that Python lacks."""
    try:
        match file.suffix:
            case ".ko":
                data = file.read_bytes()
            case ".xz":
                data = lzma.decompress(file.read_bytes())
            case ".gz":
                data = gzip.decompress(file.read_bytes())
            case _:
                return None
    except (OSError, EOFError, lzma.LZMAError):
        return None
    found = re.search(rb"(?:^|\0)version=([0-9][0-9.]{2,31})\0", data)
    return found[1].decode() if found else None


# -- the next kernel ---------------------------------------------------------------------------------------------------


def next_kernel(root: Path, menu: list[Entry], releases: list[str]) -> tuple[str | None, str]:
    """What a reboot starts, and why. None where nobody here can tell."""
    if not releases:
        return None, ""
    if loader := _text(root / "boot/loader/loader.conf") or _text(root / "boot/efi/loader/loader.conf"):
        if chosen := re.search(r"^default\s+(\S+)", loader, re.MULTILINE):
            fitting = [r for r in releases if r in chosen[1]]
            if fitting:
                return fitting[-1], f"loader.conf says default {chosen[1]}"
        return releases[-1], "systemd-boot starts the newest"
    wanted, because = _default(root)
    if menu and (entry := _resolve(menu, wanted)) is not None:
        return entry, because
    if match := re.search(r"[Ll]inux (\d\S+)", wanted):
        named = match[1].rstrip("'\"")
        return named, because
    return releases[-1], f"{because}: the newest in /boot"


def _default(root: Path) -> tuple[str, str]:
    """GRUB's choice (an index, a title, an id, or a path of them), and where that is said."""
    kept = dict(line.split("=", 1) for line in _text(root / "boot/grub/grubenv").splitlines() if "=" in line)
    if once := kept.get("next_entry"):
        return once, f"grubenv says next_entry={once}, once"
    given = ""
    for line in _text(root / "etc/default/grub").splitlines():
        if line.strip().startswith("GRUB_DEFAULT="):
            given = line.partition("=")[2].strip().strip("'\"")
    if given == "saved":
        saved = kept.get("saved_entry", "0")
        return saved, f"GRUB_DEFAULT=saved, and grubenv says {saved}"
    return given or "0", f"GRUB_DEFAULT={given or '0'}"


def _resolve(menu: list[Entry], wanted: str) -> str | None:
    """Follow ``Advanced options>1`` or the like to an entry's kernel. One that is not there is GRUB's first."""
    entries, found = menu, None
    for part in wanted.split(">"):
        if not entries:
            break
        found = _pick(entries, part.strip())
        if found is None:
            return _first(menu)
        entries = found.entries
    return (found.release or _first(found.entries)) if found else None


def _pick(entries: list[Entry], part: str) -> Entry | None:
    if part.isdecimal():
        return entries[int(part)] if int(part) < len(entries) else None
    return next((e for e in entries if part in (e.title, e.id)), None)


def _first(entries: list[Entry]) -> str | None:
    return next((e.release or _first(e.entries) for e in entries), None)


def parse_menu(text: str) -> list[Entry]:
    """GRUB's menu from its grub.cfg, as a tree."""
    top: list[Entry] = []
    open_: list[Entry] = []
    for line in text.splitlines():
        if match := _TITLE.match(line):
            id = _ID.search(match[4])
            entry = Entry(match[2] if match[2] is not None else match[3], id[1] if id else "")
            (open_[-1].entries if open_ else top).append(entry)
            open_.append(entry)
        elif open_ and (match := _LINUX.match(line)):
            open_[-1].release = match[1]
        elif open_ and line.strip() == "}":
            open_.pop()
    return top


def _flat(menu: list[Entry], path: str = "") -> Iterator[tuple[str, str]]:
    """Each kernel with the path that GRUB_DEFAULT would name it by; the longer path, below a submenu, last."""
    for entry in menu:
        inner = f"{path}>{entry.title}" if path else entry.title
        if entry.release and "recovery" not in entry.title:
            yield inner, entry.release
        yield from _flat(entry.entries, inner)


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def _glob(folder: Path, pattern: str) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.glob(pattern))
    return []
