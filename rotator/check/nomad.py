"""Findings about engines that Nomad runs, and about how Nomad is reached. Asks Nomad nothing."""

import ipaddress
from collections.abc import Iterator

from rotator.check.findings import Finding, Surroundings, error, warning
from rotator.config import EngineConfig, FleetConfig


def check_nomad(fleet: FleetConfig, around: Surroundings) -> Iterator[Finding]:
    engines = [engine for engine in fleet.engines if engine.launcher == "nomad"]
    if engines:
        yield from _access(fleet, around)
    for engine in engines:
        yield from _job(engine, around)


def _access(fleet: FleetConfig, around: Surroundings) -> Iterator[Finding]:
    nomad = fleet.nomad
    for name in ("token_file", "ca_file", "cert_file", "key_file"):
        file = getattr(nomad, name)
        if file is not None and not around.exists(file):
            yield error(f"nomad.{name}", f"{file} does not exist", "correct the path")
    if nomad.insecure_skip_verify:
        yield warning("nomad.insecure_skip_verify", "whoever answers is taken for Nomad", "give nomad.ca_file instead")
    address = nomad.address
    has_token = nomad.token_file is not None or bool(around.env.get(nomad.token_env))
    if address is not None and address.scheme == "http" and has_token and not _is_loopback(address.host or ""):
        yield warning("nomad.address", "the token crosses the network in the clear", "use https, and nomad.ca_file")


def _job(engine: EngineConfig, around: Surroundings) -> Iterator[Finding]:
    place, job = f"engine '{engine.name}'", engine.job
    for name in ("file", "site"):
        path = getattr(job, name)
        if path is not None and not around.exists(path):
            yield error(f"{place}.job.{name}", f"{path} does not exist", "correct the path")
    unused = [name for name in ("command", "env", "workdir") if getattr(engine, name)]
    if unused:
        names = ", ".join(f"'{name}'" for name in unused)
        yield warning(place, f"{names} do nothing under launcher 'nomad'", "put them into its job")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
