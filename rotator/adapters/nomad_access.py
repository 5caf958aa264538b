"""Where Nomad is and who we are to it: the fleet file first, then the variables that Nomad's own tools read."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from rotator.config_nomad import ADDRESS, NomadConfig
from rotator.ports import LauncherAway, LaunchError

DEFAULT_NAMESPACE = "default"


@dataclass(frozen=True, slots=True)
class NomadAccess:
    """``token_file`` goes before ``token`` and is read for every call. Never shows a token."""

    address: str = str(ADDRESS).rstrip("/")
    namespace: str = DEFAULT_NAMESPACE
    region: str = ""
    token: str = field(default="", repr=False)
    token_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    insecure_skip_verify: bool = False

    def read_token(self) -> str:
        """Blocking. Raises LauncherAway where the file cannot be read: without one nothing is known of any engine."""
        if self.token_file is None:
            return self.token
        try:
            return Path(self.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise LauncherAway(f"Nomad's token file {self.token_file} cannot be read: {e}", "token") from None

    @property
    def verify(self) -> bool | str:
        """As requests takes it: the authority's file, the system's store, or nothing at all."""
        if self.insecure_skip_verify:
            return False
        return self.ca_file or True

    @property
    def cert(self) -> tuple[str, str] | None:
        return (self.cert_file, self.key_file) if self.cert_file and self.key_file else None

    def ssl_context(self) -> ssl.SSLContext | None:
        """For asyncio; None for plain HTTP. Raises LaunchError where a file is no PEM."""
        if urlsplit(self.address).scheme != "https":
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.insecure_skip_verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if self.cert:
                context.load_cert_chain(*self.cert)
        except (OSError, ssl.SSLError) as e:
            raise LaunchError(f"nomad: a TLS file cannot be used: {e}: correct ca_file, cert_file, key_file") from None
        return context


def access_of(config: NomadConfig, environ: Mapping[str, str]) -> NomadAccess:
    """Raises LaunchError for an address that is none, or a file that is not there."""
    address = str(config.address or environ.get("NOMAD_ADDR") or ADDRESS).rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LaunchError(f"nomad: '{address}' is no address: give http://host:4646 or https://host:4646")
    access = NomadAccess(
        address=address,
        namespace=config.namespace or environ.get("NOMAD_NAMESPACE") or DEFAULT_NAMESPACE,
        region=config.region or environ.get("NOMAD_REGION", ""),
        token=environ.get(config.token_env, ""),
        token_file=_text(config.token_file),
        ca_file=None if config.insecure_skip_verify else _text(config.ca_file) or environ.get("NOMAD_CACERT") or None,
        cert_file=_text(config.cert_file) or environ.get("NOMAD_CLIENT_CERT") or None,
        key_file=_text(config.key_file) or environ.get("NOMAD_CLIENT_KEY") or None,
        insecure_skip_verify=config.insecure_skip_verify,
    )
    for name in ("ca_file", "cert_file", "key_file"):
        file = getattr(access, name)
        if file is not None and not Path(file).is_file():
            raise LaunchError(f"nomad.{name}: there is no file {file}: correct the path")
    return access


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
