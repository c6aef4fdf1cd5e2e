"""Between RecallQ's shapes and ReMe's: what a memory is in a vector store, and as a record.

A node's text is what it is found by (when it is of use); what it says is in its metadata, with
fields of ReMe's. Five more are ours: session, order key and deletion epoch; of a message that was
stored as it was, all of it; and of others, the metadata that came with what they were made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from hashlib import sha256
from typing import Any

import orjson

from recallq.contract import DEFAULT_SESSION, Scope, timestamp
from recallq_worker.backends.base import Hit, Record, Submission
from recallq_worker.vectors import Row

SESSION, ORDER, EPOCH = "recallq_session", "recallq_order", "recallq_epoch"
MESSAGE, METADATA = "recallq_message", "recallq_metadata"

_SAID_ELSEWHERE = frozenset({"keywords", "when_to_use", "condition", "experience"})
"""Of what ReMe notes of a memory."""


def session_token(session: str) -> str:
    """A session in letters and digits: what every vector store can look for exactly."""
    return "s" + sha256(session.encode(errors="surrogatepass")).hexdigest()[:40]


def metadata_of(submission: Submission) -> dict[str, Any]:
    """What the caller wants kept with memories; of several messages, later ones win."""
    merged: dict[str, Any] = {}
    for message in submission.messages:
        given = message.get("metadata")
        if isinstance(given, Mapping):
            merged |= given
    return merged


def turns(said: Mapping[int, dict[str, Any]], order: int) -> list[dict[str, Any]]:
    """What a submission said, as the messages of one of ReMe's trajectories."""
    # In ReMe's own format, which has no time zone.
    at = timestamp(order).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    return [
        {"role": each["role"], "content": each["content"], "time_created": at}
        for each in said.values()
    ]


def marked(
    metadata: Mapping[str, Any],
    *,
    scope: Scope,
    order: int,
    epoch: int,
    message: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The metadata of a node with fields of ours. `message` is one that is stored as it is; `given`
    is the metadata that came with others."""
    at = timestamp(order).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    found = {**metadata, "time_created": at, "time_modified": at}
    found |= {SESSION: scope.session_id or "", ORDER: order, EPOCH: epoch}
    if message is not None:
        found[MESSAGE] = orjson.dumps(message).decode()
    elif given:
        found[METADATA] = orjson.dumps(given).decode()
    return found


def record(scope: Scope, row: Row) -> Record:
    """A stored memory: `scope` is whose it is."""
    metadata = row.payload.get("metadata") or {}
    return Record(
        record_id=row.id,
        scope=Scope(scope.tenant, scope.user_id, row.group or DEFAULT_SESSION),
        order=row.order,
        epoch=row.epoch,
        message=_message(row, metadata),
    )


def hit(scope: Scope, row: Row, score: float) -> Hit:
    """A memory that was found, and how similar it is: its cosine."""
    return Hit(record(scope, row), min(score, 1.0))


def _message(row: Row, metadata: Mapping[str, Any]) -> dict[str, Any]:
    kept = _object(metadata.get(MESSAGE))
    if kept is not None:
        return kept
    content = str(metadata.get("content") or "")
    message: dict[str, Any] = {"role": "user", "content": content}
    when = str(row.payload.get("content") or "")
    if when.strip() and when != content:
        message["when_to_use"] = when
    more = _object(metadata.get("metadata")) or {}
    if more := {key: each for key, each in more.items() if key not in _SAID_ELSEWHERE}:
        message["reme"] = more
    given = _object(metadata.get(METADATA))
    if given:
        message["metadata"] = given
    return message


def _object(text: Any) -> dict[str, Any] | None:
    if not isinstance(text, str):
        return None
    try:
        found = orjson.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
