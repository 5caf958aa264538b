"""Pieces of the page that hold HTML and send it only when it changed."""

from collections.abc import Iterator
from contextlib import contextmanager

from nicegui import ui


class Live:
    """``props`` are written by us alone: no text of others goes in there."""

    def __init__(self, classes: str = "", props: str = "") -> None:
        self._content = ""
        self.element = ui.html("", sanitize=False).classes(classes).props(props)  # every text in it was escaped by us

    def set(self, content: str) -> None:
        if content != self._content:
            self._content = content
            self.element.set_content(content)


@contextmanager
def section(title: str) -> Iterator[None]:
    """A part of the page with its heading, which a shortcut goes to."""
    name = title.lower()
    with ui.element("section").props(f"id={name} aria-labelledby=h-{name}"):
        ui.html(title, sanitize=False, tag="h2").props(f"id=h-{name} tabindex=-1")
        yield
