"""Which requests the gateway takes, and the engines behind model names.

The table is an allow-list, and what is sent to an engine is a path of this table, never the client's: no spelling of a
path (encoded, doubled or dotted) can reach an endpoint that is not listed here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol
from urllib.parse import unquote

from rotator.config import FallbackConfig, OverridesConfig
from rotator.core.values import EngineName

ITEM_CHARS_MAX = 512


class Kind(Enum):
    INFER = "infer"  # a body that names a model goes to the engine
    STORED = "stored"  # an answer that one engine keeps
    MODELS = "models"
    MODEL = "model"
    REALTIME = "realtime"


class Dialect(Enum):
    """Whose error bodies and events the route's clients understand."""

    OPENAI = "openai"
    CHAT = "chat"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Route:
    """``path`` is the engine's; ``item`` is the id at its end where the route has one."""

    kind: Kind
    path: str
    dialect: Dialect = Dialect.OPENAI
    item: str = ""


@dataclass(frozen=True, slots=True)
class NoRoute:
    """``allowed`` are the methods that the path does know: empty where there is no such path."""

    allowed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """The engine behind a name that a client asked for (``requested``), which the engine calls ``served_model``."""

    engine: EngineName
    url: str
    served_model: str
    requested: str
    overrides: OverridesConfig
    fallback: FallbackConfig | None = None


class Directory(Protocol):
    """What the gateway asks about engines. Reads only: nothing here blocks."""

    def resolve(self, model: str) -> Target | None:
        """By engine name or alias."""
        ...

    def targets(self) -> Iterable[Target]:
        """One for every name a client may ask for, aliases included."""
        ...

    def state(self, engine: EngineName) -> str: ...

    def running(self) -> Sequence[Target]:
        """One for each engine whose API server lives, sleeping ones included, by the engine's own name."""
        ...


_INFER = {
    "/v1/chat/completions": Dialect.CHAT,
    "/v1/completions": Dialect.OPENAI,
    "/v1/responses": Dialect.RESPONSES,
    "/v1/embeddings": Dialect.OPENAI,
    "/v1/rerank": Dialect.OPENAI,
    "/v2/rerank": Dialect.OPENAI,
    "/rerank": Dialect.OPENAI,
    "/v1/score": Dialect.OPENAI,
    "/score": Dialect.OPENAI,
    "/tokenize": Dialect.OPENAI,
    "/detokenize": Dialect.OPENAI,
    "/v1/messages": Dialect.ANTHROPIC,
    "/v1/messages/count_tokens": Dialect.ANTHROPIC,
}
_POSTS = {path.encode(): Route(Kind.INFER, path, dialect) for path, dialect in _INFER.items()}
_MODELS = Route(Kind.MODELS, "/v1/models")
_MEDIA = re.compile(rb"/v1/(?:audio|images)/[a-z0-9_-]{1,64}")
_STORED = re.compile(rb"(/v1/responses/([A-Za-z0-9_-]{1,256}))(/cancel)?")
_MODEL_PREFIX = b"/v1/models/"
_REALTIME = b"/v1/realtime"
_ROOTS = ("/v1", "/v2", "/rerank", "/score", "/tokenize", "/detokenize")


def match(method: str, raw_path: bytes) -> Route | NoRoute:
    """The route of a request. ``raw_path`` is as it came, without the query."""
    if (route := _POSTS.get(raw_path)) is not None:
        return route if method == "POST" else NoRoute(("POST",))
    if raw_path == b"/v1/models":
        return _MODELS if method == "GET" else NoRoute(("GET",))
    if raw_path.startswith(_MODEL_PREFIX):
        return _model(method, raw_path[len(_MODEL_PREFIX) :])
    if _MEDIA.fullmatch(raw_path):
        return Route(Kind.INFER, raw_path.decode()) if method == "POST" else NoRoute(("POST",))
    if (stored := _STORED.fullmatch(raw_path)) is not None:
        allowed = ("POST",) if stored[3] else ("GET", "DELETE")
        if method not in allowed:
            return NoRoute(allowed)
        return Route(Kind.STORED, raw_path.decode(), Dialect.RESPONSES, stored[2].decode())
    return NoRoute()


def is_realtime(raw_path: bytes) -> bool:
    return raw_path == _REALTIME


def is_ours(path: str) -> bool:
    """Whether the path belongs to the data plane, listed or not: its clients expect errors in OpenAI's shape."""
    return path in _INFER or (
        path.startswith(_ROOTS) and any(path == root or path.startswith(root + "/") for root in _ROOTS)
    )


def raw_path_of(scope: Mapping[str, Any]) -> bytes:
    """The path as the client wrote it. A server that does not tell gets the decoded one, in which an encoded slash is
    a slash: the table still decides."""
    raw = scope.get("raw_path")
    return raw if isinstance(raw, bytes) else str(scope["path"]).encode()


def _model(method: str, raw_id: bytes) -> Route | NoRoute:
    item = unquote(raw_id.decode("ascii", "replace"), errors="replace")
    if not item or len(item) > ITEM_CHARS_MAX:
        return NoRoute()
    return Route(Kind.MODEL, "/v1/models", item=item) if method == "GET" else NoRoute(("GET",))
