"""The systemd units as files: what they must say so that a reboot and a restart go well."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

from rotator.config import RecoveryConfig
from rotator.service.shutdown import CUT_S, PUT_AWAY_S

FOLDER = Path(__file__).parents[3] / "deploy/systemd"
UNITS = ("rotator", "rotator-agent")


def read(name: str) -> dict[str, list[str]]:
    """Directives of a unit, as ``Section.Name`` to their values in order."""
    found: dict[str, list[str]] = defaultdict(list)
    section = ""
    for line in (FOLDER / f"{name}.service").read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[f"{section}.{key}"].append(value)
    return found


def words(unit: dict[str, list[str]], key: str) -> set[str]:
    return {word for value in unit[key] for word in value.split()}


@pytest.mark.parametrize("name", UNITS)
def test_a_boot_brings_it_up_after_disks_network_and_driver(name: str) -> None:
    unit = read(name)
    assert {"local-fs.target", "network-online.target", "nvidia-persistenced.service"} <= words(unit, "Unit.After")
    assert "nvidia-persistenced.service" in words(unit, "Unit.Wants")
    assert not unit["Unit.Requires"], "a machine without the driver's daemon must still boot the service"
    assert unit["Install.WantedBy"] == ["multi-user.target"]


@pytest.mark.parametrize("name", UNITS)
def test_it_is_tried_again_for_minutes_and_not_for_ever(name: str) -> None:
    unit = read(name)
    assert unit["Service.Type"] == ["notify"]
    assert unit["Service.Restart"][0] in ("always", "on-failure")
    burst, interval_s = int(unit["Unit.StartLimitBurst"][0]), int(unit["Unit.StartLimitIntervalSec"][0])
    tries_s = burst * int(unit["Service.RestartSec"][0])
    assert tries_s >= 120, "a driver that is still being built takes minutes"
    assert tries_s < interval_s, "else the limit is never reached"


@pytest.mark.parametrize("name", UNITS)
def test_it_runs_as_a_user_of_its_own_without_ways_to_more_rights(name: str) -> None:
    unit = read(name)
    users = re.findall(r"^u\s+(\S+)", (FOLDER / "rotator.sysusers.conf").read_text(), re.MULTILINE)
    assert unit["Service.User"][0] in users
    assert unit["Service.NoNewPrivileges"] == ["yes"]
    assert unit["Service.ProtectSystem"][0] in ("full", "strict")
    given = words(unit, "Service.AmbientCapabilities")
    assert given == words(unit, "Service.CapabilityBoundingSet")
    assert given <= {"CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_KILL"}


def test_engines_outlive_the_service_and_its_restarts() -> None:
    unit = read("rotator")
    assert unit["Service.KillMode"] == ["process"]
    assert unit["Service.OOMPolicy"] == ["continue"], "an engine killed for memory must not stop the service"
    for breaks_engines in ("PrivateTmp", "PrivateDevices", "MemoryDenyWriteExecute", "PrivateNetwork", "RuntimeMaxSec"):
        assert not unit[f"Service.{breaks_engines}"]
    assert unit["Service.LimitMEMLOCK"] == ["infinity"], "masters are pinned"


def test_a_stop_waits_for_the_whole_of_what_a_shutdown_may_take() -> None:
    needed_s = RecoveryConfig().shutdown_drain_s + PUT_AWAY_S + CUT_S
    assert int(read("rotator")["Service.TimeoutStopSec"][0]) >= needed_s + 20


def test_folders_that_the_units_name_are_made_at_boot() -> None:
    made = re.findall(r"^d\s+(\S+)", (FOLDER / "rotator.tmpfiles.conf").read_text(), re.MULTILINE)
    for name in UNITS:
        for folder in words(read(name), "Unit.RequiresMountsFor"):
            assert folder in made
