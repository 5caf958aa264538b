"""The sleep allocator and what stands above it, in the shapes that vLLM's had over time. Own writing."""

CUMEM = "vllm/device_allocator/cumem.py"
SHARED = "vllm/device_allocator/__init__.py"
EXECUTOR = "vllm/v1/executor/abstract.py"
ENGINE = "vllm/v1/engine/core.py"
WORKER = "vllm/v1/worker/worker_base.py"

RECORD = """
@dataclasses.dataclass
class AllocationData:
    handle: tuple
    tag: str
    cpu_backup_tensor: object = None
"""

HEAD = """
import dataclasses
from contextlib import contextmanager

import torch

from vllm.logger import init_logger

logger = init_logger(__name__)
cumem_available = False
libcudart = None
try:
    from vllm.cumem_allocator import init_module, python_create_and_map, python_unmap_and_release
    from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary

    libcudart = CudaRTLibrary()
    cumem_available = True
except ModuleNotFoundError:
    pass
"""

CLASS = '''

def create_and_map(handle):
    python_create_and_map(*handle)


def unmap_and_release(handle):
    python_unmap_and_release(*handle)


class CuMemAllocator:
    """Memory that can be given away."""

    instance = None
    default_tag = "default"

    @staticmethod
    def get_instance():
        if CuMemAllocator.instance is None:
            CuMemAllocator.instance = CuMemAllocator()
        return CuMemAllocator.instance

    def __init__(self):
        self.pointer_to_data = {}
        self.current_tag = CuMemAllocator.default_tag
        self.python_malloc_callback = self._python_malloc_callback
        self.python_free_callback = self._python_free_callback

    def _python_malloc_callback(self, handle):
        self.pointer_to_data[handle[2]] = AllocationData(handle, self.current_tag)

    def _python_free_callback(self, ptr):
        """What is freed – and what its handle was."""
        data = self.pointer_to_data.pop(ptr)
        data.cpu_backup_tensor = None
%(sync)s        logger.debug("freed %%s", ptr)
        return data.handle

    def sleep(self, offload_tags=None):
        """Give memory away."""
        for ptr, data in self.pointer_to_data.items():
%(skip)s            handle = data.handle
            if data.tag in offload_tags:
                size_in_bytes = handle[1]
                cpu_backup_tensor = torch.empty(size_in_bytes, device="cpu")
                libcudart.cudaMemcpy(cpu_backup_tensor.data_ptr(), ptr, size_in_bytes)
                data.cpu_backup_tensor = cpu_backup_tensor
%(unmap)s
        torch.cuda.empty_cache()
%(discard)s
    def wake_up(self, tags=None):
        """Take it back."""
        for ptr, data in self.pointer_to_data.items():
%(awake)s            if tags is None or data.tag in tags:
                handle = data.handle
                create_and_map(handle)
%(mark)s                if data.cpu_backup_tensor is not None:
                    cpu_backup_tensor = data.cpu_backup_tensor
                    libcudart.cudaMemcpy(ptr, cpu_backup_tensor.data_ptr(), cpu_backup_tensor.numel())
                    data.cpu_backup_tensor = None
%(zero)s
    @contextmanager
    def use_memory_pool(self, tag=None):
        """What is made here can be given away."""
        old_tag = self.current_tag
        self.current_tag = tag
        pool = torch.cuda.memory.MemPool(None)
        try:
            yield
%(trim)s
        finally:
            self.current_tag = old_tag
'''

OLD = dict.fromkeys(("sync", "skip", "discard", "awake", "mark", "zero"), "") | {
    "unmap": "            unmap_and_release(handle)",
    "trim": """            for allocation in pool.snapshot():
                if allocation["allocated_size"] == 0:
                    handle = self._python_free_callback(allocation["address"])
                    unmap_and_release(handle)""",
}
MIDDLE = OLD | {
    "sync": "        torch.cuda.synchronize(data.handle[0])\n",
    "mark": "                data.is_asleep = False\n",
    "unmap": """            try:
                unmap_and_release(handle)
            finally:
                data.is_asleep = True""",
}
NEW = MIDDLE | {
    "skip": "            if data.is_asleep:\n                continue\n",
    "awake": "            if not data.is_asleep:\n                continue\n",
    "zero": """                elif torch.version.hip:
                    libcudart.cudaMemset(ptr, 0, handle[1])
""",
    "discard": '''
    def discard(self, tags):
        """Give memory away for good."""
        for data in self.pointer_to_data.values():
            if data.tag not in tags or data.is_asleep:
                continue
            unmap_and_release(data.handle)
            data.is_asleep = True
''',
    "trim": """            for allocation in pool.snapshot():
                data = self.pointer_to_data.get(allocation["address"])
                if allocation["allocated_size"] == 0 and data and not data.is_asleep:
                    unmap_and_release(self._python_free_callback(allocation["address"]))""",
}
AWAKE_FIELD = "    is_asleep: bool = False\n"

EXECUTOR_TEXT = '''
from abc import ABC, abstractmethod


class Executor(ABC):
    """Asks all ranks."""

    @abstractmethod
    def collective_rpc(self, method, args=(), kwargs=None): ...

    @property
    def is_sleeping(self):
        return bool(self.sleeping_tags)

    def sleep(self, level: int = 1):
        if self.sleeping_tags:
            return
        self.collective_rpc("sleep", kwargs=dict(level=level))
        self.sleeping_tags |= {"weights", "kv_cache"}

    def wake_up(self, tags=None):
        if not self.is_sleeping:
            return
        self.collective_rpc(
            "wake_up",
            kwargs=dict(tags=tags),
        )
        self.sleeping_tags.clear()
'''

ENGINE_TEXT = '''
class EngineCore:
    """Owns the scheduler."""

    def sleep(self, level: int = 1):
        self.model_executor.sleep(level)

    def wake_up(self, tags=None):
        """Wake and go on."""
        if tags is not None and "scheduling" in tags:
            tags = [tag for tag in tags if tag != "scheduling"]
        if tags is None or tags:
            self.model_executor.wake_up(tags)
        if not self.model_executor.is_sleeping:
            self.resume_scheduler()
'''

WORKER_TEXT = '''
from vllm.logger import init_logger

logger = init_logger(__name__)


class WorkerWrapperBase:
    """One process."""

    rpc_rank = 0

    def __getattr__(self, name):
        return getattr(self.worker, name)
'''


def cumem(shape: dict[str, str]) -> str:
    """cumem.py in one of the shapes OLD, MIDDLE and NEW."""
    record = RECORD + (AWAKE_FIELD if shape is not OLD else "")
    return HEAD + record + CLASS % shape


def stock(shape: dict[str, str] = MIDDLE) -> dict[str, str]:
    """All files that the patches on sleeping are about."""
    return {CUMEM: cumem(shape), EXECUTOR: EXECUTOR_TEXT, ENGINE: ENGINE_TEXT, WORKER: WORKER_TEXT}
