"""What an expression of PromQL is about: its metrics, with the labels that it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser as promql

# As Grafana replaces them; `.*` is "All".
VARIABLES = {"$__rate_interval": "1m", "$cluster": ".*", "$group": ".*", "$tenant": ".*"}


def plain(expr: str) -> str:
    """Without Grafana's variables."""
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def parse(expr: str) -> Any:
    """Raises ValueError if it is not PromQL."""
    return promql.parse(plain(expr))


def selectors(node: Any) -> Iterator[Any]:
    """All series selectors below a node."""
    match node:
        case promql.VectorSelector():
            yield node
        case promql.MatrixSelector():
            yield node.vector_selector
        case (
            promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr()
        ):
            yield from selectors(node.expr)
        case promql.Call():
            for argument in node.args:
                yield from selectors(argument)
        case promql.BinaryExpr():
            yield from selectors(node.lhs)
            yield from selectors(node.rhs)
        case promql.NumberLiteral() | promql.StringLiteral():
            pass
        case _:
            raise AssertionError(f"a kind of expression that is not known here: {node}")


def groupings(node: Any) -> Iterator[tuple[Any, list[str]]]:
    """The aggregations below a node, and the labels that they keep."""
    match node:
        case promql.AggregateExpr():
            yield node, list(node.modifier.labels) if node.modifier else []
            yield from groupings(node.expr)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from groupings(node.expr)
        case promql.Call():
            for argument in node.args:
                yield from groupings(argument)
        case promql.BinaryExpr():
            yield from groupings(node.lhs)
            yield from groupings(node.rhs)
