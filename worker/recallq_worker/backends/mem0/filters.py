"""mem0's filters, asked of payloads.

A filter is a dictionary of conditions, all of which must hold: a field and what it equals, ``"*"``
for anything, or a dictionary of operators; or ``AND``, ``OR``, ``NOT`` and a list of filters, which
`Memory` turns into ``$or`` and ``$not`` at the top and leaves as they are below.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

Matcher = Callable[[dict[str, Any]], bool]

_MISSING = object()
"""What a payload holds under a field that it does not have: equal to nothing."""


def matcher(filters: Mapping[str, Any]) -> Matcher:
    """Whether a payload meets `filters`. Raises ValueError for operators that are not known."""
    conditions = [_condition(key, value) for key, value in filters.items()]
    return lambda payload: all(holds(payload) for holds in conditions)


def _condition(key: str, value: Any) -> Matcher:
    if key in _LOGICAL:
        if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
            raise ValueError(f"filter {key!r} takes a list of filters")
        return _LOGICAL[key]([matcher(each) for each in value])
    if key.startswith("$"):
        raise ValueError(f"unknown filter {key!r}; known are {', '.join(sorted(_LOGICAL))}")
    if isinstance(value, Mapping):
        checks = [_check(name, operand) for name, operand in value.items()]
        return lambda payload: all(holds(payload.get(key, _MISSING)) for holds in checks)
    if value == "*":
        return lambda payload: payload.get(key) is not None
    return lambda payload: bool(payload.get(key, _MISSING) == value)


def _all(matchers: list[Matcher]) -> Matcher:
    return lambda payload: all(holds(payload) for holds in matchers)


def _any(matchers: list[Matcher]) -> Matcher:
    return lambda payload: any(holds(payload) for holds in matchers)


def _none(matchers: list[Matcher]) -> Matcher:
    return lambda payload: not any(holds(payload) for holds in matchers)


_LOGICAL: dict[str, Callable[[list[Matcher]], Matcher]] = {
    "AND": _all,
    "$and": _all,
    "OR": _any,
    "$or": _any,
    "NOT": _none,
    "$not": _none,
}


def _check(name: str, operand: Any) -> Callable[[Any], bool]:
    """Whether a field's value is as one operator wants it."""
    if name not in _OPERATORS:
        raise ValueError(f"unknown filter operator {name!r}; known are {', '.join(_OPERATORS)}")
    if name in ("in", "nin") and not isinstance(operand, (list, tuple, set, frozenset)):
        raise ValueError(f"filter operator {name!r} takes a list")
    test = _OPERATORS[name]
    return lambda value: test(value, operand)


def _compared(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], bool]:
    """Numbers compare with numbers and texts with texts; else the condition does not hold."""

    def test(value: Any, operand: Any) -> bool:
        alike = (_is_number(value) and _is_number(operand)) or (
            isinstance(value, str) and isinstance(operand, str)
        )
        return alike and bool(compare(value, operand))

    return test


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _contains(value: Any, operand: Any) -> bool:
    if isinstance(value, str):
        return isinstance(operand, str) and operand in value
    return isinstance(value, list) and operand in value


def _icontains(value: Any, operand: Any) -> bool:
    return _contains(_folded(value), _folded(operand))


def _folded(value: Any) -> Any:
    if isinstance(value, list):
        return [_folded(each) for each in value]
    return value.casefold() if isinstance(value, str) else value


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda value, operand: bool(value == operand),
    "ne": lambda value, operand: bool(value != operand),
    "in": lambda value, operand: value in operand,
    "nin": lambda value, operand: value not in operand,
    "gt": _compared(operator.gt),
    "gte": _compared(operator.ge),
    "lt": _compared(operator.lt),
    "lte": _compared(operator.le),
    "contains": _contains,
    "icontains": _icontains,
}
