"""The vLLM plugin: entry point `rotator_allocator` of the group `vllm.general_plugins`.

vLLM calls `register` in every process. It starts nothing on a GPU and changes two classes:
`CuMemAllocator.get_instance` makes our instance when a worker first asks for one (which it does for sleep mode only,
before the model is loaded), and `WorkerWrapperBase` gets the methods of `allocator.vllm.worker`. What cannot be sound
is refused there and then: the worker does not start, and says why.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from allocator.vllm import releases
from allocator.vllm.settings import Settings, from_environment

logger = logging.getLogger("vllm.rotator_allocator")


def register() -> None:
    """Called by vLLM, once or more in a process. Raises PluginRefused for settings that mean nothing."""
    settings = from_environment(os.environ)
    if not settings.enabled:
        logger.info("rotator: ROTATOR_ALLOCATOR is off: the stock allocator serves sleep mode")
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        logger.info("rotator: no CUDA platform: the allocator is not used")
        return
    from vllm.device_allocator import cumem
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from allocator.vllm.worker import hook_worker

    hook_instance(cumem, settings)
    hook_worker(WorkerWrapperBase, cumem, settings)


def hook_instance(cumem: Any, settings: Settings, *, first: tuple[int, ...] = releases.PLUGIN_MIN) -> None:
    """Have `CuMemAllocator.get_instance` answer with ours from the first call on. Once in a process and its forks."""
    stock = cumem.CuMemAllocator
    if getattr(stock.get_instance, "rotator", False):
        return

    def get_instance() -> Any:
        from allocator.vllm.instance import VllmAllocator

        if not isinstance(stock.instance, VllmAllocator):
            stock.instance = build(cumem, settings, first)
        return stock.instance

    get_instance.rotator = True  # type: ignore[attr-defined]  # the mark that it was hooked
    stock.get_instance = staticmethod(get_instance)


def build(cumem: Any, settings: Settings, first: tuple[int, ...]) -> Any:
    """Our instance, for the worker that asks. Raises PluginRefused with the reason."""
    import vllm
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from allocator.core import Allocator
    from allocator.errors import AllocatorError, PluginRefused
    from allocator.torch_api import TorchAllocator
    from allocator.vllm.instance import VllmAllocator
    from allocator.vllm.worker import hook_worker

    releases.check(vllm.__version__, first, releases.PLUGIN_END)
    in_place = cumem.CuMemAllocator.instance
    if in_place is not None and in_place.get_current_usage() > 0:
        raise PluginRefused("the stock allocator holds memory already: the plugin was loaded too late to take over")
    try:
        memory: Any = Allocator(**settings.allocator_arguments())
        mixes = releases.parse(vllm.__version__) < releases.KV_CACHE_ALONE
        instance = VllmAllocator(TorchAllocator(memory, trim=settings.trim), mixes_kv_cache=mixes)
    except AllocatorError as error:
        raise PluginRefused(
            f"the rotator allocator cannot run here: {error} (ROTATOR_ALLOCATOR=off starts with the stock one)"
        ) from error
    hook_worker(WorkerWrapperBase, cumem, settings)  # an overlay comes without `register`
    logger.info("rotator: the allocator serves sleep mode in this worker: %s", settings)
    return instance
