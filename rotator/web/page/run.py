"""The page's process from begin to end: NiceGUI on one socket of a folder, the service's feed on the other."""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from nicegui import Client, app, ui

from rotator.web.page import parts
from rotator.web.page.model import Model
from rotator.web.page.source import Source, Unanswered
from rotator.web.page.text import esc
from rotator.web.page.view import View, Who

_ASSETS = Path(__file__).parent / "assets"
_NICENESS = 10  # requests to models go before anybody's picture of them
_RECONNECT_S = 8.0
_log = logging.getLogger(__name__)


def main(folder: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    os.nice(_NICENESS)
    asyncio.run(_serve(Path(folder)))


async def _serve(folder: Path) -> None:
    model = Model(Source(str(folder / "feed")))
    outer = FastAPI(openapi_url=None)
    _page(model)
    ui.run_with(
        outer,
        title="rotator",
        favicon=_ASSETS / "icon.svg",
        dark=None,
        language="en-US",
        tailwind=False,
        reconnect_timeout=_RECONNECT_S,
        show_welcome_message=False,
        binding_refresh_interval=None,
    )
    app.config.socket_io_js_transports = ["websocket"]  # a viewer is one connection: they are counted at the door
    os.umask(0o077)
    server = uvicorn.Server(
        uvicorn.Config(outer, uds=str(folder / "page"), access_log=False, log_config=None, ws="websockets-sansio")
    )
    looking = asyncio.create_task(model.run())
    left = _Left(server)
    asyncio.get_running_loop().add_reader(0, left.look)
    try:
        await server.serve()
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await model.source.close()
        if left.alone:  # nobody else is there to do it
            shutil.rmtree(folder, ignore_errors=True)


class _Left:
    """The service holds the other end of our standard input: when it is gone, so are we."""

    def __init__(self, server: uvicorn.Server) -> None:
        self._server = server
        self.alone = False

    def look(self) -> None:
        if not os.read(0, 4096):
            asyncio.get_running_loop().remove_reader(0)
            self.alone = True
            self._server.should_exit = self._server.force_exit = True


def _page(model: Model) -> None:
    style, script = (_ASSETS / "page.css").read_text(), (_ASSETS / "page.js").read_text()
    overlay = (_ASSETS / "help.html").read_text()

    @ui.page("/")
    async def page(client: Client) -> None:
        ui.add_css(style)
        ui.add_body_html(f"{overlay}<script>{script}</script>")
        try:
            await model.first_look()
        except Unanswered as e:
            ui.html(parts.EMPTY.format(esc(f"{e}. This looks again by itself.")), sanitize=False)
            ui.add_head_html('<meta http-equiv="refresh" content="3">')
            return
        view = View(model, _who(client))
        if model.look is not None:
            ui.add_head_html(f'<meta name="server-now" content="{model.look["wall_s"]:.2f}">')

        def update() -> None:
            with client:
                view.update()

        model.listen(update)
        client.on_delete(lambda: model.forget(update))


def _who(client: Client) -> Who:
    """As the door said; a browser cannot: the door drops such headers of its requests."""
    headers = client.request.headers
    name, rank = "", 0
    with contextlib.suppress(ValueError):
        name = bytes.fromhex(headers.get("x-rotator-viewer", "")).decode()
        rank = int(headers.get("x-rotator-rank", "0"))
    return Who(name, rank, headers.get("x-rotator-token", ""))
