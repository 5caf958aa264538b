"""Where a rank of the stub keeps its weights and its KV cache: on a (simulated) GPU, or in the process for tests."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

WEIGHTS = "weights"
KV = "kv_cache"
TAGS = frozenset({WEIGHTS, KV})
KV_SLOT_BYTES = 64
_BLOCK_BYTES = 1 << 18
_PIECE_BYTES = 64
_PIECES_A_RANK = 64


class DeviceFault(Exception):
    """An access to memory that is not mapped, or a driver call that failed: on a GPU, the end of the engine."""


class OutOfDeviceMemory(DeviceFault):
    """A wake or a load found no room. The rank is as it was before."""


class RankMemory(Protocol):
    """One rank's bytes. ``content_bytes`` is how much of a tag's memory holds bytes that can be written and read."""

    def content_bytes(self, tag: str) -> int: ...

    def write(self, tag: str, offset: int, data: bytes) -> None:
        """Raises DeviceFault while the tag sleeps."""
        ...

    def read(self, tag: str, offset: int, size: int) -> bytes:
        """Raises DeviceFault while the tag sleeps."""
        ...

    def sleep(self, level: int) -> None:
        """Level 1 keeps the weights in host memory, level 2 does not; the KV cache is lost either way."""
        ...

    def wake(self, tags: frozenset[str]) -> None:
        """Bring these tags back. Raises OutOfDeviceMemory."""
        ...

    def free(self, size: int) -> None:
        """Give at least so many more bytes back: the KV cache first, then the weights, kept in host memory."""
        ...

    def asleep(self) -> frozenset[str]:
        """The tags that sleep now."""
        ...

    def grow_residue(self, size: int) -> None:
        """Hold so many more bytes that no sleep gives back."""
        ...

    def close(self) -> None: ...


class PlainMemory:
    """Bytes in this process: the same behaviour with no driver below."""

    def __init__(self, *, weights_bytes: int = 1 << 16, kv_bytes: int = 1 << 16) -> None:
        self._sizes = {WEIGHTS: weights_bytes, KV: kv_bytes}
        self._mapped = {tag: bytearray(size) for tag, size in self._sizes.items()}
        self._master: bytes | None = None
        self.residue_bytes = 0

    def content_bytes(self, tag: str) -> int:
        return self._sizes[tag]

    def write(self, tag: str, offset: int, data: bytes) -> None:
        self._at(tag)[offset : offset + len(data)] = data

    def read(self, tag: str, offset: int, size: int) -> bytes:
        return bytes(self._at(tag)[offset : offset + size])

    def sleep(self, level: int) -> None:
        if WEIGHTS in self._mapped:
            self._master = bytes(self._mapped[WEIGHTS]) if level == 1 else None
        self._mapped.clear()

    def free(self, size: int) -> None:
        for tag in (KV, WEIGHTS):
            if size > 0 and tag in self._mapped:
                memory = self._mapped.pop(tag)
                self._master = bytes(memory) if tag == WEIGHTS else self._master
                size -= len(memory)

    def wake(self, tags: frozenset[str]) -> None:
        for tag in tags & self.asleep():
            master = self._master if tag == WEIGHTS else None
            self._mapped[tag] = bytearray(master or self._sizes[tag])

    def asleep(self) -> frozenset[str]:
        return TAGS - self._mapped.keys()

    def grow_residue(self, size: int) -> None:
        self.residue_bytes += size

    def close(self) -> None:
        self._mapped.clear()

    def _at(self, tag: str) -> bytearray:
        if tag not in self._mapped:
            raise DeviceFault(f"CUDA error: an illegal memory access was encountered ({tag} is not mapped)")
        return self._mapped[tag]


def load_weights(ranks: Sequence[RankMemory], seed: str) -> None:
    """Write every rank's shard: bytes that only ``seed`` and the rank decide. Ranks load side by side."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        for done in [pool.submit(_load_rank, rank, f"{seed}/{number}") for number, rank in enumerate(ranks)]:
            done.result()


def _load_rank(rank: RankMemory, seed: str) -> None:
    size = rank.content_bytes(WEIGHTS)
    for offset in range(0, size, _BLOCK_BYTES):
        content = hashlib.shake_128(f"{seed}/{offset}".encode()).digest(min(_BLOCK_BYTES, size - offset))
        rank.write(WEIGHTS, offset, content)


def weights_digest(ranks: Sequence[RankMemory]) -> bytes:
    """Read the weights back, as many pieces as fit a wake's time, evenly over every rank: reading all of them would
    take the link as long as the wake itself did."""
    digest = hashlib.blake2b(digest_size=16)
    for rank in ranks:
        size = rank.content_bytes(WEIGHTS)
        stride = max(_PIECE_BYTES, size // _PIECES_A_RANK)
        for offset in range(0, size, stride):
            digest.update(rank.read(WEIGHTS, offset, min(_PIECE_BYTES, size - offset)))
    return digest.digest()


def spoil_weights(ranks: Sequence[RankMemory], *, zero: bool) -> None:
    """What a bad wake leaves behind: zeros everywhere, or one block of another's bytes."""
    for rank in ranks if zero else ranks[-1:]:
        size = rank.content_bytes(WEIGHTS)
        for offset in range(0, size if zero else min(size, _BLOCK_BYTES), _BLOCK_BYTES):
            wanted = min(_BLOCK_BYTES, size - offset)
            rank.write(WEIGHTS, offset, bytes(wanted) if zero else hashlib.shake_128(b"another's").digest(wanted))
