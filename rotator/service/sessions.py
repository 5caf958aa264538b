"""Sessions of people at the page: a signed token stands for a key, so that no browser has to keep the key itself."""

from collections.abc import Iterable
from dataclasses import dataclass

from itsdangerous import BadSignature, URLSafeTimedSerializer

from rotator.config import KeyConfig

PREFIX = "rs-"
_SALT = "rotator page session"
_DIGEST_CHARS = 16  # of the key's hash: a key that was replaced under its old name ends its sessions


@dataclass(frozen=True, slots=True)
class Session:
    key: str  # its name in the configuration
    ends_wall_s: float


class Sessions:
    """Tokens are good for ``lasts_s`` seconds, and over restarts as long as ``secret`` and the key stay the same."""

    def __init__(self, secret: str, keys: Iterable[KeyConfig], lasts_s: float) -> None:
        self._signer = URLSafeTimedSerializer(secret, salt=_SALT)
        self._lasts_s = lasts_s
        self.replace(keys)

    def replace(self, keys: Iterable[KeyConfig]) -> None:
        """Other keys from now on: sessions of those that are gone or changed end."""
        self._digests = {k.name: k.sha256[:_DIGEST_CHARS] for k in keys}

    def issue(self, key: str) -> str:
        """Raises KeyError where there is no such key."""
        return PREFIX + str(self._signer.dumps([key, self._digests[key]]))

    def read(self, token: str) -> Session | None:
        """None for one that is forged, altered, too old, or of a key that is no longer configured."""
        if not token.startswith(PREFIX):
            return None
        try:
            said, issued = self._signer.loads(
                token.removeprefix(PREFIX), max_age=int(self._lasts_s), return_timestamp=True
            )
            name, digest = said
        except (BadSignature, TypeError, ValueError):
            return None
        if self._digests.get(name) != digest:
            return None
        return Session(name, issued.timestamp() + self._lasts_s)
