"""Puts the page's parts together."""

from pathlib import Path

from starlette.types import ASGIApp

from rotator.config import PageConfig
from rotator.service.events import EventBus
from rotator.service.keys import Keys
from rotator.service.operations import Operations
from rotator.web.door import Door
from rotator.web.feed import Feed
from rotator.web.room import Room


def open_page(
    ops: Operations, events: EventBus, api: ASGIApp, keys: Keys, config: PageConfig, log_path: Path
) -> Door | None:
    """The page's side of the service; None where it is switched off. Its process begins with the first visit."""
    if not config.enabled:
        return None
    return Door(keys, Room(Feed(ops, events, api), log_path), config)
