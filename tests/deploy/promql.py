"""Reads PromQL, and says what in it does not fit the metrics that there are.

A query over a metric or a label that nobody tells is no error to Prometheus: it finds nothing, a
panel stays empty and an alert silent. So every selector is held against what is known, and so are
the labels by which sums are split and sides are matched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import promql_parser

Labels = frozenset[str]

TARGET: Labels = frozenset({"fleet", "instance", "job", "service"})
"""What Prometheus adds to whatever it scrapes, and `deploy/prometheus/prometheus.yml` does."""


class Misfit(AssertionError):
    """A query asks for what is not there."""


def labels_of(query: str, known: Mapping[str, Labels]) -> Labels:
    """The labels of what `query` gives. `known` has the labels of each series by its name.

    Raises `Misfit`, or `ValueError` for what is no PromQL.
    """
    return _labels(promql_parser.parse(query), known)


def names_in(query: str) -> set[str]:
    """The names of the series that `query` asks for."""
    todo: list[Any] = [promql_parser.parse(query)]
    found = set()
    while todo:
        expression = todo.pop()
        if isinstance(expression, promql_parser.VectorSelector):
            found.add(str(expression.name))
        todo += _children(expression)
    return found


def _children(expression: Any) -> list[Any]:
    match expression:
        case promql_parser.MatrixSelector():
            return [expression.vector_selector]
        case promql_parser.BinaryExpr():
            return [expression.lhs, expression.rhs]
        case promql_parser.Call():
            return list(expression.args)
        case promql_parser.AggregateExpr() | promql_parser.ParenExpr():
            return [expression.expr]
        case promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            return [expression.expr]
    return []


def _labels(expression: Any, known: Mapping[str, Labels]) -> Labels:
    below = [_labels(child, known) for child in _children(expression)]
    match expression:
        case promql_parser.VectorSelector():
            return _of_series(expression, known)
        case promql_parser.AggregateExpr():
            return _of_sum(expression, below[0])
        case promql_parser.BinaryExpr():
            return _of_two(expression, *below)
        case promql_parser.Call():
            return _of_call(expression, below)
    return below[0] if below else frozenset()


def _of_series(selector: Any, known: Mapping[str, Labels]) -> Labels:
    if selector.name not in known:
        raise Misfit(f"nobody tells {selector.name}")
    has = known[selector.name]
    if unknown := {each.name for each in selector.matchers.matchers} - has:
        raise Misfit(f"{selector.name} has no label {', '.join(sorted(unknown))}")
    return has


def _of_sum(aggregate: Any, below: Labels) -> Labels:
    modifier = aggregate.modifier
    if modifier is None:
        return frozenset()
    if modifier.type != promql_parser.AggModifierType.By:
        return below - set(modifier.labels)
    if unknown := set(modifier.labels) - below:
        raise Misfit(f"{aggregate} is split by {', '.join(sorted(unknown))}, which is not there")
    return frozenset(modifier.labels)


def _of_two(binary: Any, left: Labels, right: Labels) -> Labels:
    if _is_scalar(binary.lhs) or _is_scalar(binary.rhs):
        return left or right
    if str(binary.op) == "or":
        return left | right
    matching = binary.modifier.matching if binary.modifier is not None else None
    if matching is not None:
        if unknown := set(matching.labels) - (left & right):
            raise Misfit(f"{', '.join(sorted(unknown))} is not on both sides of {binary}")
    elif left != right:
        raise Misfit(f"the sides of {binary} have different labels")
    return left


def _is_scalar(expression: Any) -> bool:
    """Whether it is one number, without labels to match."""
    match expression:
        case promql_parser.NumberLiteral():
            return True
        case promql_parser.Call():
            return bool(expression.func.name == "scalar")
        case promql_parser.BinaryExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr():
            return all(_is_scalar(child) for child in _children(expression))
    return False


def _of_call(call: Any, below: list[Labels]) -> Labels:
    if call.func.name in ("absent_over_time", "absent", "scalar", "vector"):
        return frozenset()
    if call.func.name == "histogram_quantile":
        if "le" not in below[1]:
            raise Misfit(f"{call} is not told the buckets: le is missing")
        return below[1] - {"le"}
    return below[0]
