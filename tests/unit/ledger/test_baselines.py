"""Baselines of engines' versions, written beside the service that holds the ledger."""

from pathlib import Path

import pytest

from rotator.adapters.baselines import SqlBaselines
from rotator.adapters.ledger import SqlLedger
from rotator.ports import LedgerError


async def test_a_baseline_is_written_and_shown_while_a_service_holds_the_ledger(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = await SqlLedger.open(url, deadline_s=5, sample_retention_h=1)
    baselines = SqlBaselines(url)
    baselines.put("glm", "v1", {"image": "a"}, {"speed": 1})
    baselines.put("glm", "v1", {"image": "a"}, {"speed": 2})
    baselines.put("glm", "v2", {"image": "b"}, {"speed": 3})
    assert baselines.get("glm", "v1") == {"speed": 2}
    assert baselines.get("glm", "v3") is None
    rows = (await ledger.query("baselines", filters={"engine": "glm"})).rows
    assert {row["version"]: row["described"] for row in rows} == {"v1": {"image": "a"}, "v2": {"image": "b"}}
    baselines.close()
    await ledger.close()


def test_a_ledger_that_no_service_of_this_release_has_opened_says_so(tmp_path: Path) -> None:
    baselines = SqlBaselines(f"sqlite:///{tmp_path / 'new.db'}")
    with pytest.raises(LedgerError, match="is the service of this release running"):
        baselines.get("glm", "v1")
    baselines.close()
