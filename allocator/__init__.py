"""Device memory that can sleep: segments by tag, masters in host memory, transactional sleep and wake."""

from __future__ import annotations

from allocator.core import Allocator
from allocator.errors import (
    AddressesExhausted,
    AllocatorError,
    AlreadyAsleep,
    Capturing,
    DriverError,
    DriverMissing,
    ForeignPointer,
    HostMemoryExhausted,
    InvalidSize,
    LibraryMissing,
    NestedRegion,
    NotAsleep,
    OutOfMemory,
    PluginRefused,
    RollbackFailed,
    TagAsleep,
    TorchUnsupported,
    UnknownTag,
    UsageError,
)
from allocator.torch_api import TorchAllocator
from allocator.values import TAGS, DeviceMemory, HostMemory, Segment, SleepReport, Tag, TagUsage, WakeReport

__all__ = [
    "TAGS",
    "AddressesExhausted",
    "Allocator",
    "AllocatorError",
    "AlreadyAsleep",
    "Capturing",
    "DeviceMemory",
    "DriverError",
    "DriverMissing",
    "ForeignPointer",
    "HostMemory",
    "HostMemoryExhausted",
    "InvalidSize",
    "LibraryMissing",
    "NestedRegion",
    "NotAsleep",
    "OutOfMemory",
    "PluginRefused",
    "RollbackFailed",
    "Segment",
    "SleepReport",
    "Tag",
    "TagAsleep",
    "TagUsage",
    "TorchAllocator",
    "TorchUnsupported",
    "UnknownTag",
    "UsageError",
    "WakeReport",
]
