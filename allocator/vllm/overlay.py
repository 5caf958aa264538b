"""The hook for vLLM releases without plugins that reach the allocator (0.19 to 0.25): an overlaid cumem.py calls it.

An overlay is vLLM's own `vllm/device_allocator/cumem.py` of that release with this as its last lines, and nothing else:

    from allocator.vllm.overlay import take_over
    take_over(globals())

`take_over` needs the module to define `CuMemAllocator` with `instance` and the static method `get_instance`, and
workers to reach it through `CuMemAllocator.get_instance()`: true of 0.19.1 to 0.25.1. It raises at import otherwise, so
that an overlay on the wrong release cannot be mistaken for one that works. The engine must be able to import
`allocator`. The worker methods and the background `prepare()` come with the first call of `get_instance`.
"""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any

from allocator.errors import PluginRefused
from allocator.vllm import hook_instance, releases
from allocator.vllm.settings import from_environment

logger = logging.getLogger("vllm.rotator_allocator")


def take_over(module_globals: dict[str, Any]) -> None:
    """Put our allocator in the place of `CuMemAllocator.instance`. Raises PluginRefused with the reason."""
    settings = from_environment(os.environ)
    if not settings.enabled:
        return
    import vllm

    releases.check(vllm.__version__, releases.OVERLAY_MIN, releases.OVERLAY_END)
    stock = module_globals.get("CuMemAllocator")
    if not hasattr(stock, "get_instance") or not hasattr(stock, "instance"):
        raise PluginRefused("this file defines no CuMemAllocator with instance and get_instance: a wrong overlay")
    module = SimpleNamespace(CuMemAllocator=stock, __file__=module_globals.get("__file__", ""))
    hook_instance(module, settings, first=releases.OVERLAY_MIN)
