"""A process that uses a ledger and says on stdout what was acknowledged. Run as: child.py MODE PATH [ARGUMENT]."""

import asyncio
import resource
import sys

from rotator.adapters.ledger import SqlLedger
from rotator.core.values import State
from rotator.ports import EngineRecord, Intent, Lease, LedgerError, Outcome, Residency


def say(*words: object) -> None:
    print(*words, flush=True)


def intent(number: int, plan: str = "") -> Intent:
    return Intent(f"s{number}", "glm", "wake", State.ASLEEP, State.WAKING, "asked for", {"why": plan})


async def hold(ledger: SqlLedger) -> None:
    say("ready")
    await asyncio.Event().wait()


async def write(ledger: SqlLedger) -> None:
    """Intents, outcomes, engines and residencies without end; every line is said after it was acknowledged."""
    number = 0
    while True:
        number += 1
        transition = await ledger.open_transition(intent(number, "x" * 1500))
        say("opened", transition)
        await ledger.put_engine(EngineRecord("glm", State.WAKING, failures=transition))
        await ledger.put_residencies([Residency("glm", f"g{i}", held_bytes=transition) for i in range(4)])
        await ledger.put_lease(Lease("g0", "glm", transition))
        ledger.sample_vram(0.0, "g0", number, {})
        ledger.count_request("glm", waited_s=0, outcome="ok")
        await ledger.close_transition(transition, Outcome("ok", State.AWAKE))
        say("closed", transition)


async def fill(ledger: SqlLedger, file_bytes_max: int) -> None:
    """Write until the file may not grow any more, say so, and go on when there is room again."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_max, hard))
    number = 0
    try:
        while number < 10_000:
            number += 1
            say("opened", await ledger.open_transition(intent(number, "x" * 20_000)))
    except LedgerError as e:
        say("refused", e)
    say("healthy", ledger.healthy, await ledger.probe(), ledger.healthy)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    say("healthy", await ledger.probe(), ledger.healthy)
    say("opened", await ledger.open_transition(intent(0)))
    await ledger.close()
    say("end")


async def main(mode: str, path: str, *arguments: str) -> None:
    try:
        ledger = await SqlLedger.open(f"sqlite:///{path}", deadline_s=5, sample_retention_h=1)
    except LedgerError as e:
        say("refused", e)
        return
    if mode == "fill":
        await fill(ledger, int(arguments[0]))
    else:
        await {"hold": hold, "write": write}[mode](ledger)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
