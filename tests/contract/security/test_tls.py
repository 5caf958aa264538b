"""HTTPS at the front door: versions, clients' certificates, and certificates that are replaced while it serves."""

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme

from rotator.config import ConfigError
from rotator.config_security import TlsConfig
from rotator.service.tls import open_tls, read_certificates
from tests.contract.security.front import GET, Door, front


def files(folder: Path, ca: trustme.CA, name: str = "localhost", client_ca: trustme.CA | None = None) -> TlsConfig:
    made = ca.issue_cert(name, "127.0.0.1")
    certificate, key = folder / "service.pem", folder / "service.key"
    certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    key.chmod(0o600)
    if client_ca is not None:
        client_ca.cert_pem.write_to_path(str(folder / "clients.pem"))
    return TlsConfig(certificate=certificate, key=key, client_ca=folder / "clients.pem" if client_ca else None)


def trusting(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


async def connect(door: Door, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", door.port, ssl=context)


async def get(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(GET)
    return await reader.readuntil(b"\r\n")


def seen(writer: asyncio.StreamWriter) -> bytes:
    certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return certificate


async def test_a_certificate_is_replaced_while_connections_go_on(tmp_path: Path):
    ca = trustme.CA()
    config = files(tmp_path, ca)
    context = open_tls(config)
    async with front(tls=context) as door:
        old = await connect(door, trusting(ca))
        assert b" 200 " in await get(*old)
        files(tmp_path, ca)
        read_certificates(context, config)
        new = await connect(door, trusting(ca))
        assert b" 200 " in await get(*new)
        assert seen(new[1]) != seen(old[1])
        await old[0].readuntil(b"}")
        assert b" 200 " in await get(*old)
        for _, writer in (old, new):
            writer.close()


@pytest.mark.filterwarnings("ignore:.*TLSv1:DeprecationWarning")
async def test_nothing_older_than_tls_1_2_is_spoken_and_nothing_plain(tmp_path: Path):
    ca = trustme.CA()
    async with front(tls=open_tls(files(tmp_path, ca))) as door:
        old = trusting(ca)
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await connect(door, old)
        newer = trusting(ca)
        newer.maximum_version = ssl.TLSVersion.TLSv1_2
        _, writer = await connect(door, newer)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.2"
        writer.close()
        assert b"HTTP" not in await door.say(GET)


async def test_with_a_client_authority_a_client_needs_a_certificate_of_it(tmp_path: Path):
    ca, clients = trustme.CA(), trustme.CA()
    async with front(tls=open_tls(files(tmp_path, ca, client_ca=clients))) as door:
        known, stranger = trusting(ca), trusting(ca)
        clients.issue_cert("client@example").configure_cert(known)
        trustme.CA().issue_cert("client@example").configure_cert(stranger)
        assert b" 200 " in await get(*await connect(door, known))
        for context in (stranger, trusting(ca)):
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await get(*await connect(door, context))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: c.key.chmod(0o640), "others may read"),
        (lambda c: c.key.unlink(), "cannot be read"),
        (
            lambda c: c.key.write_bytes(trustme.CA().issue_cert("x").private_key_pem.bytes()),
            "no certificate with its key",
        ),
        (lambda c: c.certificate.write_text("nothing"), "no certificate with its key"),
    ],
)
async def test_files_that_cannot_be_used_are_told_and_change_nothing(tmp_path: Path, spoil: object, words: str):
    ca = trustme.CA()
    config = files(tmp_path, ca)
    context = open_tls(config)
    spoil(config)  # type: ignore[operator] # a lambda above
    with pytest.raises(ConfigError, match=words):
        read_certificates(context, config)
    async with front(tls=context) as door:
        assert b" 200 " in await get(*await connect(door, trusting(ca)))
