"""The routes that change something: wake, sleep, swap; start, stop, restart, release, pin; cordon; reload."""

import asyncio
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response

from rotator.core.values import Command, CommandKind, Level
from rotator.service import api_examples
from rotator.service.api_gate import Need
from rotator.service.api_models import (
    DEADLINE_DEFAULT_S,
    CommandAnswer,
    CordonFields,
    Options,
    ReloadAnswer,
    RestartFields,
    SleepFields,
    StartFields,
    SwapFields,
    Timing,
    WakeFields,
    Wire,
)
from rotator.service.operations import EngineView, GpuView, Operations
from rotator.service.problems import invalid, responses
from rotator.service.resolve import find_engine

Fields = TypeVar("Fields", bound=Wire)
_BEGUN: dict[int | str, dict[str, Any]] = {
    202: {"model": CommandAnswer, "description": "Begun (wait=false): follow it in /events"}
}
_COMMAND: dict[int | str, dict[str, Any]] = {**_BEGUN, **responses(404, 409, 413, 415, 502, 504)}


def merged(query: Fields, body: Fields | None) -> Fields:
    """Fields may come in the query or in the body. Raises ProblemError (422) where both give one, differently."""
    given = query.model_dump(exclude_none=True)
    also = body.model_dump(exclude_none=True) if body else {}
    twice = [name for name in also if name in given and given[name] != also[name]]
    if twice:
        raise invalid([f"query.{name}: the body gives it another value: give it once" for name in twice])
    return type(query).model_validate({**given, **also})


class Commands:
    """Carries out what a route asked for, with its options."""

    def __init__(self, ops: Operations, need: Need) -> None:
        self._ops = ops
        self._need = need

    def make(self, kind: CommandKind, model: str, fields: Timing, level: int | None = None) -> Command:
        name = find_engine(self._ops, model).name
        now_s = asyncio.get_running_loop().time()
        force = isinstance(fields, Options) and bool(fields.force)
        return Command(kind, name, None if level is None else Level(level), force, now_s)

    async def carry_out(
        self, request: Request, response: Response, fields: Options, *commands: Command
    ) -> CommandAnswer:
        if fields.force:
            self._need.check(request, "admin")
        now_s = asyncio.get_running_loop().time()
        if fields.dry_run:
            return CommandAnswer.dry(self._ops.plan_for(*commands), now_s)
        wait = fields.wait is not False
        results = await self._ops.command(*commands, wait=wait, deadline_s=fields.deadline_s or DEADLINE_DEFAULT_S)
        return self.answer(CommandAnswer.of(results, now_s), response)

    @staticmethod
    def answer(answer: CommandAnswer, response: Response) -> CommandAnswer:
        response.status_code = 200 if answer.done else 202
        return answer


def swap_router(ops: Operations, need: Need) -> APIRouter:
    router = APIRouter(tags=["turns"], dependencies=[need("operate")], responses=_COMMAND)
    commands = Commands(ops, need)

    @router.post("/wake", summary="Give a model its turn")
    async def wake(
        request: Request, response: Response, query: Annotated[WakeFields, Query()], body: WakeFields | None = None
    ) -> CommandAnswer:
        """Whoever is in the way yields as the plan says; `dry_run=true` shows it. An engine that is stopped starts."""
        fields = merged(query, body)
        if fields.model is None:
            raise invalid(["model: is missing: say which model to wake"])
        command = commands.make(CommandKind.WAKE, fields.model, fields)
        return await commands.carry_out(request, response, fields, command)

    @router.post("/sleep", summary="Send a model to sleep")
    async def sleep(
        request: Request, response: Response, query: Annotated[SleepFields, Query()], body: SleepFields | None = None
    ) -> CommandAnswer:
        """Requests in flight finish, or freeze at the drain bound and go on after the next wake."""
        fields = merged(query, body)
        if fields.model is None:
            raise invalid(["model: is missing: say which model to send to sleep"])
        command = commands.make(CommandKind.SLEEP, fields.model, fields, fields.level)
        return await commands.carry_out(request, response, fields, command)

    @router.post("/swap", summary="Send some models to sleep and wake another in one plan")
    async def swap(
        request: Request, response: Response, query: Annotated[SwapFields, Query()], body: SwapFields | None = None
    ) -> CommandAnswer:
        fields = merged(query, body)
        if fields.wake is None:
            raise invalid(["wake: is missing: say which model takes its turn"])
        takes = commands.make(CommandKind.WAKE, fields.wake, fields)
        yields = [commands.make(CommandKind.SLEEP, m, fields, fields.level) for m in fields.sleep or ()]
        if takes.engine in {c.engine for c in yields}:
            raise invalid([f"sleep: '{takes.engine}' cannot both wake and sleep: name it once"])
        return await commands.carry_out(request, response, fields, *yields, takes)

    return router


