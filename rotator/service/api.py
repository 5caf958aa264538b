"""The operators' REST API: the one place where its routes, its gate and its errors are put together."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from rotator import __version__
from rotator.ports import EngineLogs
from rotator.service import api_examples, problems
from rotator.service.api_calendar import calendar_router
from rotator.service.api_commands import admin_router, engine_router, swap_router
from rotator.service.api_docs import docs_router
from rotator.service.api_gate import Gate, Need
from rotator.service.api_incidents import incident_router
from rotator.service.api_logs import logs_router
from rotator.service.api_models import Health, Index, ReadinessModel
from rotator.service.api_views import journal_router, state_router
from rotator.service.events import EventBus
from rotator.service.keys import Authorize, Guard
from rotator.service.operations import Operations
from rotator.service.problems import Problem, ProblemError

_TAGS = [
    {"name": "turns", "description": "Which model is awake. Plans come with their reasons; `dry_run` only shows them."},
    {"name": "engines", "description": "One engine's life."},
    {"name": "calendar", "description": "Times at which engines are kept awake."},
    {"name": "state", "description": "Engines, GPUs, queue and plan as they are now."},
    {"name": "journal", "description": "What happened: the ledger's tables and the stream of events."},
    {"name": "administration", "description": "Cordons, quarantine, configuration."},
    {"name": "service", "description": "The service itself."},
]


def create_api(
    ops: Operations,
    events: EventBus,
    *,
    authorize: Authorize,
    guard: Guard | None = None,
    metrics_registry: CollectorRegistry | None = None,
    keepalive_s: float = 10.0,
    logs: EngineLogs | None = None,
    engine_metrics: Callable[[], Awaitable[bytes]] | None = None,
) -> FastAPI:
    """The ASGI application. ``authorize`` and ``guard`` are those of ``keys.Keys``; ``keepalive_s`` is how often a
    silent event stream gets a comment; ``engine_metrics`` makes the page of the engines' own. Every error is a problem
    (RFC 9457)."""
    app = FastAPI(
        title="rotator",
        version=__version__,
        summary="Models take turns on shared GPUs",
        openapi_tags=_TAGS,
        docs_url=None,
        redoc_url=None,
    )
    need = Need(authorize)
    app.add_middleware(Gate, guard=guard)
    problems.install(app)
    app.include_router(docs_router())
    app.include_router(_service_router(ops, need))
    app.include_router(_metrics_router(need, metrics_registry or CollectorRegistry(), engine_metrics))
    app.include_router(swap_router(ops, need))
    app.include_router(engine_router(ops, need))
    app.include_router(admin_router(ops, need))
    app.include_router(calendar_router(ops, need))
    app.include_router(incident_router(ops, need))
    app.include_router(journal_router(ops, events, need, keepalive_s))
    if logs is not None:
        app.include_router(logs_router(ops, logs, events, need))
    app.include_router(state_router(ops, need))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign] # FastAPI's own way to adapt the description
    return app


def _service_router(ops: Operations, need: Need) -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.get("/", summary="Where to look", responses=problems.responses())
    async def index() -> Index:
        return Index(service="rotator", docs="/docs", openapi="/openapi.json", version=__version__)

    @router.get("/info", summary="Version, start, counters", dependencies=[need("infer")], responses=_plain())
    async def info() -> dict[str, Any]:
        return dict(ops.info())

    @router.get("/healthz", summary="Whether the service is alive", responses=problems.responses())
    async def healthz() -> Health:
        return Health()

    @router.get("/readyz", summary="Whether it can do its job", responses=problems.responses(503))
    async def readyz() -> ReadinessModel:
        """503 with the reasons where it cannot."""
        state = ops.readiness()
        if not state.ready:
            detail = "; ".join(state.reasons) or "not ready"
            raise ProblemError(503, "not-ready", "Not ready", detail, reasons=list(state.reasons))
        return ReadinessModel(ready=True, reasons=list(state.reasons))

    return router


def _metrics_router(
    need: Need, registry: CollectorRegistry, engines: Callable[[], Awaitable[bytes]] | None
) -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.get(
        "/metrics",
        summary="Metrics for Prometheus",
        dependencies=[need("infer")],
        response_class=PlainTextResponse,
        responses={**api_examples.METRICS, **problems.responses()},
    )
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get(
        "/metrics/engines",
        summary="The engines' own metrics, labelled by model",
        dependencies=[need("infer")],
        response_class=PlainTextResponse,
        responses={**api_examples.ENGINE_METRICS, **problems.responses()},
    )
    async def engine_metrics() -> Response:
        """Wakes no engine and counts as no use. Sleeping engines are shown as they last were."""
        text = await engines() if engines is not None else b""
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def _plain() -> dict[int | str, dict[str, Any]]:
    return {**api_examples.ok({"version": __version__}), **problems.responses()}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with the schema of problems, which no route returns by itself."""
    if app.openapi_schema is None:
        described = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes, tags=app.openapi_tags
        )
        described["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        for unused in ("HTTPValidationError", "ValidationError"):
            described["components"]["schemas"].pop(unused, None)
        app.openapi_schema = described
    return app.openapi_schema
