"""The dashboard and the alerts that we ship speak of metrics that there are, in PromQL that can be read."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rotator.service.metric_table import ENGINE_ROWS, ROWS
from tests.unit.metrics.promql import groups, parse, reads

ROOT = Path(__file__).parents[3] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "grafana" / "rotator.json").read_text())
RULES: dict[str, Any] = yaml.safe_load((ROOT / "prometheus" / "alerts.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

# What is none of ours, with the labels that it has: Prometheus' own, prometheus_client's, and vLLM's once federated.
TARGET = {"job", "instance"}
OTHERS = {
    "up": set(),
    "process_resident_memory_bytes": set(),
    "vllm:num_requests_running": {"model"},
    "vllm:num_requests_waiting": {"model"},
    "vllm:kv_cache_usage_perc": {"model"},
}


def labels_of(metric: str) -> set[str] | None:
    """None where there is no such metric."""
    if metric in OTHERS:
        return OTHERS[metric] | TARGET
    rows = {**ROWS, **ENGINE_ROWS}
    base = re.sub(r"_(bucket|sum|count)$", "", metric)
    if (row := rows.get(metric)) is not None and row.kind != "histogram":
        return set(row.labels) | TARGET
    if base != metric and (row := rows.get(base)) is not None and row.kind == "histogram":
        return set(row.labels) | TARGET | ({"le"} if metric.endswith("_bucket") else set())
    return None


def problems(text: str) -> Iterator[str]:
    node = parse(text)
    for metric, labels in reads(node):
        has = labels_of(metric)
        if has is None:
            yield f"there is no metric {metric}"
        elif labels - has:
            yield f"{metric} has no label {', '.join(labels - has)}"
    for labels, metrics in groups(node):
        for metric in metrics:
            if labels - (labels_of(metric) or set()):
                yield f"{metric} cannot be grouped by {', '.join(labels)}"


EXPRESSIONS = [(p["title"], target["expr"]) for p in PANELS for target in p["targets"]]


@pytest.mark.parametrize(("title", "text"), EXPRESSIONS, ids=[title for title, _ in EXPRESSIONS])
def test_a_panel_reads_what_there_is(title: str, text: str) -> None:
    assert list(problems(text)) == []


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_an_alert_reads_what_there_is_and_says_what_to_do(rule: dict[str, Any]) -> None:
    assert list(problems(rule["expr"])) == []
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Rotator[A-Z][A-Za-z]+", rule["alert"])
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert re.fullmatch(r"\d+[smhd]", rule.get("for", "1m"))


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_an_alerts_words_name_labels_that_its_expression_has(rule: dict[str, Any]) -> None:
    named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    has: set[str] = set()
    for metric, _ in reads(parse(rule["expr"])):
        has |= labels_of(metric) or set()
    assert named <= has


def test_each_alert_has_its_own_name_and_the_faults_that_hurt_have_one() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names))
    wanted = (
        "Down EngineQuarantined LedgerDrift GpuCordoned LongWait EngineCrashLoop ResidueGrowth JournalLag CanaryFailing"
    )
    assert {f"Rotator{name}" for name in wanted.split()} <= set(names)


@pytest.mark.parametrize(
    "text",
    ["rotator_nothing > 0", 'rotator_ready{engine="a"}', "sum by (gpu) (rotator_ready)", "rotator_wait_seconds > 1"],
)
def test_the_check_finds_what_is_not_there(text: str) -> None:
    assert list(problems(text))


def test_the_check_finds_what_is_no_promql() -> None:
    with pytest.raises(ValueError, match=r"."):
        parse("sum(rate(rotator_requests_total[5m]) > 0")


def test_the_dashboard_can_be_imported_anywhere() -> None:
    assert DASHBOARD["uid"] == "rotator"
    assert DASHBOARD["id"] is None
    assert DASHBOARD["schemaVersion"] >= 38
    assert {t["name"]: t["type"] for t in DASHBOARD["templating"]["list"]}["datasource"] == "datasource"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for panel in PANELS:
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
        assert [target["refId"] for target in panel["targets"]] == [chr(65 + i) for i in range(len(panel["targets"]))]


def test_no_panel_lies_over_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_variables_take_their_values_from_metrics_that_there_are() -> None:
    queries = [t["definition"] for t in DASHBOARD["templating"]["list"] if t["type"] == "query"]
    for query in queries:
        found = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
        assert found is not None, query
        assert found[2] in (labels_of(found[1]) or set()), query
