"""Filters of Qdrant's loopback server: which payloads pass."""

from __future__ import annotations

import operator
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from tests.loopback.faults import HttpFailure

_CLAUSES = ("must", "should", "must_not")
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}


def passes(conditions: dict[str, Any], point_id: int | str, payload: dict[str, Any]) -> bool:
    """Whether a point passes a ``Filter``; refuses what it does not understand."""
    for unknown in set(conditions) - set(_CLAUSES):
        raise _refused(f"unknown clause {unknown}")

    def each(clause: str) -> Iterator[bool]:
        found = conditions.get(clause) or []
        for condition in [found] if isinstance(found, dict) else found:
            yield _passes(condition, point_id, payload)

    should = list(each("should"))
    return all(each("must")) and not any(each("must_not")) and (not should or any(should))


def _passes(condition: dict[str, Any], point_id: int | str, payload: dict[str, Any]) -> bool:
    # What is null is as if it were not said, and older clients say it.
    said = {name: value for name, value in condition.items() if value is not None}
    if "has_id" in said:
        return point_id in [_same_form(each) for each in said["has_id"]]
    if "is_empty" in said:
        return not [value for value in _values(payload, said["is_empty"]["key"]) if value != []]
    if "key" not in said:
        return passes(said, point_id, payload)
    values = list(_values(payload, said["key"]))
    if "match" in said:
        return _matches(said["match"], values)
    if "range" in said:
        bounds = {name: bound for name, bound in said["range"].items() if bound is not None}
        return any(_is_within(bounds, value) for value in values)
    raise _refused(f"a condition with {', '.join(said)}")


def _matches(match: dict[str, Any], values: list[Any]) -> bool:
    if "value" in match:
        return any(_same(match["value"], value) for value in values)
    if "any" in match:
        return any(_same(each, value) for each in match["any"] for value in values)
    if "except" in match:
        return any(not any(_same(each, value) for each in match["except"]) for value in values)
    raise _refused(f"a match by {', '.join(match)}")


def _same(one: object, other: object) -> bool:
    """1 is neither true nor 1.0 nor "1"."""
    return type(one) is type(other) and one == other


def _is_within(bounds: dict[str, float], value: object) -> bool:
    # Bounds and values are compared as 64-bit floats.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return all(_COMPARISONS[name](float(value), float(bound)) for name, bound in bounds.items())


def _values(payload: object, path: str) -> Iterator[Any]:
    """What stands at ``a.b``; of a list there, each of its elements."""
    name, _, rest = path.partition(".")
    name = name.removesuffix("[]")
    if not isinstance(payload, dict) or payload.get(name) is None:
        return
    found = payload[name]
    for value in found if isinstance(found, list) else [found]:
        if rest:
            yield from _values(value, rest)
        else:
            yield value


def _same_form(point_id: object) -> object:
    return str(uuid.UUID(point_id)) if isinstance(point_id, str) else point_id


def _refused(what: str) -> HttpFailure:
    return HttpFailure(400, f"Format error in JSON body: this server does not know {what}")
