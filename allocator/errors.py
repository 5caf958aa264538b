"""Everything that the allocator raises.

AllocatorError
 ├─ LibraryMissing       the library was not built, or not where the package looks
 ├─ DriverMissing        no CUDA driver to load, or one without the calls that are needed
 ├─ UsageError           the caller is wrong, and nothing was changed
 │   ├─ UnknownTag
 │   ├─ AlreadyAsleep    sleep while asleep
 │   ├─ NotAsleep        wake while awake
 │   ├─ TagAsleep        alloc, read or write under a sleeping tag
 │   ├─ ForeignPointer   free, read or write of what is no live segment
 │   ├─ InvalidSize      zero bytes, more than the device has, or past the end of a segment
 │   ├─ Capturing        a graph capture is running
 │   ├─ Registered       sleep of memory that is registered for IPC or RDMA, or unpin of what is not
 │   └─ NestedRegion     this torch would put an inner region's tensors under the outer one's tag
 ├─ TorchUnsupported     this torch, or how it was started, cannot route allocations soundly
 ├─ PluginRefused        the vLLM plugin would not be sound here, so the engine does not start
 ├─ OutOfMemory          the device has too little room: says how much is wanted and how much is free
 ├─ HostMemoryExhausted  the masters fit neither host memory (or its budget) nor the spill directory
 ├─ BudgetFileError      the file of the shared host budget is absent, cannot be written, or is no budget
 ├─ MasterLost           a master on disk does not read back as it was written: the tag stays asleep
 ├─ AddressesExhausted   the tag's reservation is too fragmented for this segment
 ├─ DriverError          the driver refused a call; everything it had done for this operation was undone
 └─ RollbackFailed       ... and so did the undoing: the tags are asleep with their content kept, wake them
"""

from __future__ import annotations


class AllocatorError(Exception):
    """The root. Bytes are in the unit of the call that raised it (see `allocator.Allocator`)."""

    def __init__(
        self, message: str, *, call: str = "", driver_code: int = 0, bytes_wanted: int = 0, bytes_free: int = 0
    ) -> None:
        super().__init__(message)
        self.call = call
        self.driver_code = driver_code
        self.bytes_wanted = bytes_wanted
        self.bytes_free = bytes_free


class LibraryMissing(AllocatorError):
    pass


class DriverMissing(AllocatorError):
    pass


class UsageError(AllocatorError):
    pass


class UnknownTag(UsageError):
    pass


class AlreadyAsleep(UsageError):
    pass


class NotAsleep(UsageError):
    pass


class TagAsleep(UsageError):
    pass


class ForeignPointer(UsageError):
    pass


class InvalidSize(UsageError):
    pass


class Capturing(UsageError):
    pass


class Registered(UsageError):
    pass


class NestedRegion(UsageError):
    pass


class TorchUnsupported(AllocatorError):
    pass


class PluginRefused(AllocatorError):
    pass


class OutOfMemory(AllocatorError):
    pass


class HostMemoryExhausted(AllocatorError):
    pass


class BudgetFileError(AllocatorError):
    pass


class MasterLost(AllocatorError):
    pass


class AddressesExhausted(AllocatorError):
    pass


class DriverError(AllocatorError):
    pass


class RollbackFailed(AllocatorError):
    pass
