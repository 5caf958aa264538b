"""Who may come and how much of the service one of them may take: ``bind`` with its TLS, ``http``, ``keys``."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rotator.config_base import Section


class TlsConfig(Section):
    """Files in PEM. They are read at the start and again at every reload (SIGHUP); connections go on meanwhile."""

    certificate: Path = Field(description="the service's certificate, with its chain")
    key: Path = Field(description="its private key; nobody but its owner may read the file")
    client_ca: Path | None = Field(
        default=None, description="clients must show a certificate of this authority; anyone may connect if absent"
    )

    def files_in(self, base: Path) -> Self:
        """With paths relative to ``base`` made absolute."""
        there = {name: base / path for name, path in self if path is not None}
        return self.model_copy(update=there)


class BindConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8400, ge=0, le=65535)
    hosts: tuple[str, ...] = Field(
        default=(), description="further Host names that clients may use, e.g. a reverse proxy's; with any, no others"
    )
    tls: TlsConfig | None = Field(default=None, description="HTTPS (1.2 or newer); plain HTTP if absent")

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


class HttpConfig(Section):
    """What one client may take of the front door. Who takes more is refused or its connection ends."""

    head_bytes_max: int = Field(
        default=65536, ge=1024, description="of a request's line and headers together; else 431"
    )
    line_bytes_max: int = Field(default=16384, ge=512, description="of the path, and of one header; else 414 or 431")
    headers_max: int = Field(default=100, ge=8, description="headers of one request; else 431")
    head_deadline_s: float = Field(
        default=10,
        gt=0,
        description="from a connection's start, or a request's first byte, to its headers' end; then 408",
    )
    body_deadline_s: float = Field(
        default=60, gt=0, description="for a request's body, and longer by what body_bytes_per_s_min allows; then 408"
    )
    body_bytes_per_s_min: int = Field(
        default=32768, ge=1, description="each so many bytes of a body that have come give it a second more"
    )
    write_stall_s: float = Field(
        default=300, gt=0, description="a client that takes nothing of its answer for so long is let go"
    )
    connections_max: int = Field(default=8192, ge=1, description="open connections in all; further ones get 503")
    connections_per_address_max: int = Field(
        default=4096, ge=1, description="open connections of one client address; further ones get 503"
    )
    bodies_max_mib: float = Field(
        default=1024, gt=0, description="request bodies above 64 KiB that are held at one time, together; beyond: 503"
    )


class KeyConfig(Section):
    name: str = Field(min_length=1, description="shown in refusals and events; says whose it is")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key itself; `rotator key` makes both")
    share: float = Field(
        default=1.0, gt=0, description="of a model's line: a key of share 2 is served twice as often as one of share 1"
    )
    scopes: tuple[Literal["infer", "operate", "admin"], ...] = Field(
        default=("infer",), min_length=1, description="admin includes operate, which includes infer"
    )
    models: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="the only models that it may ask for: an engine's name (with all its aliases) or one alias; "
        "all if absent. Such a key reads nothing of the operators' API",
    )
    in_flight_max: int | None = Field(
        default=None, ge=1, description="its requests that wait or are answered at one time; beyond: 429"
    )
    requests_per_minute: int | None = Field(
        default=None, ge=1, le=100_000, description="its requests in any 60 seconds; beyond: 429"
    )
    waiting_max: int | None = Field(
        default=None, ge=1, description="its requests that may wait for their models, all lines together; beyond: 429"
    )

    @model_validator(mode="after")
    def _confined(self) -> Self:
        if self.models is not None and self.scopes != ("infer",):
            raise ValueError("a key with 'models' has scope infer alone: remove the other scopes, or 'models'")
        return self
