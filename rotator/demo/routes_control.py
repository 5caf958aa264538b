"""Health, sleep and the development endpoints, in the chosen release's dialect, and the stub's own admin endpoint."""

import asyncio
import json
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from rotator.demo.core import Core
from rotator.demo.dialects import LEVELS, MODES, WAKE_TAGS, StubDialect
from rotator.demo.misbehave import Misbehaviour
from rotator.demo.sequences import BadArgument
from rotator.demo.wire import bad_request, error, json_response, served

DIALECT: web.AppKey[StubDialect] = web.AppKey("dialect", StubDialect)
# Sleeps and wakes go on when the client that asked for them is gone, as they do in vLLM.
OPERATIONS: web.AppKey[set[asyncio.Task[None]]] = web.AppKey("operations", set)


async def health(request: web.Request) -> web.Response:
    return web.Response(status=503 if served(request).core.dead else 200)


async def version(request: web.Request) -> web.Response:
    return json_response({"version": request.app[DIALECT].version})


async def models(request: web.Request) -> web.Response:
    me = served(request)
    cards = [
        {"id": name, "object": "model", "owned_by": "vllm", "root": name, "max_model_len": me.max_model_len}
        for name in me.models
    ]
    return json_response({"object": "list", "data": cards})


async def is_sleeping(request: web.Request) -> web.Response:
    core = served(request).core
    await core.reachable()
    return json_response({"is_sleeping": core.is_sleeping})


async def sleep(request: web.Request) -> web.Response:
    """Only the query string counts: a body is not even read."""
    dialect, core = request.app[DIALECT], served(request).core
    level_text, mode = request.query.get("level", "1"), request.query.get("mode", "abort")
    known = level_text.lstrip("-").isdigit() and int(level_text) in LEVELS and mode in MODES
    if not known and dialect.checks_arguments:
        raise BadArgument(f"level must be one of {LEVELS} and mode one of {MODES}, not {level_text!r} and {mode!r}")
    if not known:
        return error(500, "InternalServerError", "Internal Server Error")
    await _carry_out(request, core.sleep(int(level_text), mode))
    if not dialect.json_bodies:
        return web.Response()
    return json_response({"status": "sleeping", "level": int(level_text)})


async def wake_up(request: web.Request) -> web.Response:
    dialect, core = request.app[DIALECT], served(request).core
    tags = request.query.getall("tags", [])
    await _carry_out(request, core.wake(tags))
    if not dialect.json_bodies:
        return web.Response()
    return json_response({"status": "sleeping" if core.is_sleeping else "awake", "tags": tags or list(WAKE_TAGS[:2])})


async def collective_rpc(request: web.Request) -> web.Response:
    """vLLM's own ``reload_weights``, and what an elastic allocator's plugin adds to the workers."""
    try:
        body = json.loads(await request.read())
        method, args = body["method"], list(body.get("args", ()))
    except (ValueError, KeyError, TypeError):
        raise BadArgument("a JSON body with 'method' is required") from None
    core = served(request).core
    match method, args:
        case "reload_weights", []:
            await _carry_out(request, core.reload_weights())
        case "rotator_sleep_bytes", [int(size)]:
            await _carry_out(request, core.free_bytes(size))
        case "rotator_wake", []:
            await _carry_out(request, core.restore())
        case "rotator_masters", [("host" | "disk" | "none") as where]:
            core.masters = where
        case _:
            return error(500, "InternalServerError", f"the workers have no method {method!r} that takes {args!r}")
    return json_response({"results": [None]})


async def reset_prefix_cache(request: web.Request) -> web.Response:
    await served(request).core.reachable()
    return web.Response()


async def lora_adapter(_request: web.Request) -> web.Response:
    return web.Response(text="Success: LoRA adapter changed")


async def metrics(request: web.Request) -> web.Response:
    me = served(request)
    return web.Response(text=metrics_text(me.core, me.models[0], request.app[DIALECT]))


