"""Clients and operators of a script, as they come to the service."""

from datetime import UTC, datetime
from typing import Any

from rotator.config import ConfigError
from rotator.core.values import BlockKind, Command, CommandKind, State
from rotator.ports import RotatorError
from rotator.sim.faults.clients import Answer, Client
from rotator.sim.faults.life import ServiceLife
from rotator.sim.faults.script import Ask, Edit, Order, Reserve
from rotator.sim.faults.stage import Stage

_RESOLVED_BY_PEOPLE = frozenset({BlockKind.PINNED, BlockKind.CORDONED, BlockKind.QUARANTINED})


class People:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    # -- clients -----------------------------------------------------------------------------------------------------

    def ask(self, ask: Ask) -> None:
        stage = self._stage
        if not stage.life.up:
            stage.requests["down"] += 1
            return
        task = stage.world.spawn(self.one_client(ask))
        stage.clients[task] = ask
        task.add_done_callback(lambda done: stage.clients.pop(done, None))

    async def one_client(self, ask: Ask) -> Answer:
        stage, life = self._stage, self._stage.life
        answer = await Client(stage.world, life, ask).run()
        if answer.verdict == "forgotten" and life.up and self.needs_a_person(ask.engine):
            answer.verdict = "left"  # it stands still until somebody lets its engine wake
        stage.requests[answer.verdict] += 1
        stage.judge.on_answer(answer, life)
        return answer

    def needs_a_person(self, name: str) -> bool:
        loop = self._stage.life.loop
        if name not in loop.fleet.engines:
            return False
        if loop.runtime(name).state is State.QUARANTINED:
            return bool(loop.runtime(name).reason)
        blocked = loop.plan_for((Command(CommandKind.WAKE, name),)).blocked
        return any(b.engine == name and b.kind in _RESOLVED_BY_PEOPLE for b in blocked)

    # -- operators ---------------------------------------------------------------------------------------------------

    def order(self, order: Order) -> None:
        stage = self._stage
        if stage.life.up:
            for name in stage.engines if order.force else (order.target,):  # who makes room for a force is aborted too
                if order.force or order.verb in ("stop", "restart"):
                    stage.judge.forced(name)
            stage.life.spawn(self._carry_out(stage.life, order))

    def edit(self, edit: Edit) -> None:
        """The file is as it is, whether the service takes it or not."""
        stage = self._stage
        stage.file.edit(edit)
        if edit.how == "remove":
            stage.judge.removed.add(edit.engine)
        if stage.life.up:
            stage.life.spawn(self.reload(stage.life))

    def reserve(self, reserve: Reserve) -> None:
        if self._stage.life.up:
            self._stage.life.spawn(self._reserve(self._stage.life, reserve))

    async def _reserve(self, life: ServiceLife, reserve: Reserve) -> None:
        start = datetime.fromtimestamp(self._stage.world.wall() + reserve.in_s, UTC)
        terms: dict[str, Any] = {"duration_s": reserve.seconds, "priority": reserve.priority, "note": "by the script"}
        try:
            await life.operator.reserve((reserve.engine,), start=start, end=None, **terms)
        except RotatorError as e:
            self._stage.world.trace.note(f"reserve {reserve.engine}: {e}")

    async def reload(self, life: ServiceLife) -> bool:
        try:
            lines = await life.operator.reload()
        except (RotatorError, ConfigError) as e:
            self._stage.world.trace.note(f"reload: {e}")
            return False
        self._stage.world.trace.note(f"reload: {'; '.join(lines)}")
        return True

    async def _carry_out(self, life: ServiceLife, order: Order) -> None:
        operator, target = life.operator, order.target
        try:
            match order.verb:
                case "wake" | "sleep" | "stop" | "start":
                    command = Command(CommandKind(order.verb), target, force=order.force)
                    await operator.command(command, wait=True, deadline_s=60.0)
                case "restart":
                    await operator.restart(target, wait=True, deadline_s=60.0)
                case "release":
                    await operator.release(target)
                case "pin" | "unpin":
                    await operator.set_pin(target, order.verb == "pin")
                case _:
                    await operator.set_cordon(target, order.verb == "cordon", "by the script")
        except RotatorError as e:
            self._stage.world.trace.note(f"{order.verb} {target}: {e}")
