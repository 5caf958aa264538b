"""What a decision was made from, packed for the ledger: JSON, compressed, as text that every database takes."""

import base64
import binascii
import zlib

import orjson

from rotator.core.snapshot_text import SnapshotError, snapshot_of, to_plain
from rotator.core.values import Snapshot

UNPACKED_MAX_BYTES = 16 << 20


def pack(snapshot: Snapshot) -> str:
    return base64.b64encode(zlib.compress(orjson.dumps(to_plain(snapshot)), 6)).decode()


def unpack(text: str) -> Snapshot:
    """Raises SnapshotError."""
    try:
        stream = zlib.decompressobj()
        plain = stream.decompress(base64.b64decode(text, validate=True), UNPACKED_MAX_BYTES)
        return snapshot_of(orjson.loads(plain))
    except (binascii.Error, zlib.error, orjson.JSONDecodeError) as e:
        raise SnapshotError(f"it is no packed snapshot: {e}") from None
