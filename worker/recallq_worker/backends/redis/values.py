"""A record's value in Redis: the JSON array ``[epoch, order, session, message]``."""

from __future__ import annotations

import logging
from typing import Any, cast

import orjson

from recallq.contract import Scope
from recallq_worker.backends.base import Record

log = logging.getLogger(__name__)


def to_value(record: Record) -> bytes:
    return orjson.dumps([record.epoch, record.order, record.scope.session_id or "", record.message])


def parts_of(record_id: bytes, value: bytes | None) -> tuple[int, int, str, dict[str, Any]] | None:
    """Epoch, order key, session and message; None for what another hand has damaged: the user's
    other memories stay readable."""
    try:
        epoch, order, session_id, message = orjson.loads(value or b"")
        whole = isinstance(session_id, str) and isinstance(message, dict)
        whole = whole and isinstance(epoch, int) and isinstance(order, int)
    except (TypeError, ValueError):
        whole = False
    if not whole or abs(order) >= 2**63:
        log.error("record %s of a user is damaged and left out", record_id.decode(errors="replace"))
        return None
    return epoch, order, session_id, cast("dict[str, Any]", message)


def to_record(record_id: bytes, value: bytes | None, owner: Scope) -> Record | None:
    """The record of a user; None for a damaged one."""
    parts = parts_of(record_id, value)
    if parts is None:
        return None
    epoch, order, session_id, message = parts
    scope = Scope(owner.tenant, owner.user_id, session_id)
    return Record(record_id.decode(), scope, order, epoch, message)
