"""Mem0's filters, as https://docs.mem0.ai/platform/features/v2-memory-filters describes them.

Plain ``{"user_id": ...}``, or ``AND``, ``OR`` and ``NOT`` of conditions, nested as one likes. A
condition is an equality or an operator clause. ``"*"`` matches any value but null. What the filter
does not mention of user, agent, app and run must be null ("implicit null scoping"), unless its root
is an ``OR`` or a ``NOT``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.loopback.faults import HttpFailure

ENTITIES = ("user_id", "agent_id", "app_id", "run_id")

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda value, wanted: bool(value == wanted),
    # Including null: what is missing is not equal either.
    "ne": lambda value, wanted: bool(value != wanted),
    "in": lambda value, wanted: (
        any(each in wanted for each in value) if isinstance(value, list) else value in wanted
    ),
    "gte": lambda value, wanted: value is not None and bool(value >= wanted),
    "gt": lambda value, wanted: value is not None and bool(value > wanted),
    "lte": lambda value, wanted: value is not None and bool(value <= wanted),
    "lt": lambda value, wanted: value is not None and bool(value < wanted),
    "contains": lambda value, wanted: value is not None and wanted in value,
    "icontains": lambda value, wanted: value is not None and wanted.lower() in str(value).lower(),
}


def selects(filters: Mapping[str, Any], memory: Mapping[str, Any], *, null_scoping: bool) -> bool:
    """Whether `filters` select `memory`. Raises `HttpFailure` where they are not valid."""
    asked = mentioned(filters)
    if not asked & set(ENTITIES):
        raise HttpFailure(400, "One of the filters: app_id, user_id, agent_id, run_id is required!")
    if not _matches(filters, memory):
        return False
    if not null_scoping or {"OR", "NOT"} & filters.keys():
        return True
    return all(memory.get(entity) is None for entity in ENTITIES if entity not in asked)


def mentioned(filters: object) -> set[str]:
    """The fields that `filters` speak of, at any depth."""
    if isinstance(filters, list):
        return set().union(*map(mentioned, filters))
    if not isinstance(filters, Mapping):
        return set()
    fields: set[str] = set()
    for name, value in filters.items():
        fields |= mentioned(value) if name in {"AND", "OR", "NOT"} else {name}
    return fields


def entities_in(filters: object) -> list[str]:
    """The ids of users, agents, apps and runs that `filters` name."""
    if isinstance(filters, list):
        return [each for part in filters for each in entities_in(part)]
    found: list[str] = []
    if isinstance(filters, Mapping):
        for name, value in filters.items():
            if name in {"AND", "OR", "NOT"}:
                found += entities_in(value)
            elif name in ENTITIES:
                values = value.values() if isinstance(value, Mapping) else [value]
                for each in values:
                    found += each if isinstance(each, list) else [each]
    return found


def _matches(condition: object, memory: Mapping[str, Any]) -> bool:
    if not isinstance(condition, Mapping):
        raise HttpFailure(400, "A condition of the filters must be an object.")
    return all(_holds(name, wanted, memory) for name, wanted in condition.items())


def _holds(name: str, wanted: Any, memory: Mapping[str, Any]) -> bool:
    if name in {"AND", "OR", "NOT"}:
        if not isinstance(wanted, list):
            # The documentation shows an object under NOT too; the service is said to refuse it.
            raise HttpFailure(400, f"{name} in the filters must hold an array of conditions.")
        each = [_matches(part, memory) for part in wanted]
        return {"AND": all(each), "OR": any(each), "NOT": not any(each)}[name]
    if name == "metadata":
        metadata = memory.get("metadata") or {}
        return all(_compare(metadata.get(key), value) for key, value in wanted.items())
    if name == "memory_ids":
        return memory["id"] in wanted
    if name == "keywords":
        return _compare(memory["memory"], wanted)
    return _compare(memory.get(name), wanted)


def _compare(value: Any, wanted: Any) -> bool:
    if wanted == "*":
        return value is not None
    if isinstance(wanted, Mapping):
        unknown = wanted.keys() - _OPERATORS.keys()
        if unknown:
            raise HttpFailure(400, f"Unknown operator in the filters: {', '.join(unknown)}.")
        return all(_OPERATORS[name](value, operand) for name, operand in wanted.items())
    return bool(value == wanted)
