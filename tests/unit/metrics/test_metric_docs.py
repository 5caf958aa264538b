"""The reference of the metrics is what the registry has."""

from pathlib import Path

from rotator.cli import metric_docs
from rotator.service.metric_table import ENGINE_ROWS, ROWS

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_the_reference_is_current() -> None:
    assert DOCS.read_text() == metric_docs.markdown(), "run 'make docs'"


def test_names_follow_prometheus_conventions() -> None:
    for row in (*ROWS.values(), *ENGINE_ROWS.values()):
        assert row.name.startswith("rotator_")
        assert row.name.endswith("_total") == (row.kind == "counter"), row.name
        assert not row.name.endswith(("_ms", "_gib", "_percent", "_minutes", "_count", "_sum", "_bucket")), row.name
        assert bool(row.buckets) == (row.kind == "histogram"), row.name
