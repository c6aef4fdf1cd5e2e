"""What stored records are found by.

An add leaves that to whoever needs it first - a search, or the making of a segment -, and so costs
little more than storing: many records at once are weighed in a fraction of the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from recallq_worker.backends.redis.values import parts_of
from recallq_worker.search.entries import entries_of

_AT_ONCE = 64 * 1024
"""Bytes of records that an event loop may be kept busy with."""


async def weigh_records(
    records: Sequence[tuple[bytes, bytes | None]],
) -> list[tuple[bytes, bytes, str]]:
    """As `weighed`, without holding up the event loop for long."""
    if sum(len(value or b"") for _, value in records) <= _AT_ONCE:
        return weighed(records)
    return await asyncio.to_thread(weighed, records)


def weighed(records: Sequence[tuple[bytes, bytes | None]]) -> list[tuple[bytes, bytes, str]]:
    """Ids, entries and texts of records, of which ids and values are given. It is work for the
    processor. One that is damaged is found by nothing, and is a record all the same."""
    parts = [parts_of(record_id, value) or (0, 0, "", {}) for record_id, value in records]
    entries = entries_of(
        [session for _, _, session, _ in parts],
        [order for _, order, _, _ in parts],
        [message for *_, message in parts],
    )
    return [(record_id, *each) for (record_id, _), each in zip(records, entries, strict=True)]