def metrics_text(core: Core, model: str, dialect: StubDialect) -> str:
    """Prometheus text with the names that vLLM gives them."""
    label = f'{{engine="0",model_name="{model}"}}'
    sleep_state = {
        "awake": not core.is_sleeping,
        "weights_offloaded": core.is_sleeping and core.level < 2,
        "discard_all": core.is_sleeping and core.level == 2,
    }
    rows: list[tuple[str, str, float]] = [
        ("num_requests_running", "gauge", core.running),
        ("num_requests_waiting", "gauge", core.waiting),
        ("prompt_tokens_total", "counter", core.counters.prompt_tokens),
        ("generation_tokens_total", "counter", core.counters.generation_tokens),
        ("kv_cache_usage_perc", "gauge", core.kv_share),
        ("iteration_tokens_total_count", "counter", core.counters.steps),
    ]
    if core.counters.drafts:
        rows.append(("spec_decode_num_drafts_total", "counter", core.counters.drafts))
    lines = [f"# TYPE vllm:{name} {kind}\nvllm:{name}{label} {value}" for name, kind, value in rows]
    if core.counters.drafts:
        by_position = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        lines.append(f'{by_position}{{engine="0",model_name="{model}",position="0"}} {core.counters.accepted}')
    lines.append("# TYPE vllm:engine_sleep_state gauge")
    lines += [
        f'vllm:engine_sleep_state{{engine="0",model_name="{model}",sleep_state="{name}"}} {int(on)}'
        for name, on in sleep_state.items()
    ]
    if dialect.operation_metrics:
        lines += _operation_lines(core)
    return "\n".join(lines) + "\n"


def _operation_lines(core: Core) -> list[str]:
    done = {
        "sleep": (core.counters.sleep_s, core.counters.sleeps),
        "wake_up": (core.counters.wake_s, core.counters.wakes),
    }
    name = "vllm:sleep_mode_operation_duration_seconds"
    lines = [f"# TYPE {name} summary"]
    for operation, (seconds, times) in done.items():
        lines.append(f'{name}_sum{{operation="{operation}"}} {seconds}')
        lines.append(f'{name}_count{{operation="{operation}"}} {times}')
    return [*lines, f"vllm:sleep_mode_operations_in_flight {core.transitions}"]


async def get_misbehaviour(request: web.Request) -> web.Response:
    return json_response(served(request).core.misbehaviour.model_dump())


async def set_misbehaviour(request: web.Request) -> web.Response:
    """Change some ways of failing; those not named stay. ``{"reset": true}`` switches all others off first."""
    core = served(request).core
    try:
        wanted: dict[str, Any] = json.loads(await request.read())
        base = {} if wanted.pop("reset", False) else core.misbehaviour.model_dump()
        core.misbehaviour = Misbehaviour.model_validate(base | wanted)
    except (ValidationError, ValueError, AttributeError, TypeError) as e:
        return bad_request(str(e))
    core.poke()
    return json_response(core.misbehaviour.model_dump())


async def state(request: web.Request) -> web.Response:
    core = served(request).core
    counters = core.counters
    return json_response(
        {
            "sleeping": core.is_sleeping,
            "running": core.running,
            "waiting": core.waiting,
            "requests": counters.requests,
            "generation_tokens": counters.generation_tokens,
            "sleeps": counters.sleeps,
            "wakes": counters.wakes,
        }
    )


async def _carry_out(request: web.Request, operation: Any) -> None:
    tasks = request.app[OPERATIONS]
    task: asyncio.Task[None] = asyncio.ensure_future(operation)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    await asyncio.shield(task)


def add(app: web.Application, *, dev_mode: bool) -> None:
    """Without the dev mode there is no way to put an engine to sleep over HTTP: 404."""
    app.router.add_get("/health", health)
    app.router.add_get("/version", version)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    app.router.add_post("/v1/load_lora_adapter", lora_adapter)
    app.router.add_post("/v1/unload_lora_adapter", lora_adapter)
    app.router.add_get("/stub/misbehave", get_misbehaviour)
    app.router.add_post("/stub/misbehave", set_misbehaviour)
    app.router.add_get("/stub/state", state)
    if dev_mode:
        app.router.add_get("/is_sleeping", is_sleeping)
        app.router.add_post("/sleep", sleep)
        app.router.add_post("/wake_up", wake_up)
        app.router.add_post("/collective_rpc", collective_rpc)
        app.router.add_post("/reset_prefix_cache", reset_prefix_cache)
