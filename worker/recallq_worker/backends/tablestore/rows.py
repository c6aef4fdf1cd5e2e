"""What is in the tables: which rows, which columns, and where they lie.

A row's primary key is ``(owner, place)``. The owner is a user of a tenant, so that everything of a
user lies together and nobody else's between. Within it, by place, in the table of records:

    r:<order key>:<record id>  a record: listing is reading a range

and in a table of notes, which has no search index:

    f  f:<session>             a fence: below its epoch nothing of the user, or session, is shown
    k:<record id>              of a record that may come again: which order key it came with

Reads of ranges are strongly consistent, which the search index is not; so listing and deleting go
by the table alone. Every row carries the epoch of its record: a record that was written too late,
by a process that had not heard of a deletion, is below the fence and never shown.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b, sha256
from typing import Any, TypeAlias

import orjson

from recallq.contract import Scope
from recallq.errors import BackendError
from recallq.keys import escape
from recallq.messages import message_text
from recallq_worker.backends.base import Record

log = logging.getLogger(__name__)

Key: TypeAlias = tuple[str, str]
"""Owner and place."""
Columns: TypeAlias = dict[str, Any]

OWNER, PLACE = "owner", "place"
ORDER, EPOCH, SESSION, SESSION_ID = "order", "epoch", "session", "session_id"
MESSAGE, DIGEST, EMBEDDED = "message", "digest", "embedded"
AT, REACHED = "at", "reached"
"""Of a fence: when it was raised (ms), and how far the delete that did so has come."""

READ = (EPOCH, SESSION, SESSION_ID, ORDER, MESSAGE)
"""All it takes to show a record."""

FENCES = ("f", "g")
POINTERS = ("k:", "k;")
RECORDS = ("r:", "r;")

_LARGEST_VALUE = 2 * 1024 * 1024
"""Bytes that Tablestore takes in one column."""
_MOST_TEXT = 256 * 1024
"""Characters of a message that can be searched, about; what lies beyond is stored and listed."""


@lru_cache(maxsize=8192)
def owner_of(tenant: str, user_id: str) -> str:
    """A user's part of the table. A few digits of a hash go first: Tablestore partitions a table by
    ranges, and users who come one after the other shall not all come to the same."""
    name = f"{escape(tenant)}/{escape(user_id)}"
    return f"{sha256(name.encode()).hexdigest()[:4]}-{name}"


def fence_place(session_id: str | None) -> str:
    return "f" if session_id is None else f"f:{escape(session_id)}"


def pointer_key(record: Record) -> Key:
    return (_owner(record), f"k:{record.record_id}")


def record_key(record: Record, order: int) -> Key:
    # Order keys have at most 16 digits: as text, they sort as numbers do.
    return (_owner(record), f"r:{order:016d}:{record.record_id}")


def _owner(record: Record) -> str:
    return owner_of(record.scope.tenant, record.scope.user_id)


def pointer_columns(record: Record) -> Columns:
    session = escape(record.scope.session_id or "")
    return {EPOCH: record.epoch, ORDER: record.order, SESSION: session}


def record_columns(record: Record, text_field: str) -> Columns:
    """A record's row, but for its order key. Raises `BackendError` for one that no row takes."""
    message = orjson.dumps(record.message)
    if len(message) > _LARGEST_VALUE:
        raise BackendError(
            f"the message is {len(message):,} bytes and Tablestore takes {_LARGEST_VALUE:,}; "
            "store it in several messages"
        )
    session_id = record.scope.session_id or ""
    columns: Columns = {
        EPOCH: record.epoch,
        SESSION: escape(session_id),
        SESSION_ID: session_id,
        MESSAGE: message.decode(),
    }
    text = searchable(record.message)
    if text:
        columns |= {text_field: text, DIGEST: digest(text)}
    return columns


def searchable(message: Mapping[str, Any]) -> str:
    """What of a message can be searched; empty if nothing."""
    text = message_text(message)
    return text[:_MOST_TEXT] if text.strip() else ""


def digest(text: str) -> int:
    """What stands for a text in a condition on its row."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def size_of(columns: Columns) -> int:
    """Bytes that columns take in a request, about."""
    return 64 + sum(
        len(name) + 16 + (len(value.encode()) if isinstance(value, str) else 8)
        for name, value in columns.items()
    )


def read_record(place: str, columns: Columns, scope: Scope) -> Record | None:
    """The record in a row of a user's; None for one that nobody here wrote."""
    try:
        message = orjson.loads(columns[MESSAGE])
        if not isinstance(message, dict):
            raise TypeError
        return Record(
            record_id=place.split(":", 2)[2],
            scope=Scope(scope.tenant, scope.user_id, columns[SESSION_ID]),
            order=columns[ORDER],
            epoch=columns[EPOCH],
            message=message,
        )
    except (LookupError, TypeError, ValueError):
        log.error("a row of the table cannot be read, and is left out: %s", place)  # noqa: TRY400
        return None


@dataclass(frozen=True, slots=True)
class Fences:
    """Up to where deletions have made a user's records disappear."""

    whole: int
    """Epoch below which nothing of the user is shown."""
    sessions: Mapping[str, int]
    """The same by session, as it is escaped in columns."""

    def of(self, session: str) -> int:
        return max(self.whole, self.sessions.get(session, 0))

    def shows(self, columns: Columns) -> bool:
        return bool(columns[EPOCH] >= self.of(columns[SESSION]))

    @property
    def later(self) -> dict[str, int]:
        """Those of sessions that say more than the user's."""
        return {name: epoch for name, epoch in self.sessions.items() if epoch > self.whole}
