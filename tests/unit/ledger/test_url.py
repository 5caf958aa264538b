"""URLs that cannot be used say what to do."""

import pytest

from rotator.adapters.ledger import SqlLedger
from rotator.ports import LedgerError


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ledger.db", "Give e.g. sqlite:///"),
        ("nosuchdb://host/x", "Give e.g. sqlite:///"),
        ("sqlite:///file:x?mode=ro&uri=true", "the file's path instead"),
        ("postgresql+nosuchdriver://host/x", "Give e.g. sqlite:///"),
    ],
)
async def test_a_url_that_is_none_is_refused_with_an_example(url: str, says: str) -> None:
    with pytest.raises(LedgerError, match=says):
        await SqlLedger.open(url, deadline_s=1, sample_retention_h=1)


async def test_a_driver_that_is_not_installed_is_named() -> None:
    with pytest.raises(LedgerError, match="the driver 'oracledb' is not installed"):
        await SqlLedger.open("oracle+oracledb://u:secret@host/x", deadline_s=1, sample_retention_h=1)
