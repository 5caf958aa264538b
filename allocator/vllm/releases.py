"""For which vLLM releases the plugin and the overlay hook were read and are sound."""

from __future__ import annotations

import re

from allocator.errors import PluginRefused

# What was read is written down, call by call, in docs/allocator-vllm.md.
PLUGIN_MIN, PLUGIN_END = (0, 25, 1), (0, 34)
KV_CACHE_ALONE = (0, 29)  # from here on the kv_cache pool holds the cache and nothing else
OVERLAY_MIN, OVERLAY_END = (0, 19), (0, 26)


def parse(version: str) -> tuple[int, ...]:
    """`0.26.0+cu130` -> (0, 26, 0). Raises PluginRefused for what is no release."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if match is None or re.match(r"[\d.]+(?:a|b|rc|\.?dev)\d*", version):
        raise PluginRefused(f"vLLM {version} is no release, so nobody has read what it asks of its allocator")
    return tuple(int(part) for part in match.groups(default="0"))


def check(version: str, first: tuple[int, ...], end: tuple[int, ...]) -> None:
    """Raises PluginRefused with what to do."""
    if not first <= parse(version) < end:
        shown, before = (".".join(map(str, bound)) for bound in (first, end))
        raise PluginRefused(
            f"vLLM {version} is outside of what this allocator was checked with ({shown} up to, not including, "
            f"{before}): ROTATOR_ALLOCATOR=off starts the engine with the stock allocator"
        )
