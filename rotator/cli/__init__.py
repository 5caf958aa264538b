"""The command line ``rotator``."""

from rotator.cli.main import main

__all__ = ["main"]