def engine_router(ops: Operations, need: Need) -> APIRouter:
    router = APIRouter(tags=["engines"], dependencies=[need("operate")])
    commands = Commands(ops, need)

    @router.post("/engines/{name:path}/start", summary="Start an engine", responses=_COMMAND)
    async def start(
        name: str,
        request: Request,
        response: Response,
        query: Annotated[StartFields, Query()],
        body: StartFields | None = None,
    ) -> CommandAnswer:
        fields = merged(query, body)
        return await commands.carry_out(request, response, fields, commands.make(CommandKind.START, name, fields))

    @router.post("/engines/{name:path}/stop", summary="Stop an engine and free all it holds", responses=_COMMAND)
    async def stop(
        name: str,
        request: Request,
        response: Response,
        query: Annotated[StartFields, Query()],
        body: StartFields | None = None,
    ) -> CommandAnswer:
        fields = merged(query, body)
        return await commands.carry_out(request, response, fields, commands.make(CommandKind.STOP, name, fields))

    @router.post("/engines/{name:path}/restart", summary="Stop an engine and start it again", responses=_COMMAND)
    async def restart(
        name: str,
        request: Request,
        response: Response,
        query: Annotated[RestartFields, Query()],
        body: RestartFields | None = None,
    ) -> CommandAnswer:
        """Drains like any stop: nothing in flight is aborted. A dry run shows the stop."""
        fields = merged(query, body)
        now_s = asyncio.get_running_loop().time()
        stop = commands.make(CommandKind.STOP, name, fields)
        if fields.dry_run:
            return CommandAnswer.dry(ops.plan_for(stop), now_s)
        deadline_s = fields.deadline_s or DEADLINE_DEFAULT_S
        result = await ops.restart(stop.engine, wait=fields.wait is not False, deadline_s=deadline_s)
        return commands.answer(CommandAnswer.of([result], now_s), response)

    _pin_routes(router, ops)
    return router


def _pin_routes(router: APIRouter, ops: Operations) -> None:
    shown: dict[int | str, dict[str, Any]] = {**api_examples.ok(api_examples.ENGINES[0]), **responses(404, 409)}

    @router.post("/engines/{name:path}/pin", summary="Never evict an engine", responses=shown)
    async def pin(name: str) -> EngineView:
        return await ops.set_pin(find_engine(ops, name).name, True)

    @router.post("/engines/{name:path}/unpin", summary="Let an engine be evicted again", responses=shown)
    async def unpin(name: str) -> EngineView:
        return await ops.set_pin(find_engine(ops, name).name, False)


def admin_router(ops: Operations, need: Need) -> APIRouter:
    router = APIRouter(tags=["administration"], dependencies=[need("admin")])
    gpu_shown: dict[int | str, dict[str, Any]] = {**api_examples.ok(api_examples.GPUS[0]), **responses(404, 409)}

    @router.post(
        "/engines/{name:path}/release",
        summary="Let a quarantined or failed engine try again at once",
        responses={**api_examples.ok(api_examples.ENGINES[0]), **responses(404, 409)},
    )
    async def release(name: str) -> EngineView:
        return await ops.release(find_engine(ops, name).name)

    @router.post("/gpus/{gpu:path}/cordon", summary="Keep new work off a GPU", responses=gpu_shown)
    async def cordon(gpu: str, query: Annotated[CordonFields, Query()], body: CordonFields | None = None) -> GpuView:
        """`gpu` is an index or a UUID. Engines there may sleep and stop; none wakes or starts."""
        reason = (body.reason if body else "") or query.reason
        return await ops.set_cordon(gpu, True, reason)

    @router.post("/gpus/{gpu:path}/uncordon", summary="Let work on a GPU again", responses=gpu_shown)
    async def uncordon(gpu: str) -> GpuView:
        return await ops.set_cordon(gpu, False, "")

    @router.post("/config/reload", summary="Read the configuration file again and apply it", responses=responses(409))
    async def reload() -> ReloadAnswer:
        """Engines that the change does not concern are not touched. A wrong file changes nothing (422)."""
        return ReloadAnswer(changes=list(await ops.reload()))

    return router
