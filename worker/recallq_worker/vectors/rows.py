"""A row, and how it and its names are written in Redis.

Ids, groups and owners may be any strings there are, and payloads any JSON.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import orjson

from recallq.errors import BackendError
from recallq.keys import escape

log = logging.getLogger(__name__)

NEVER_FENCED = 2**53 - 1
"""The highest epoch: no delete comes after it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One stored row, without its vector."""

    id: str
    payload: dict[str, Any]
    """A JSON object."""
    order: int
    """Order key, at most 2**53 either way; ties are broken by the id."""
    epoch: int
    """What deletions are told by: a row with a higher epoch was submitted after it."""
    group: str


class Head(NamedTuple):
    """The first line of a row's value."""

    epoch: int
    order: int
    suffix: bytes

    @classmethod
    def parse(cls, line: bytes) -> Head:
        """Raises ValueError for a damaged one."""
        epoch, order, suffix = line.split(b" ")
        return cls(int(epoch), int(order), suffix)


def parse_row(row_id: bytes, value: bytes | None) -> Row | None:
    """The row that a value describes; None for a damaged one."""
    row = None
    with suppress(ValueError, RecursionError):
        line, group, payload = (value or b"").split(b"\n", 2)
        head = Head.parse(line)
        row = Row(to_str(row_id), from_json(payload), head.order, head.epoch, from_json(group))
    if row is not None and isinstance(row.payload, dict) and isinstance(row.group, str):
        return row
    # Damaged by another hand. The owner's other rows stay readable.
    log.error("a row is damaged and left out")
    return None


def escaped(name: str) -> str:
    """`recallq.keys.escape`, for strings that are no text too."""
    try:
        return escape(name)
    except UnicodeEncodeError:  # half of a surrogate pair; no text has the bytes of such a one
        return "=" + sha256(to_bytes(name)).hexdigest()


def to_bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def to_str(text: bytes) -> str:
    return text.decode(errors="surrogatepass")


_ODD = b" "
"""Stands before JSON that only the standard library reads back as it was: with integers of any
length, and halves of surrogate pairs."""


def to_json(thing: object) -> bytes:
    try:
        return orjson.dumps(thing)
    except TypeError:
        try:
            return _ODD + json.dumps(thing).encode()
        except (TypeError, ValueError, RecursionError):
            raise BackendError(
                "a payload cannot be stored: it holds what JSON does not know"
            ) from None


def from_json(value: bytes) -> Any:
    return json.loads(value) if value.startswith(_ODD) else orjson.loads(value)
