"""Which patches there are, and in which order they go in."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter

import overlays.patches
from overlays.errors import PatchDeclined
from overlays.patch import Patch


def all_patches() -> tuple[Patch, ...]:
    """Every `PATCH` under overlays/patches, in order. Raises PatchDeclined."""
    found = []
    for entry in pkgutil.iter_modules(overlays.patches.__path__):
        if entry.name.startswith("_"):
            continue
        patch = getattr(importlib.import_module(f"overlays.patches.{entry.name}"), "PATCH", None)
        if not isinstance(patch, Patch):
            raise PatchDeclined(f"overlays/patches/{entry.name}.py defines no PATCH")
        if patch.name != entry.name.replace("_", "-"):
            raise PatchDeclined(f"overlays/patches/{entry.name}.py has a patch named {patch.name}")
        found.append(patch)
    return ordered(found)


def ordered(patches: Iterable[Patch]) -> tuple[Patch, ...]:
    """By `after`, and by name where that says nothing. Names in `after` that are not there are passed over."""
    by_name = {patch.name: patch for patch in patches}
    graph = TopologicalSorter({name: [n for n in by_name[name].after if n in by_name] for name in sorted(by_name)})
    try:
        graph.prepare()
    except CycleError as error:
        raise PatchDeclined(f"patches go in after each other in a circle: {error.args[1]}") from None
    out: list[Patch] = []
    while graph.is_active():
        ready = sorted(graph.get_ready())
        out += [by_name[name] for name in ready]
        graph.done(*ready)
    return tuple(out)


def chosen(patches: Sequence[Patch], only: Iterable[str], without: Iterable[str]) -> tuple[Patch, ...]:
    """Some of the patches, by name. Raises PatchDeclined for a name that no patch has."""
    names = {patch.name for patch in patches}
    only, without = set(only), set(without)
    if strange := (only | without) - names:
        raise PatchDeclined(f"there is no patch {', '.join(sorted(strange))}; there are {', '.join(sorted(names))}")
    return tuple(patch for patch in patches if (not only or patch.name in only) and patch.name not in without)
