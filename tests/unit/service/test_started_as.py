"""What an engine was started as, while the configuration already says something else."""

from rotator.core.values import Command, CommandKind
from rotator.service.setup import Setup
from rotator.sim.clock import run
from tests.fakes import make_box, make_service


def test_the_row_of_an_engine_says_what_runs_and_not_what_its_next_start_would_be() -> None:
    async def story() -> None:
        async with make_service(make_box(a=((0,), 8.0))) as service:
            await service.ask("a")
            setup = Setup(service.loop, lambda _: None, lambda _: 1)
            service.loop.rebuild = setup.rebuild
            old = service.config
            new = old.model_copy(update={"engines": (old.engines[0].model_copy(update={"env": {"VERSION": "2"}}),)})
            hashes = [c.engines[0].spec_hash() for c in (old, new)]
            setup.apply(new)
            assert service.loop.runtime("a").record().spec_hash == hashes[0]
            stop = Command(CommandKind.STOP, "a")
            await service.operator.command(stop, wait=True, deadline_s=60)
            assert service.loop.runtime("a").record().spec_hash == hashes[1]

    run(story())
