"""What a PromQL expression reads: metrics, and labels of each."""

import re
from collections.abc import Iterator

import promql_parser as promql

GRAFANA = (("$__rate_interval", "5m"), ("$__range", "6h"))
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


def parse(text: str) -> promql.Expr:
    """With Grafana's own variables filled in. Raises ValueError where it is no PromQL."""
    for name, value in GRAFANA:
        text = text.replace(name, value)
    return promql.parse(_VARIABLE.sub("x", text))


def reads(node: promql.Expr) -> Iterator[tuple[str, set[str]]]:
    """Each selector's metric with the labels that it matches by."""
    match node:
        case promql.VectorSelector():
            yield node.name, {matcher.name for matcher in node.matchers.matchers}
        case promql.MatrixSelector():
            yield from reads(node.vector_selector)
        case promql.BinaryExpr():
            yield from reads(node.lhs)
            yield from reads(node.rhs)
        case promql.Call():
            for argument in node.args:
                yield from reads(argument)
        case promql.AggregateExpr() | promql.ParenExpr() | promql.SubqueryExpr() | promql.UnaryExpr():
            yield from reads(node.expr)


def groups(node: promql.Expr) -> Iterator[tuple[set[str], set[str]]]:
    """Labels that aggregations group by, each with the metrics below it."""
    match node:
        case promql.AggregateExpr():
            if node.modifier is not None:
                yield set(node.modifier.labels), {name for name, _ in reads(node.expr)}
            yield from groups(node.expr)
        case promql.BinaryExpr():
            yield from groups(node.lhs)
            yield from groups(node.rhs)
        case promql.Call():
            for argument in node.args:
                yield from groups(argument)
        case promql.ParenExpr() | promql.SubqueryExpr() | promql.UnaryExpr():
            yield from groups(node.expr)
