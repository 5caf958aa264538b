"""Certificates of our own for the service and its agents: one authority, made once, kept where the operator says."""

import datetime
import ipaddress
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rotator.config import ConfigError

AUTHORITY_DAYS = 3650
LEAF_DAYS = 825
_BACKDATE = datetime.timedelta(hours=1)  # machines' clocks differ


@dataclass(frozen=True, slots=True)
class _Pair:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make(folder: Path, nodes: dict[str, list[str]], *, renew: bool = False) -> list[Path]:
    """Make what is missing in ``folder``: ca.pem and ca.key, service.pem and service.key, ``<node>.pem`` and
    ``<node>.key`` for every node (by name: its host names and addresses), and token. What exists is kept, but with
    ``renew`` all certificates below the authority are made anew. Returns what was written. Raises ConfigError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        written: list[Path] = []
        authority = _authority(folder, written)
        for name, hosts, usage in [
            ("service", [], ExtendedKeyUsageOID.CLIENT_AUTH),
            *((node, hosts, ExtendedKeyUsageOID.SERVER_AUTH) for node, hosts in nodes.items()),
        ]:
            if renew or not (folder / f"{name}.pem").exists():
                _write_pair(folder, name, _leaf(authority, name, hosts, usage), written)
        if not (folder / "token").exists():
            _write(folder / "token", f"{secrets.token_urlsafe(32)}\n".encode(), written)
    except OSError as e:
        raise ConfigError([f"{folder}: {e.strerror} ({e.filename}): choose another folder with --out"]) from None
    return written


def _authority(folder: Path, written: list[Path]) -> _Pair:
    certificate, key = folder / "ca.pem", folder / "ca.key"
    if certificate.exists() != key.exists():
        raise ConfigError([f"{folder}: has only one of ca.pem and ca.key: bring the other back, or remove it"])
    if not certificate.exists():
        made_key = ec.generate_private_key(ec.SECP256R1())
        name = _name("rotator agents")
        builder = _builder(name, name, made_key.public_key(), AUTHORITY_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs=True), critical=True)
        _write_pair(folder, "ca", _Pair(builder.sign(made_key, hashes.SHA256()), made_key), written)
    try:
        loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise ValueError("it is no key of an elliptic curve")
        return _Pair(x509.load_pem_x509_certificate(certificate.read_bytes()), loaded)
    except (ValueError, TypeError) as e:
        raise ConfigError([f"{folder}: ca.pem and ca.key cannot be used ({e}): choose an empty folder"]) from None


def _leaf(authority: _Pair, name: str, hosts: list[str], usage: x509.ObjectIdentifier) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(name), authority.certificate.subject, key.public_key(), LEAF_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
    return _Pair(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - _BACKDATE).not_valid_after(now + datetime.timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_pair(folder: Path, name: str, pair: _Pair, written: list[Path]) -> None:
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    _write(folder / f"{name}.key", pair.key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none), written)
    _write(folder / f"{name}.pem", pair.certificate.public_bytes(pem), written)


def _write(path: Path, content: bytes, written: list[Path]) -> None:
    """Whole or not at all, and never readable by others, not even for a moment."""
    half = path.with_name(f".{path.name}.new")
    half.unlink(missing_ok=True)
    descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    half.rename(path)
    written.append(path)
