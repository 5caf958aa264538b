"""An engine that spans nodes, as a launcher there would start it: one front, and a part on each node's own devices.

    python -m tests.system.nodes.spanning NAME PORT BOX[,BOX...] [weights_gib kv_gib]

Control calls go to every part and are done when all have done them; everything else is answered by the first.
"""

import asyncio
import os
import signal
import subprocess
import sys

import aiohttp
from aiohttp import web

from allocator.box import SimulatedBox
from tests.system.service.rig import free_port

CONTROL = ("/sleep", "/wake_up")


async def main(name: str, port: int, boxes: list[SimulatedBox], weights: str, kv: str) -> None:
    ports = [free_port() for _ in boxes]
    children = [_part(name, own, box, weights, kv) for own, box in zip(ports, boxes, strict=True)]
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        for own in ports:
            await _healthy(session, own)
        app = web.Application()
        app["session"], app["ports"] = session, ports
        app.router.add_route("*", "/{path:.*}", _answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await stop.wait()
        await runner.cleanup()
    for child in children:
        child.terminate()


def _part(name: str, port: int, box: SimulatedBox, weights: str, kv: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rotator.demo.engine", "--name", name, "--port", str(port)]
    command += ["--weights-gib", weights, "--kv-gib", kv]
    return subprocess.Popen(command, env={**os.environ, **box.env()})


async def _healthy(session: aiohttp.ClientSession, port: int) -> None:
    while True:
        try:
            async with session.get(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.05)


async def _answer(request: web.Request) -> web.StreamResponse:
    session, ports = request.app["session"], request.app["ports"]
    body = await request.read()
    if request.path in CONTROL:
        statuses = await asyncio.gather(*(_pass(session, port, request, body) for port in ports))
        return web.json_response({}, status=max(statuses))
    url = f"http://127.0.0.1:{ports[0]}{request.path_qs}"
    headers = {k: v for k, v in request.headers.items() if k.lower() in ("content-type", "accept")}
    async with session.request(request.method, url, data=body, headers=headers) as answer:
        out = web.StreamResponse(status=answer.status, headers=_typed(answer))
        await out.prepare(request)
        async for chunk in answer.content.iter_any():
            await out.write(chunk)
        await out.write_eof()
        return out


def _typed(answer: aiohttp.ClientResponse) -> dict[str, str]:
    kind = answer.headers.get("Content-Type")
    return {"Content-Type": kind} if kind else {}


async def _pass(session: aiohttp.ClientSession, port: int, request: web.Request, body: bytes) -> int:
    async with session.request(request.method, f"http://127.0.0.1:{port}{request.path_qs}", data=body) as answer:
        await answer.read()
        return answer.status


if __name__ == "__main__":
    asyncio.run(
        main(sys.argv[1], int(sys.argv[2]), [SimulatedBox.open(p) for p in sys.argv[3].split(",")], *sys.argv[4:6])
    )
