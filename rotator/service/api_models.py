"""What the operators' API takes and gives, as JSON. Views are the dataclasses of ``operations.py`` as they are."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from rotator.core.values import Action, Blocked, BlockKind, Command, Plan, Step, Swap
from rotator.ports import Incident
from rotator.service.operations import CommandResult

DEADLINE_MAX_S = 24 * 3600.0
DEADLINE_DEFAULT_S = 600.0


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


# -- what it takes ---------------------------------------------------------------------------------------------------


class Timing(Wire):
    """How to carry out a command. Every field may come in the JSON body or as a query parameter."""

    wait: bool | None = Field(default=None, description="answer when it is done (default), or at once with 202")
    deadline_s: float | None = Field(
        default=None, gt=0, le=DEADLINE_MAX_S, description="how long to wait at most; 600 if absent"
    )
    dry_run: bool | None = Field(default=None, description="only show the plan and its reasons")


class Options(Timing):
    force: bool | None = Field(
        default=None, description="abort requests in flight instead of freezing them; needs scope admin"
    )


class WakeFields(Options):
    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "glm-5.1", "wait": True}]})

    model: str | None = Field(default=None, description="an engine's name or alias")


class SleepFields(Options):
    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "dsv4-flash", "level": 1}]})

    model: str | None = Field(default=None, description="an engine's name or alias")
    level: int | None = Field(
        default=None,
        ge=1,
        le=2,
        description="1 keeps weights in host RAM, 2 discards them; absent: the engine's first",
    )


class SwapFields(Options):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"wake": "glm-5.1", "sleep": ["dsv4-flash"], "level": 1, "dry_run": True}]}
    )

    wake: str | None = Field(default=None, description="who takes its turn: an engine's name or alias")
    sleep: list[str] | None = Field(
        default=None, max_length=64, description="who must yield; the planner adds whoever else is in the way"
    )
    level: int | None = Field(default=None, ge=1, le=2, description="the sleep level of those named")


class RestartFields(Timing):
    model_config = ConfigDict(json_schema_extra={"examples": [{"wait": True, "deadline_s": 600}]})


class StartFields(Options):
    model_config = ConfigDict(json_schema_extra={"examples": [{"wait": False}]})


# -- plans -----------------------------------------------------------------------------------------------------------


class CommandModel(Wire):
    kind: str
    engine: str
    level: int | None
    force: bool

    @classmethod
    def of(cls, command: Command) -> Self:
        level = None if command.level is None else int(command.level)
        return cls(kind=command.kind, engine=command.engine, level=level, force=command.force)


class StepModel(Wire):
    """One engine's part in a swap."""

    action: Action
    engine: str
    reason: str
    level: int | None
    depth: str | None = Field(default=None, description="how deep it sleeps then, where its level does not say")
    force: bool
    drain_bound_s: float
    expected_s: float
    bytes_per_gpu: dict[str, int] = Field(description="bytes it takes on each GPU; negative: it frees them")

    @classmethod
    def of(cls, step: Step) -> Self:
        return cls(
            action=step.action,
            engine=step.engine,
            reason=step.reason,
            level=None if step.level is None else int(step.level),
            depth=step.depth,
            force=step.force,
            drain_bound_s=step.drain_bound_s,
            expected_s=step.expected_s,
            bytes_per_gpu=dict(step.bytes_per_gpu),
        )


class BundleItem(BaseModel):
    """One file of a bundle."""

    name: str
    bytes: int
    cut_from_bytes: int | None = Field(default=None, description="its whole size, where it was cut")


class BundleLack(BaseModel):
    what: str
    why: str


class IncidentDetail(Wire):
    """An incident with what its bundle holds, and what could not be collected."""

    incident: Incident
    items: list[BundleItem]
    missing: list[BundleLack]

    @classmethod
    def of(cls, incident: Incident, manifest: Mapping[str, Any]) -> Self:
        items = [BundleItem.model_validate(i) for i in manifest.get("items", ())]
        missing = [BundleLack.model_validate(m) for m in manifest.get("missing", ())]
        return cls(incident=incident, items=items, missing=missing)


class SwapModel(Wire):
    """Who yields, and who takes their place. Swaps of one plan touch disjoint GPUs and run in parallel."""

    evict: list[StepModel]
    admit: StepModel | None
    reason: str
    gpus: list[str]
    expected_s: float
    command: CommandModel | None

    @classmethod
    def of(cls, swap: Swap) -> Self:
        return cls(
            evict=[StepModel.of(s) for s in swap.evict],
            admit=StepModel.of(swap.admit) if swap.admit else None,
            reason=swap.reason,
            gpus=sorted(swap.gpus),
            expected_s=swap.expected_s,
            command=CommandModel.of(swap.command) if swap.command else None,
        )


