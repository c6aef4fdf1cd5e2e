"""The events of the Mem0 platform: what became of an operation that was accepted.

The SDK, mem0ai 2.2.1, has no method for events; who wants to wait polls
``GET /v1/event/{event_id}/``. What the documentation (docs.mem0.ai/api-reference/events/get-event)
and its OpenAPI file say of that answer:

* ``id``, ``event_type`` ("ADD", "SEARCH"; "DELETE" is not named there, but deletions return the
  id of an event too), ``status`` (PENDING, RUNNING, FAILED or SUCCEEDED), ``payload`` (the original
  request), ``metadata`` (object or null), ``created_at``, ``updated_at``, ``started_at``,
  ``completed_at`` and ``latency`` in milliseconds; 404 with ``detail`` for an unknown id;
* ``results`` is an array and nothing more: its items have no schema. The shape here,
  ``{"id", "event": "ADD", "data": {"memory": text}}``, is that of the older answers to additions,
  and what programs that poll events read; the command line tool's specification shows
  ``{"id", "event", "user_id", "memory"}`` instead. The items here have all of these fields;
  `flat_results` leaves out ``data``. A reader should understand both;
* nothing says what a failed event carries: `failure` is what this server puts in ``metadata``.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Event:
    """An operation that was accepted."""

    type: str
    payload: dict[str, Any]
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: str = "PENDING"
    metadata: dict[str, Any] | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    created_at: datetime = field(default_factory=_now)
    started_at: datetime | None = None
    completed_at: datetime | None = None

    def begin(self) -> None:
        self.status, self.started_at = "RUNNING", _now()

    def end(self, status: str) -> None:
        self.status, self.completed_at = status, _now()

    def as_json(self) -> dict[str, Any]:
        ended = self.completed_at
        times = {
            "created_at": self.created_at,
            "updated_at": ended or self.started_at or self.created_at,
            "started_at": self.started_at,
            "completed_at": ended,
        }
        return {
            "id": self.id,
            "event_type": self.type,
            "status": self.status,
            "payload": self.payload,
            "metadata": self.metadata,
            "results": self.results,
            "latency": (ended - self.created_at).total_seconds() * 1000 if ended else None,
            **{name: time and time.isoformat() for name, time in times.items()},
        }
