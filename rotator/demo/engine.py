"""The stub engine: ``python -m rotator.demo.engine --name m --port 8001 --gpus 0,1,2,3 --weights-gib 60 …``.

A process of its own that speaks vLLM's HTTP dialect on loopback and holds real bytes through the allocator, so that
everything around an engine can be tried on a machine without a GPU. See --help for all it can be told.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence

from aiohttp import web

from rotator.demo import routes_control, routes_more, routes_openai
from rotator.demo.core import GIB, Core
from rotator.demo.dialects import stub_dialect
from rotator.demo.memory import DeviceFault, PlainMemory, RankMemory
from rotator.demo.misbehave import Misbehaviour
from rotator.demo.sequences import Speed
from rotator.demo.wire import SERVED, Served, errors_as_json, only_with

log = logging.getLogger("vllm")

_SHUTDOWN_S = 0.25
_BODY_BYTES_MAX = 128 << 20


def build_app(
    core: Core, models: Sequence[str], *, version: str, dev_mode: bool = True, task: str = "generate", key: str = ""
) -> web.Application:
    """The whole HTTP side over a core, for this process or for a test's. The core's task lives as long as the app."""
    app = web.Application(middlewares=[only_with(key), errors_as_json], client_max_size=_BODY_BYTES_MAX)
    app[SERVED] = Served(core, tuple(models), task)
    app[routes_control.DIALECT] = stub_dialect(version)
    app[routes_control.OPERATIONS] = set()
    routes_control.add(app, dev_mode=dev_mode)
    routes_openai.add(app)
    routes_more.add(app)
    app.cleanup_ctx.append(_core_task)
    return app


async def _core_task(app: web.Application) -> AsyncIterator[None]:
    task = asyncio.create_task(app[SERVED].core.run())
    yield
    for pending in [task, *app[routes_control.OPERATIONS]]:
        pending.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m rotator.demo.engine", description=__doc__)
    p.add_argument("--name", required=True, help="the engine's name; its weights are made from it")
    p.add_argument("--served-model-name", action="append", help="instead of --name; repeatable")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, required=True)
    p.add_argument("--gpus", default="0", help="GPU indices of the ranks, comma separated")
    p.add_argument("--tp", type=int, help="number of ranks; as many as --gpus")
    p.add_argument("--weights-gib", type=float, default=8.0, help="a GPU")
    p.add_argument("--kv-gib", type=float, default=8.0, help="a GPU")
    p.add_argument("--residue-gib", type=float, default=0.5, help="a GPU: what no sleep gives back, context apart")
    p.add_argument("--memory", choices=("allocator", "plain"), default="allocator")
    p.add_argument("--dialect", default="0.26.0", help="the vLLM version to speak as")
    p.add_argument("--task", choices=("generate", "chat", "embed", "score"), default="generate")
    p.add_argument("--no-dev-mode", action="store_true", help="no /sleep, as without VLLM_SERVER_DEV_MODE=1")
    p.add_argument("--tokens-per-s", type=float, default=200.0, help="of each stream")
    p.add_argument("--prefill-tokens-per-s", type=float, default=20_000.0)
    p.add_argument("--max-num-seqs", type=int, default=256)
    p.add_argument("--load-s", type=float, default=0.0, help="how long the start takes at least")
    p.add_argument("--misbehave", default="{}", help="JSON, as POST /stub/misbehave takes it")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM. Returns the exit code: 0 after a signal, 1 where it could not start."""
    arguments = parser().parse_args(argv)
    gpus = tuple(int(part) for part in arguments.gpus.split(","))
    if arguments.tp not in (None, len(gpus)):
        parser().error(f"--tp {arguments.tp} needs as many --gpus: there are {len(gpus)}")
    try:
        misbehaviour = Misbehaviour.model_validate_json(arguments.misbehave)
    except ValueError as e:
        parser().error(f"--misbehave: {e}")
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stdout,
        format="%(levelname)s %(asctime)s [stub] %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    if misbehaviour.die("start"):
        log.error("cannot start, as told")
        return misbehaviour.exit_code
    try:
        return asyncio.run(_serve(arguments, gpus, misbehaviour))
    except DeviceFault as e:
        log.error("EngineCore failed to start: %s", e)
    except OSError as e:
        log.error("cannot listen on %s:%s: %s", arguments.host, arguments.port, e.strerror)
    return 1


async def _serve(arguments: argparse.Namespace, gpus: tuple[int, ...], misbehaviour: Misbehaviour) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info("vLLM API server version %s (stub), model %s, tp=%d", arguments.dialect, arguments.name, len(gpus))
    # The port is taken at once and listened on at the end, as vLLM does: a taken port shows before the load.
    listener = _bind(arguments.host, arguments.port)
    ranks = await asyncio.to_thread(_take_memory, arguments, gpus)
    core = Core(
        ranks,
        seed=arguments.name,
        dialect=stub_dialect(arguments.dialect),
        speed=Speed(arguments.tokens_per_s, arguments.prefill_tokens_per_s, arguments.max_num_seqs),
        misbehaviour=misbehaviour,
        die=exit_now,
    )
    began_s = loop.time()
    await asyncio.to_thread(core.load)
    if misbehaviour.die("load"):
        exit_now(misbehaviour.exit_code)
    delay_s = max(arguments.load_s, misbehaviour.start_delay_s)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), timeout=max(0.0, delay_s))
    log.info("Loading weights took %.2f seconds: %.2f GiB a GPU", loop.time() - began_s, arguments.weights_gib)
    log.info("GPU KV cache size: %.2f GiB a GPU", arguments.kv_gib)
    if not stop.is_set():
        await _listen(arguments, core, listener, stop)
    for rank in ranks:
        rank.close()
    log.info("Shut down")
    return 0


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


async def _listen(arguments: argparse.Namespace, core: Core, listener: socket.socket, stop: asyncio.Event) -> None:
    app = build_app(
        core,
        arguments.served_model_name or [arguments.name],
        version=arguments.dialect,
        dev_mode=not arguments.no_dev_mode,
        task=arguments.task,
        key=os.environ.get("VLLM_API_KEY", ""),
    )
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    await web.SockSite(runner, listener, backlog=1024).start()
    log.info("Starting vLLM API server on http://%s:%d", arguments.host, arguments.port)
    log.info("Application startup complete.")
    await stop.wait()
    log.info("Shutting down")
    await runner.cleanup()


def _take_memory(arguments: argparse.Namespace, gpus: tuple[int, ...]) -> list[RankMemory]:
    if arguments.memory == "plain":
        return [PlainMemory() for _ in gpus]
    # Only here: the tests' engines hold plain memory and need no driver.
    from rotator.demo.device_memory import AllocatorMemory, ordinals

    return [
        AllocatorMemory(
            device=device,
            weights_bytes=int(arguments.weights_gib * GIB),
            kv_bytes=int(arguments.kv_gib * GIB),
            residue_bytes=int(arguments.residue_gib * GIB),
        )
        for device in ordinals(gpus)
    ]


def exit_now(code: int) -> None:
    """Die as a crashed process does: no clean-up, connections cut. The last log lines are kept."""
    log.error("dying with exit code %d", code)
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
