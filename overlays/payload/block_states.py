"""Where each block of the sleep allocator truly is: mapped or not as the driver says, asleep or not as its bytes are.

A block is *mapped* while the driver maps its address, and *asleep* while its bytes are in its master or were discarded.
The two differ only after something failed, and then the difference is kept until the next call settles it. The C
extension keeps one error for the process and raises an old one in the next call, after doing half of that call's work;
so its word is checked against the driver, and a handle's cell is zero whenever no physical memory belongs to it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any


class BlockStates:
    """One for a process. The records stay the allocator's own; this adds `overlay_mapped` and `is_asleep` to them."""

    FILLER_BYTES = 2 * 1024 * 1024  # the driver's granularity

    def __init__(
        self,
        create_and_map: Callable[[Any], None],
        unmap_and_release: Callable[[Any], None],
        copy: Callable[[int, int, int], Any],
        synchronize: Callable[[int], None],
        frugal: Callable[[int], bool],
        log: Any,
    ) -> None:
        self._create_and_map = create_and_map
        self._unmap_and_release = unmap_and_release
        self._copy = copy
        self._synchronize = synchronize
        self._frugal = frugal
        self._log = log
        self._trimmed: dict[int, Any] = {}  # unmapped ahead of their free
        self._cuda: Any = None

    # What a record is.

    @staticmethod
    def mapped(data: Any) -> bool:
        return bool(getattr(data, "overlay_mapped", True))  # made by a malloc that maps

    @staticmethod
    def asleep(data: Any) -> bool:
        return bool(getattr(data, "is_asleep", False))

    # Sleep.

    def settle(self, data: Any) -> bool:
        """Whether the block is asleep, after unmapping one that an undone wake could not unmap."""
        if self.asleep(data):
            self._unmap(data)
        return self.asleep(data)

    def fall_asleep(self, data: Any) -> None:
        """Unmap a block whose master, if it has one, is complete. If the driver refuses, the block stays awake."""
        try:
            self._unmap(data)
        except BaseException:
            data.cpu_backup_tensor = None
            raise
        data.is_asleep = True

    # Wake.

    def wake(self, records: dict[int, Any], wanted: Callable[[Any], bool], fresh: Callable[[int, Any], None]) -> None:
        """Map and fill all wanted blocks, or none: a failure undoes the rest, and no master goes before all are filled.

        On unified memory masters and device pages are the same RAM, so there each block is committed by itself: a
        failure leaves the earlier ones awake and the rest asleep with their masters.
        """
        woken: list[Any] = []
        try:
            for address, data in list(records.items()):
                if address not in records or not self.asleep(data) or not wanted(data):
                    continue
                woken.append(data)
                self._map(data)
                self._fill(address, data, fresh)
                if self._frugal(data.handle[0]):
                    self._commit(woken)
            self._commit(woken)
        except BaseException:
            self._undo(woken)
            raise

    def _fill(self, address: int, data: Any, fresh: Callable[[int, Any], None]) -> None:
        master = data.cpu_backup_tensor
        if master is None:
            fresh(address, data)
        else:
            self._copy(address, master.data_ptr(), master.numel() * master.element_size())

    @staticmethod
    def _commit(woken: list[Any]) -> None:
        for data in woken:
            data.is_asleep = False
            data.cpu_backup_tensor = None
        woken.clear()

    def _undo(self, woken: list[Any]) -> None:
        for data in reversed(woken):
            try:
                self._unmap(data)
            except RuntimeError as error:  # the next wake fills it where it is, the next sleep unmaps it
                self._log.error("overlay: block %s stays mapped after a failed wake: %s", data.handle[2], error)

    # Free and trim.

    def take(self, records: dict[int, Any], address: int) -> Any:
        """The record of what torch gives back, with the C side's unmap made sure to find something."""
        data = records.pop(address, None) or self._trimmed.pop(address)
        if not self.mapped(data):
            self._fill_range(data)
        return data

    def trim(self, records: dict[int, Any], address: int) -> None:
        """Unmap a segment that torch keeps but does not use; its free comes later and finds it here."""
        data = records.get(address)
        if data is None or self.asleep(data) or not self.mapped(data):
            return
        self._synchronize(data.handle[0])
        self._unmap(data)
        self._trimmed[address] = records.pop(address)

    def guarded(self, records: dict[int, Any], free: Callable[[int], Any]) -> Callable[[int], Any]:
        """`free` that always answers: the C side keeps the interpreter's lock for ever if its callback raises."""

        def callback(address: int) -> Any:
            data = records.get(address) or self._trimmed.get(address)
            try:
                return free(address)
            except Exception as error:
                self._log.error("overlay: the free of %s: %s", address, error)
                records.pop(address, None)
                return (0, 0, address, 0) if data is None else data.handle

        return callback

    # The driver.

    def _map(self, data: Any) -> None:
        """Map a block unless it is mapped. Tried twice: the first may raise the error of an earlier call."""
        if self.mapped(data):
            return
        try:
            self._map_once(data)
        except RuntimeError:
            self._map_once(data)
        data.overlay_mapped = True

    def _map_once(self, data: Any) -> None:
        self._set_cell(data, 0)
        try:
            self._create_and_map(data.handle)
        except RuntimeError:
            if self._cell(data):  # memory was made: give it back
                try:
                    self._unmap_and_release(data.handle)
                except RuntimeError:
                    self._release_cell(data)
                self._set_cell(data, 0)
            raise

    def _unmap(self, data: Any) -> None:
        """Unmap a block unless it is not mapped. Raises only if the driver still maps it afterwards."""
        if not self.mapped(data):
            return
        try:
            self._unmap_and_release(data.handle)
        except RuntimeError:
            if self._driver_maps(data.handle[2]):
                raise
            self._release_cell(data)
        self._set_cell(data, 0)
        data.overlay_mapped = False

    def _driver_maps(self, address: int) -> bool:
        """Whether the driver has memory at an address; where it cannot be asked, it is believed to."""
        cuda = self._libcuda()
        if cuda is None:
            return True
        handle = ctypes.c_ulonglong(0)
        if cuda.cuMemRetainAllocationHandle(ctypes.byref(handle), ctypes.c_void_p(address)) != 0:
            return False
        cuda.cuMemRelease(handle)
        return True

    def _release_cell(self, data: Any) -> None:
        cuda = self._libcuda()
        if cuda is None or not self._cell(data):
            return
        if cuda.cuMemRelease(ctypes.c_ulonglong(self._cell(data))) != 0:
            self._log.error("overlay: %s bytes stay allocated: the driver does not take them back", data.handle[1])

    def _fill_range(self, data: Any) -> None:
        """Map one small piece of memory all over a range that holds nothing, so that its free leaves no error."""
        device, size, address, cell = data.handle
        cuda = self._libcuda()
        if cuda is None or not isinstance(cell, int):
            return
        piece = self.FILLER_BYTES if size % self.FILLER_BYTES == 0 else size
        filler = type("Filler", (), {})()
        filler.handle, filler.overlay_mapped = (device, piece, address, cell), False
        try:
            self._map(filler)
        except RuntimeError as error:  # the C side's unmap fails then, which the next call of ours finds and forgets
            self._log.warning("overlay: no memory to free %s bytes cleanly: %s", size, error)
            return
        handle, none = ctypes.c_ulonglong(self._cell(data)), ctypes.c_ulonglong(0)
        for offset in range(piece, size, piece):
            if cuda.cuMemMap(ctypes.c_ulonglong(address + offset), ctypes.c_size_t(piece), none, handle, none) != 0:
                self._log.error("overlay: the range at %s could not be filled", address)
                cuda.cuMemUnmap(ctypes.c_ulonglong(address), ctypes.c_size_t(offset))
                self._release_cell(data)
                self._set_cell(data, 0)
                return

    def _libcuda(self) -> Any:
        if self._cuda is None:
            try:
                self._cuda = ctypes.CDLL("libcuda.so.1")
            except OSError:
                return None
        return self._cuda

    @staticmethod
    def _cell(data: Any) -> int:
        """The physical memory's handle, 0 if none is held. ROCm keeps a list of cells, which is left alone."""
        cell = data.handle[3]
        return int(ctypes.c_ulonglong.from_address(cell).value) if isinstance(cell, int) and cell else 0

    @staticmethod
    def _set_cell(data: Any, value: int) -> None:
        cell = data.handle[3]
        if isinstance(cell, int) and cell:
            ctypes.c_ulonglong.from_address(cell).value = value
