"""``rotator check``: what of a valid configuration file cannot work here, each in one line with its fix."""

from rotator.check.findings import Finding, Surroundings
from rotator.check.fleet import check_fleet

__all__ = ["Finding", "Surroundings", "check_fleet"]
