"""TLS of the front door: one context for the service's whole life, whose certificate can be read again."""

import os
import ssl
import stat
from pathlib import Path

from rotator.config import ConfigError
from rotator.config_security import TlsConfig


def open_tls(config: TlsConfig) -> ssl.SSLContext:
    """TLS 1.2 or newer. Raises ConfigError with one line a problem."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    if config.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    read_certificates(context, config)
    return context


def read_certificates(context: ssl.SSLContext, config: TlsConfig) -> None:
    """Handshakes from now on use what the files hold now; connections go on. Raises ConfigError, and nothing changes.
    An authority that was removed from ``client_ca`` is trusted until the service restarts."""
    _check_private(config.key)
    _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config)  # on trial: a key that does not fit spoils what it is put in
    _load(context, config)


def _load(context: ssl.SSLContext, config: TlsConfig) -> None:
    try:
        context.load_cert_chain(config.certificate, config.key, password=_no_password)
    except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
        files = f"{config.certificate} and {config.key}"
        raise ConfigError([f"bind.tls: {files} are no certificate with its key in PEM: {_words(e)}"]) from None
    if config.client_ca is not None:
        try:
            context.load_verify_locations(config.client_ca)
        except OSError as e:
            raise ConfigError(
                [f"bind.tls.client_ca: {config.client_ca} holds no certificate in PEM: {_words(e)}"]
            ) from None


def _check_private(key: Path) -> None:
    try:
        found = os.stat(key)
    except OSError as e:
        raise ConfigError(
            [f"bind.tls.key: {key} cannot be read: {e.strerror}: correct the path or its rights"]
        ) from None
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError([f"bind.tls.key: others may read {key}: chmod 600 it (and make a new key if they have)"])


def _no_password() -> str:
    raise ValueError("the key is encrypted: give one that is not, in a file that only its owner may read")


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
