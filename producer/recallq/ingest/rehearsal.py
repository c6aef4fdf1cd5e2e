"""An ingestion that stores nothing: every message is checked as a client does, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from recallq.clock import FleetClock
from recallq.contract import AddResult, Lane, Wait, timestamp
from recallq.messages import Message
from recallq.requests import Requests
from recallq.settings import ClientSettings


class Rehearsal:
    """An `Adder` without a service. Users and sessions are counted by their hashes, eight bytes of
    each, so that many millions of rows fit into memory."""

    def __init__(self, settings: ClientSettings) -> None:
        self._clock = FleetClock()
        self._requests = Requests(settings, self._clock)
        self._users: set[int] = set()
        self._sessions: set[int] = set()
        self._orders: tuple[int, int] | None = None
        self.messages = 0

    @property
    def users(self) -> int:
        return len(self._users)

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    @property
    def first(self) -> datetime | None:
        """The time of the oldest message."""
        return timestamp(self._orders[0]) if self._orders else None

    @property
    def last(self) -> datetime | None:
        """The time of the newest message."""
        return timestamp(self._orders[1]) if self._orders else None

    def next_order(self) -> int:
        return self._clock.next_order()

    async def add_memory(
        self,
        user_id: str,
        messages: Sequence[Message],
        session_id: str,
        *,
        timeout: float,
        lane: Lane,
        idempotency_key: str,
        order: int,
        wait: Wait,
    ) -> AddResult:
        self._requests.add(
            user_id,
            messages,
            session_id,
            timeout=timeout,
            lane=lane,
            idempotency_key=idempotency_key,
            order=order,
        )
        self._users.add(hash(user_id))
        self._sessions.add(hash((user_id, session_id)))
        low, high = self._orders or (order, order)
        self._orders = (min(low, order), max(high, order))
        self.messages += len(messages)
        return AddResult(record_ids=[], added=len(messages))

    def to_dict(self) -> dict[str, Any]:
        """What would be stored, as a JSON object."""
        return {
            "would_add": self.messages,
            "users": self.users,
            "sessions": self.sessions,
            "first": self.first.isoformat() if self.first else None,
            "last": self.last.isoformat() if self.last else None,
        }
