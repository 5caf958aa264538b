"""What the plugin adds to vLLM's worker: methods for `/collective_rpc`, and a `prepare()` once warm-up is over.

They are put on `WorkerWrapperBase`, which stands before the worker in every executor and hands on what it lacks itself.
Arguments come as strings or numbers, answers are plain JSON.
"""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from allocator.errors import AllocatorError, PluginRefused
from allocator.vllm.instance import VllmAllocator
from allocator.vllm.settings import Settings

logger = logging.getLogger("vllm.rotator_allocator")

_MARK = "rotator_attest"  # a wrapper that has it was hooked


def hook_worker(wrapper: Any, cumem: Any, settings: Settings) -> None:
    """Add the methods to vLLM's `WorkerWrapperBase`, once in a process and in what it forks."""
    if _MARK in vars(wrapper):
        return

    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.worker.compile_or_warm_up_model(*args, **kwargs)
        after_warm_up(cumem, settings)
        return result

    wrapper.compile_or_warm_up_model = compile_or_warm_up_model
    wrapper.rotator_sleep_bytes = _sleep_bytes(cumem)
    wrapper.rotator_wake = _wake(cumem)
    wrapper.rotator_prepare = _prepare(cumem)
    wrapper.rotator_masters = _masters(cumem)
    wrapper.rotator_memory = _memory(cumem)
    wrapper.rotator_attest = _attest(cumem)


def after_warm_up(cumem: Any, settings: Settings) -> None:
    """Weights are final and graphs captured: tidy up while nobody waits, then take masters while the engine serves."""
    instance = _instance_or_none(cumem)
    if instance is None:
        logger.info("rotator: sleep mode is off, so the allocator is not in use here")
        return
    gc.collect()
    instance.torch.drop_dead(full_gc=False)
    if settings.prepare:
        try:
            instance.torch.prepare(wait=False)
        except AllocatorError as error:  # the first sleep is slower, and nothing else is worse
            logger.warning("rotator: masters are not taken ahead: %s", error)


def _sleep_bytes(cumem: Any) -> Callable[..., dict[str, Any]]:
    def rotator_sleep_bytes(self: Any, bytes_wanted: int | str) -> dict[str, Any]:
        """Give back at least `bytes_wanted` a device, KV cache first. The scheduler must stand still and hold no block:
        /sleep?level=0, then /reset_prefix_cache?reset_running_requests=true; after rotator_wake,
        /wake_up?tags=scheduling."""
        if getattr(self.vllm_config, "kv_transfer_config", None) is not None:
            raise PluginRefused("a KV connector has the cache registered: use /sleep, which tells it")
        return asdict(_instance(cumem).sleep_bytes(int(bytes_wanted)))

    return rotator_sleep_bytes


def _wake(cumem: Any) -> Callable[..., dict[str, Any]]:
    def rotator_wake(self: Any) -> dict[str, Any]:
        """Take back what rotator_sleep_bytes gave."""
        instance = _instance(cumem)
        instance.wake_up(None)
        # Releases up to 0.30 set the scales of a quantized cache anew when it returns; later ones keep them as runtime.
        restore = getattr(self.worker.model_runner, "post_kv_cache_wake_up", None)
        if restore is not None:
            restore()
        instance.torch.synchronize()
        return {} if instance.last_wake is None else asdict(instance.last_wake)

    return rotator_wake


def _prepare(cumem: Any) -> Callable[..., dict[str, Any]]:
    def rotator_prepare(self: Any, wait: bool | str = False) -> dict[str, Any]:
        """Take masters now: in the background, or before it answers."""
        torch = _instance(cumem).torch
        done = torch.prepare(wait=str(wait).lower() in ("1", "true"))
        return {"report": _plain(done), "status": asdict(torch.prepare_status())}

    return rotator_prepare


def _masters(cumem: Any) -> Callable[..., dict[str, Any]]:
    def rotator_masters(self: Any, where: str) -> dict[str, Any]:
        """Where masters go from now on: `host` memory, or `disk`, to which those there are move too. `none` gives back
        the host memory of what is awake: the next sleep copies it out again."""
        torch = _instance(cumem).torch
        match where:
            case "none":
                return {"bytes": torch.release_masters()}
            case "host" | "disk":
                return {"bytes": torch.place_masters(where)}
            case _:
                raise PluginRefused(f"masters cannot be put to {where!r}: there are 'host', 'disk' and 'none'")

    return rotator_masters


def _memory(cumem: Any) -> Callable[..., dict[str, Any]]:
    def rotator_memory(self: Any) -> dict[str, Any]:
        instance = _instance(cumem)
        return {
            "usage": [_plain(row) for row in instance.torch.memory_usage()],
            "host": _plain(instance.torch.host_memory()),
            "asleep": sorted(instance.torch.asleep_tags()),
            "prepare": asdict(instance.torch.prepare_status()),
            "last_sleep": _plain(instance.last_sleep),
            "last_wake": _plain(instance.last_wake),
            "wall_s": dict(instance.wall_s),
        }

    return rotator_memory


def _attest(cumem: Any) -> Callable[..., dict[str, Any]]:
    def rotator_attest(self: Any) -> dict[str, Any]:
        """Which files this worker truly runs, for whoever mounted them."""
        import torch
        import vllm

        return {
            "active": _instance_or_none(cumem) is not None,
            "rank": getattr(self, "rpc_rank", 0),
            "libraries": [_file(path) for path in loaded_libraries()],
            "cumem": _file(Path(cumem.__file__)),
            "plugin": _file(Path(__file__)),
            "vllm": str(vllm.__version__),
            "vllm_path": str(vllm.__file__),
            "torch": str(torch.__version__),  # a class of torch's own, which no wire knows
        }

    return rotator_attest


def loaded_libraries(maps: Path = Path("/proc/self/maps")) -> list[Path]:
    """The allocator libraries that are mapped into this process, as the kernel sees it."""
    names = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if "librotator_alloc" in line}
    return [Path(name) for name in sorted(names)]


def _file(path: Path) -> dict[str, str]:
    try:
        return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except OSError as error:  # removed or replaced since it was loaded: that is worth knowing too
        return {"path": str(path), "sha256": "", "error": str(error)}


def _instance_or_none(cumem: Any) -> VllmAllocator | None:
    instance = cumem.CuMemAllocator.instance
    return instance if isinstance(instance, VllmAllocator) else None


def _instance(cumem: Any) -> VllmAllocator:
    instance = _instance_or_none(cumem)
    if instance is None:
        raise PluginRefused("the allocator is not in use here: the engine was started without --enable-sleep-mode")
    return instance


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
