from collections.abc import AsyncIterator

import pytest_asyncio

from rotator.adapters.ledger import SqlLedger
from tests.unit.ledger.values import Clock


@pytest_asyncio.fixture
async def clock() -> Clock:
    return Clock()


@pytest_asyncio.fixture
async def ledger(clock: Clock) -> AsyncIterator[SqlLedger]:
    """A ledger in memory."""
    opened = await SqlLedger.open("sqlite://", deadline_s=5, sample_retention_h=1, wall=clock)
    yield opened
    await opened.close()
