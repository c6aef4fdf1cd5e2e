"""What can be sent as JSON and come back the same, and why something cannot, in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

MAX_DEPTH = 100
"""How deep a value may be nested. JSON parsers give up at some depth, each at its own; this is
less than any of those that a message passes."""


def why_not_json(value: Any, *, encoded: bool = False) -> str | None:
    """Where and why `value` is not JSON; None if it is.

    With `encoded`, orjson has written it, so that only its depth and what became null matter.
    """
    waiting: list[tuple[str, int, Any]] = [("", 1, value)]
    while waiting:
        place, depth, each = waiting.pop()
        if depth > MAX_DEPTH:
            return f"{place[:60]}...: nested more than {MAX_DEPTH} levels deep"
        if isinstance(each, BaseModel):
            each = each.__dict__ | (each.__pydantic_extra__ or {})  # as its fields
        if isinstance(each, Mapping):
            for key, inner in each.items():
                where = f"{place}.{key}" if place else f"{key}"
                if not isinstance(key, str):
                    return f"{where}: a key must be a string, not a {type(key).__name__}"
                waiting.append((where, depth + 1, inner))
        elif isinstance(each, list):
            waiting += [(f"{place}.{index}", depth + 1, inner) for index, inner in enumerate(each)]
        elif encoded and not isinstance(each, float):
            continue
        elif problem := _leaf_problem(each):
            return f"{place or 'value'}: {problem}"
    return None


def _leaf_problem(value: Any) -> str | None:
    match value:
        case None | bool():
            return None
        case str():
            return None if is_unicode(value) else "not valid Unicode text"
        case int():
            fits = -(2**63) <= value < 2**64
            return None if fits else "an integer beyond the 64-bit range"
        case float():
            return None if math.isfinite(value) else f"{value} is not a finite number"
        case _:
            return f"a {type(value).__name__} is not JSON; give a string or a number"


def is_unicode(text: str) -> bool:
    """Whether `text` can be encoded: lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