class BlockedModel(Wire):
    """A wish that the plan does not serve, and why."""

    engine: str
    kind: BlockKind
    reason: str
    until_in_s: float | None = Field(description="when time alone may change it; null: something else has to")
    command: CommandModel | None

    @classmethod
    def of(cls, blocked: Blocked, now_s: float) -> Self:
        return cls(
            engine=blocked.engine,
            kind=blocked.kind,
            reason=blocked.reason,
            until_in_s=_until(blocked.until_s, now_s),
            command=CommandModel.of(blocked.command) if blocked.command else None,
        )


class PlanModel(Wire):
    """What would be done now, and why everything else waits."""

    swaps: list[SwapModel]
    blocked: list[BlockedModel]
    look_again_in_s: float | None
    summary: list[str] = Field(description="the same in words, one line a step")

    @classmethod
    def of(cls, plan: Plan, now_s: float) -> Self:
        """``now_s`` is on the clock of the plan's snapshot: the event loop's."""
        return cls(
            swaps=[SwapModel.of(s) for s in plan.swaps],
            blocked=[BlockedModel.of(b, now_s) for b in plan.blocked],
            look_again_in_s=_until(plan.look_again_at_s, now_s),
            summary=summarize(plan),
        )


def summarize(plan: Plan) -> list[str]:
    lines = []
    for swap in plan.swaps:
        steps = (*swap.evict, swap.admit) if swap.admit else swap.evict
        lines += [f"{s.action} {s.engine} ({s.expected_s:.1f} s): {s.reason}" for s in steps]
    lines += [f"{b.engine} waits ({b.kind}): {b.reason}" for b in plan.blocked]
    return lines or ["nothing to do"]


def _until(at_s: float | None, now_s: float) -> float | None:
    return None if at_s is None else max(0.0, round(at_s - now_s, 3))


# -- what it gives ---------------------------------------------------------------------------------------------------


class ResultModel(Wire):
    engine: str
    action: Action
    state: str
    done: bool
    seconds: float
    phases_s: dict[str, float] = Field(description="where the time went: drain, sleep, verify, wake, canary, ...")

    @classmethod
    def of(cls, result: CommandResult) -> Self:
        return cls(
            engine=result.engine,
            action=result.action,
            state=result.state,
            done=result.done,
            seconds=result.seconds,
            phases_s=dict(result.phases_s),
        )


class CommandAnswer(Wire):
    """``done`` is false for a dry run, and where the caller did not wait."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "done": True,
                    "dry_run": False,
                    "results": [
                        {
                            "engine": "glm-5.1",
                            "action": "wake",
                            "state": "awake",
                            "done": True,
                            "seconds": 2.1,
                            "phases_s": {"drain": 0.4, "sleep": 0.5, "wake": 1.0, "canary": 0.2},
                        }
                    ],
                    "plan": {"swaps": [], "blocked": [], "look_again_in_s": None, "summary": ["nothing to do"]},
                }
            ]
        }
    )

    done: bool
    dry_run: bool
    results: list[ResultModel]
    plan: PlanModel

    @classmethod
    def of(cls, results: Sequence[CommandResult], now_s: float) -> Self:
        plan = results[0].plan if results else Plan()
        return cls(
            done=all(r.done for r in results),
            dry_run=False,
            results=[ResultModel.of(r) for r in results],
            plan=PlanModel.of(plan, now_s),
        )

    @classmethod
    def dry(cls, plan: Plan, now_s: float) -> Self:
        return cls(done=False, dry_run=True, results=[], plan=PlanModel.of(plan, now_s))


class LedgerTable(Wire):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"table": "leases", "rows": [{"gpu": "GPU-0", "holder": "glm-5.1", "bytes": 1}], "next_cursor": None}
            ]
        }
    )

    table: str
    rows: list[dict[str, Any]]
    next_cursor: str | None = Field(description="give it as 'cursor' for the next page; null at the end")


class LedgerCheckModel(Wire):
    model_config = ConfigDict(json_schema_extra={"examples": [{"matches": True, "differences": []}]})

    matches: bool
    differences: list[str]


class ReloadAnswer(Wire):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"changes": ["policies.min_stay_s: 2.0 -> 5.0 (applied)"]}]}
    )

    changes: list[str] = Field(description="one line each; empty: the file asks for nothing new")


class CordonFields(Wire):
    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "riser cable is being replaced"}]})

    reason: str = Field(default="", max_length=500, description="shown wherever the GPU is")


class ReadinessModel(Wire):
    model_config = ConfigDict(json_schema_extra={"examples": [{"ready": True, "reasons": []}]})

    ready: bool
    reasons: list[str] = Field(description="what is degraded")


class Health(Wire):
    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "alive"}]})

    status: Literal["alive"] = "alive"


class Index(Wire):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"service": "rotator", "version": "0.1.0", "docs": "/docs", "openapi": "/openapi.json", "info": {}}
            ]
        }
    )

    service: str
    docs: str
    openapi: str
    version: str
