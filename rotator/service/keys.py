"""Who may do what: bearer keys with scopes, and what keeps a web page from talking to a service on loopback.

Without keys the service trusts whoever reaches its loopback port. A browser on that machine reaches it too, so then
requests that a foreign page caused are refused (``guard``): by their Host header, which a rebound DNS name gives away,
and by Origin and Sec-Fetch-Site, which a page cannot forge.
"""

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from rotator.config import BindConfig, KeyConfig
from rotator.service.sessions import Sessions

Scope = Literal["infer", "operate", "admin"]
RANK: dict[Scope, int] = {"infer": 1, "operate": 2, "admin": 3}  # each includes the ones before it
_READS = ("GET", "HEAD", "OPTIONS")


class Denial(str):
    """Why a request is refused, in words for its sender. ``status`` is 401 (who are you?), 403 or 421 (wrong host)."""

    status: int
    __slots__ = ("status",)

    def __new__(cls, reason: str, status: int = 403) -> "Denial":
        self = super().__new__(cls, reason)
        self.status = status
        return self


Authorize = Callable[[Mapping[str, str], Scope], Denial | None]
Identify = Callable[[Mapping[str, str]], str]
Guard = Callable[[str, Mapping[str, str]], Denial | None]


@dataclass(frozen=True, slots=True)
class NewKey:
    """A fresh key: ``secret`` is shown once, ``sha256`` goes into the configuration file."""

    secret: str
    sha256: str


def new_key() -> NewKey:
    secret = f"rk-{secrets.token_urlsafe(32)}"
    return NewKey(secret, digest(secret))


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def allow_all(headers: Mapping[str, str], scope: Scope) -> Denial | None:
    """The ``authorize`` of a service without keys."""
    return None


class Keys:
    """Checks keys against the configuration. ``headers`` have lower-case names (ASGI gives them so)."""

    def __init__(
        self, keys: Iterable[KeyConfig] = (), bind: BindConfig | None = None, sessions: Sessions | None = None
    ) -> None:
        self._keys = tuple((bytes.fromhex(k.sha256), k.name, max(RANK[s] for s in k.scopes)) for k in keys)
        self._ranks = {name: rank for _, name, rank in self._keys}
        self.sessions = sessions
        self._bind = bind or BindConfig()
        self._hosts = {h.lower() for h in (*self._bind.hosts, self._bind.host, "localhost")}

    @property
    def configured(self) -> bool:
        return bool(self._keys)

    def authorize(self, headers: Mapping[str, str], scope: Scope) -> Denial | None:
        """None where the request may go on, else why not. Accepts ``Authorization: Bearer`` and ``x-api-key``."""
        if not self._keys:
            return None
        secret = _presented(headers)
        if secret is None:
            return Denial("this service needs a key: send 'Authorization: Bearer <key>'", 401)
        found = self._find(secret)
        if found is None:
            return Denial("the key is not known here", 401)
        name, rank = found
        if rank < RANK[scope]:
            return Denial(f"key '{name}' lacks scope '{scope}': ask for one that has it", 403)
        return None

    def client(self, headers: Mapping[str, str]) -> str:
        """The name of the key that a request was sent with; empty where there is none, or none is known."""
        secret = _presented(headers) if self._keys else None
        found = self._find(secret) if secret is not None else None
        return "" if found is None else found[0]

    def login(self, secret: str) -> tuple[str, int] | None:
        """Whose key it is and its rank; None for one that is not known. A session's token is no key."""
        is_token = self.sessions is not None and self.sessions.read(secret) is not None
        return None if is_token else self._find(secret)

    def rank(self, name: str) -> int:
        return self._ranks.get(name, 0)

    def guard(self, method: str, headers: Mapping[str, str]) -> Denial | None:
        """None where no web page can have caused the request, or where keys make that harmless, else why not."""
        if self._keys:
            return None
        host = headers.get("host", "")
        if self._bind.is_loopback and not self._is_own(host):
            return Denial(f"host '{host[:100]}' is not this service: add it to bind.hosts if it should be", 421)
        if method in _READS:
            return None
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return Denial("a page of another origin may not post here: configure keys, and send one", 403)
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return Denial("a page of another site may not post here: configure keys, and send one", 403)
        return None

    def _find(self, secret: str) -> tuple[str, int] | None:
        """Compares with every key, so that the time taken tells nothing about which one came close. A session's token
        stands for its key."""
        if self.sessions is not None and (session := self.sessions.read(secret)) is not None:
            return session.key, self._ranks[session.key]
        given = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for wanted, name, rank in self._keys:
            if hmac.compare_digest(given, wanted):
                found = (name, rank)
        return found

    def _is_own(self, host: str) -> bool:
        name = _host_name(host)
        return name in self._hosts or _is_loopback_address(name)


def _presented(headers: Mapping[str, str]) -> str | None:
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and rest.strip():
        return rest.strip()
    return headers.get("x-api-key") or None


def _host_name(host: str) -> str:
    """The name in a Host header, without its port; empty where it cannot be one."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_loopback_address(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
