"""Between RecallQ's shapes and mem0's: ids, messages, and what a memory becomes.

mem0 refuses ids with white space, and knows no tenants. Ids go to it with such characters, and what
stands for them, percent-encoded; so users that mem0 knew before RecallQ keep their memories. The
way back is exact.

Besides what mem0 keeps with a memory, three fields of its metadata are ours: the order key, the
deletion epoch, and of a message that was stored as it was, all that mem0 has no place for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote

import orjson

from recallq.contract import DEFAULT_SESSION, DEFAULT_TENANT, Scope
from recallq_worker.backends.base import Hit, Record, Submission

ORDER, EPOCH, MESSAGE = "recallq_order", "recallq_epoch", "recallq_message"
OWN_FIELDS = frozenset({ORDER, EPOCH, MESSAGE, "recallq_extraction"})
TEXT, USER, SESSION = "data", "user_id", "run_id"

_UNSAFE = re.compile(r"[%/\s*\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff]")
# What mem0 writes into a memory itself: metadata of these names would be lost or do harm.
_TAKEN = frozenset(
    {
        *("data", "hash", "text_lemmatized", "created_at", "updated_at", "role", "id", "memory"),
        *("user_id", "agent_id", "run_id", "app_id", "actor_id", "attributed_to"),
        *("expiration_date", "score", *OWN_FIELDS),
    }
)


def escape(name: str) -> str:
    """An id without what mem0 refuses or takes for something else."""
    return _UNSAFE.sub(lambda found: quote(found[0], safe=""), name)


def owner(scope: Scope) -> str:
    """What mem0 calls a user: ``alice``, or ``tenant/alice``."""
    if scope.tenant == DEFAULT_TENANT:
        return escape(scope.user_id)
    return f"{escape(scope.tenant)}/{escape(scope.user_id)}"


def session(scope: Scope) -> str | None:
    """What mem0 calls a run."""
    return None if scope.session_id is None else escape(scope.session_id)


# --- on the way in ------------------------------------------------------------------------------


def metadata(message: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller wants kept with a message's memories, but for names that mem0 takes."""
    given = message.get("metadata")
    if not isinstance(given, Mapping):
        return {}
    return {key: value for key, value in given.items() if key not in _TAKEN}


def metadata_of_all(submission: Submission) -> dict[str, Any]:
    """Of all of a submission's messages; later ones win."""
    merged: dict[str, Any] = {}
    for message in submission.messages:
        merged |= metadata(message)
    return merged


def whole(message: Mapping[str, Any], sent: Mapping[str, Any]) -> dict[str, str]:
    """The field that keeps a message whole, where mem0 has no place for all of it."""
    plain = {"role": sent["role"], "content": sent["content"]}
    return {} if message == plain else {MESSAGE: orjson.dumps(message).decode()}


# --- on the way out -----------------------------------------------------------------------------


def record(scope: Scope, row: Mapping[str, Any]) -> Record:
    """A memory as mem0 returns it: `scope` is whose it is, as it was asked for."""
    own = row.get("metadata")
    own = own if isinstance(own, Mapping) else {}
    run = row.get(SESSION)
    session_id = unquote(run) if isinstance(run, str) and run else DEFAULT_SESSION
    return Record(
        record_id=str(row["id"]),
        scope=Scope(scope.tenant, scope.user_id, session_id),
        order=_order(own, row),
        epoch=epoch(own),
        message=_message(row, own),
    )


def hit(scope: Scope, row: Mapping[str, Any]) -> Hit:
    """A memory that mem0 found."""
    score = row.get("score")
    return Hit(record(scope, row), float(score) if score is not None else 0.0)


def row_of(memory_id: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """What mem0's ``get_all`` makes of a row of its vector store."""
    return {
        "id": memory_id,
        "memory": payload.get(TEXT) or "",
        **{key: payload.get(key) for key in ("role", "actor_id", "attributed_to", SESSION)},
        "created_at": payload.get("created_at"),
        "metadata": {
            key: value for key, value in payload.items() if key not in _TAKEN or key in OWN_FIELDS
        },
    }


def epoch(own: Mapping[str, Any]) -> int:
    """The deletion epoch in a memory's metadata; of one that is not ours, as old as can be."""
    try:
        return int(own.get(EPOCH) or 0)
    except (TypeError, ValueError):
        return 0


def _order(own: Mapping[str, Any], row: Mapping[str, Any]) -> int:
    try:
        return int(own[ORDER])
    except (KeyError, TypeError, ValueError):
        pass
    try:
        created = datetime.fromisoformat(str(row.get("created_at")))
    except ValueError:
        return 0
    if created.tzinfo is None:
        created = created.replace(tzinfo=UTC)
    return max(int(created.timestamp() * 1_000_000), 0)


def _message(row: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    kept = own.get(MESSAGE)
    if isinstance(kept, str):
        try:
            found = orjson.loads(kept)
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
    # An LLM may attribute a memory to a list of roles, say.
    roles = [row.get("role"), row.get("attributed_to"), "user"]
    message: dict[str, Any] = {
        "role": next(role for role in roles if isinstance(role, str) and role),
        "content": str(row.get("memory") or ""),
    }
    name = row.get("actor_id")
    if isinstance(name, str) and name:
        message["name"] = name
    more = {key: value for key, value in own.items() if key not in OWN_FIELDS}
    if categories := row.get("categories"):
        more["categories"] = categories
    if more:
        message["metadata"] = more
    return message
