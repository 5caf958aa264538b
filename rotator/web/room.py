"""The process in which the page is drawn: begun at the first visit, ended when nobody has looked for a while.

It lives in a folder of its own that only this user may open, with two sockets: ``page`` is its, ``feed`` is ours. It
ends by itself when its standard input does, so it never outlives the service, however that ends.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from rotator.ports import RotatorError

_log = logging.getLogger(__name__)
READY_S = 30.0
IDLE_S = 600.0
END_S = 5.0
_AGAIN_FIRST_S = 2.0
_AGAIN_MAX_S = 60.0
_LOG_MAX_BYTES = 4 << 20
_POLL_S = 0.1
# Nothing else is handed on: keys of outside endpoints, for one, are none of the page's business.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


class PageDown(RotatorError):
    """The page's process does not run; the text says why."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Room:
    """``feed`` is served to the process; ``log_path`` takes what it prints."""

    def __init__(self, feed: ASGIApp, log_path: Path) -> None:
        self._feed = feed
        self._log_path = log_path
        self._folder: Path | None = None
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._failures = 0
        self._not_before_s = 0.0
        self._idle: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self.guests = 0

    @property
    def socket(self) -> str:
        """Where the page answers. Only after ``ready``."""
        if self._folder is None:
            raise PageDown("the page has not begun")
        return str(self._folder / "page")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._is_alive() and self._process else None

    async def ready(self) -> None:
        """Return when the process answers; begins it if it has to. Raises PageDown."""
        if self._is_alive():
            self._rearm()
            return
        async with self._lock:
            if not self._is_alive():
                await self._begin()
        self._rearm()

    def enter(self) -> None:
        self.guests += 1

    def leave(self) -> None:
        self.guests -= 1
        self._rearm()

    def give_up(self) -> None:
        """It does not answer: it goes, and the next visit begins another."""
        _log.error("the page's process does not answer and is ended")
        self._end_soon()

    async def close(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        await self._end_process()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = self._server.force_exit = True
            await asyncio.gather(self._serving, return_exceptions=True)
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, True)
        self._folder = self._server = self._serving = None

    # -- beginning and ending ----------------------------------------------------------------------------------------

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def _begin(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._not_before_s:
            raise PageDown(f"the page's process ended and is tried again in {self._not_before_s - now:.0f} s")
        process = None
        try:
            await self._serve_feed()
            process = await self._spawn()
            await self._answers(process)
        except (OSError, PageDown) as e:
            await _end(process)
            self._failures += 1
            wait_s = min(_AGAIN_MAX_S, _AGAIN_FIRST_S * 2 ** (self._failures - 1))
            self._not_before_s = asyncio.get_running_loop().time() + wait_s
            _log.error("the page: %s", e)
            raise PageDown(f"{e}: see {self._log_path}") from None
        self._failures = 0
        self._process = process

    async def _serve_feed(self) -> None:
        if self._serving is not None and not self._serving.done():
            return
        self._folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="rotator-page-"))
        config = uvicorn.Config(
            self._feed, uds=str(self._folder / "feed"), lifespan="off", access_log=False, log_config=None, ws="none"
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            if self._serving.done():
                raise PageDown("the page's feed could not begin")
            await asyncio.sleep(0.01)

    async def _spawn(self) -> asyncio.subprocess.Process:
        with contextlib.suppress(FileNotFoundError):
            (self._folder_now() / "page").unlink()
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["NICEGUI_STORAGE_PATH"] = str(self._folder_now())
        mode = "ab" if self._log_path.exists() and self._log_path.stat().st_size < _LOG_MAX_BYTES else "wb"
        with self._log_path.open(mode) as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "rotator.web", str(self._folder)),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # a Ctrl-C in the terminal is the service's to handle
            )

    async def _answers(self, process: asyncio.subprocess.Process) -> None:
        socket = str(self._folder_now() / "page")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_S):
                while process.returncode is None:
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_unix_connection(socket)
                        writer.close()
                        return
                    await asyncio.sleep(_POLL_S)
                raise PageDown(f"its process ended with code {process.returncode}")
        raise PageDown(f"its process did not answer within {READY_S:.0f} s")

    def _folder_now(self) -> Path:
        if self._folder is None:
            raise PageDown("the page is being closed")
        return self._folder

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        await _end(process)

    def _rearm(self) -> None:
        """Nobody looks: after a while the process goes, and its memory with it."""
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._rest)

    def _rest(self) -> None:
        if self.guests == 0:
            self._end_soon()

    def _end_soon(self) -> None:
        ending = asyncio.create_task(self._end_process())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


async def _end(process: asyncio.subprocess.Process | None) -> None:
    if process is None or process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
