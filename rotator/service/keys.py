"""Who may do what: bearer keys with scopes, and what keeps a web page from talking to a service on loopback.

Without keys the service trusts whoever reaches its loopback port. A browser on that machine reaches it too, so then
requests that a foreign page caused are refused (``guard``): by their Host header, which a rebound DNS name gives away,
and by Origin and Sec-Fetch-Site, which a page cannot forge.

A key is 256 random bits, so one SHA-256 hides it as well as any slow hash would, and costs a request next to nothing;
why not more: decision 0020. Digests are found by a table, so the time taken tells of none how close it came.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Literal
from urllib.parse import urlsplit

from rotator.config import BindConfig, KeyConfig
from rotator.service.sessions import PREFIX, Sessions

Scope = Literal["infer", "operate", "admin"]
RANK: dict[Scope, int] = {"infer": 1, "operate": 2, "admin": 3}  # each includes the ones before it
_READS = ("GET", "HEAD", "OPTIONS")
_SECRET_CHARS_MAX = 4096  # of what is presented: more is no key, and is not hashed
_SESSIONS_KEPT = 256  # verified ones: a signature costs fifty times what a look-up costs


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
class _Known:
    """A configured key, or a session that stands for it (``ends_wall_s``)."""

    sha256: bytes
    name: str
    rank: int
    confined: bool
    ends_wall_s: float = inf


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
        self.sessions = sessions
        self._replaced = asyncio.Event()
        self._bind = bind or BindConfig()
        self._hosts = {h.lower() for h in (*self._bind.hosts, self._bind.host, "localhost")}
        self._take(keys)

    def _take(self, keys: Iterable[KeyConfig]) -> None:
        known = [
            _Known(bytes.fromhex(k.sha256), k.name, max(RANK[s] for s in k.scopes), k.models is not None) for k in keys
        ]
        self._keys = {key.sha256: key for key in known}
        self._by_name = {key.name: key for key in known}
        self._verified: OrderedDict[bytes, _Known] = OrderedDict()  # sessions' tokens, by digest

    def replace(self, keys: Iterable[KeyConfig]) -> None:
        """Other keys from now on, also for sessions. Requests that were let in go on; who only watches is looked at
        again (``lapses``)."""
        keys = tuple(keys)
        if self.sessions is not None:
            self.sessions.replace(keys)
        self._take(keys)
        self._replaced.set()
        self._replaced = asyncio.Event()

    async def lapses(self, holds: Callable[[], bool]) -> None:
        """Return as soon as keys are in force under which ``holds`` is not true any more."""
        while holds():
            await self._replaced.wait()

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
        if found.rank < RANK[scope]:
            return Denial(f"key '{found.name}' lacks scope '{scope}': ask for one that has it", 403)
        return None

    def authorize_operator(self, headers: Mapping[str, str], scope: Scope) -> Denial | None:
        """As ``authorize``, for what tells of all models: a key that is confined to some is refused."""
        denial = self.authorize(headers, scope)
        if denial is None and (known := self._known(headers)) is not None and known.confined:
            return Denial(f"key '{known.name}' is for its own models alone: ask for one without 'models'", 403)
        return denial

    def client(self, headers: Mapping[str, str]) -> str:
        """The name of the key that a request was sent with; empty where there is none, or none is known."""
        known = self._known(headers)
        return "" if known is None else known.name

    def login(self, secret: str) -> tuple[str, int] | None:
        """Whose key it is and its rank; None for one that is not known, or that is for some models alone. A session's
        token is no key."""
        known = self._by_digest(secret)
        return None if known is None or known.confined else (known.name, known.rank)

    def rank(self, name: str) -> int:
        return self._by_name[name].rank if name in self._by_name else 0

    def guard(self, method: str, headers: Mapping[str, str]) -> Denial | None:
        """None where no web page can have caused the request, or where keys make that harmless, else why not. With
        ``bind.hosts`` the service answers to those names and to addresses alone, keys or not."""
        host = headers.get("host", "")
        if self._keys:
            if self._bind.hosts and not self._is_own(host) and not _is_address(_host_name(host)):
                return _wrong_host(host)
            return None
        if self._bind.is_loopback and not self._is_own(host):
            return _wrong_host(host)
        if method in _READS:
            return None
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return Denial("a page of another origin may not post here: configure keys, and send one", 403)
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return Denial("a page of another site may not post here: configure keys, and send one", 403)
        return None

    def _known(self, headers: Mapping[str, str]) -> _Known | None:
        secret = _presented(headers) if self._keys else None
        return None if secret is None else self._find(secret)

    def _find(self, secret: str) -> _Known | None:
        return self._by_digest(secret) or self._by_session(secret)

    def _by_digest(self, secret: str) -> _Known | None:
        if len(secret) > _SECRET_CHARS_MAX:
            return None
        given = _digest(secret)
        known = self._keys.get(given)
        return known if known is not None and hmac.compare_digest(given, known.sha256) else None

    def _by_session(self, token: str) -> _Known | None:
        """A session's token stands for its key."""
        if self.sessions is None or len(token) > _SECRET_CHARS_MAX or not token.startswith(PREFIX):
            return None
        known = self._verified.get(_digest(token))
        if known is None:
            session = self.sessions.read(token)
            key = self._by_name.get(session.key) if session is not None else None
            if session is None or key is None:
                return None
            known = self._verified[_digest(token)] = replace(key, ends_wall_s=session.ends_wall_s)
            if len(self._verified) > _SESSIONS_KEPT:
                self._verified.popitem(last=False)
        return known if known.ends_wall_s > time.time() else None

    def _is_own(self, host: str) -> bool:
        name = _host_name(host)
        return name in self._hosts or _is_loopback_address(name)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def _wrong_host(host: str) -> Denial:
    return Denial(f"host '{host[:100]}' is not this service: add it to bind.hosts if it should be", 421)


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


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _is_loopback_address(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
