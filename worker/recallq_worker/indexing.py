"""The second step of adds to a store: what is stored becomes searchable.

For stores whose records are found only once they are embedded, or once a search index has caught
up. An add is stored and listed at once; this is done in the slow lane, in the terms of
`recallq_worker.slow_turn`, so that neither a slow embedding service nor an outage of one holds up
anything else, and a crash forgets nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recallq.contract import Scope
from recallq.errors import BackendUnavailable, JobError
from recallq_worker.backends.base import Extracted, IndexedStore, Journal, Submission

MOST_JOBS = 1000
"""Jobs of a batch that are indexed together."""


class Indexing:
    """A store's second step, as work for the slow lane."""

    def __init__(self, store: IndexedStore) -> None:
        self._store = store
        self.name = store.name

    def group(self, submission: Submission) -> None:
        return None

    def tokens(self, submission: Submission) -> int:
        return 0

    async def extract(
        self,
        submissions: Sequence[Submission],
        journal: Journal,
    ) -> list[Extracted | JobError]:
        """Makes the records of each submission searchable."""
        parts = [submission.records() for submission in submissions]
        errors = iter(await self._store.index([record for part in parts for record in part]))
        done: list[Extracted | JobError] = []
        for part in parts:
            ids = [record.record_id for record in part]
            failed = [error for error in (next(errors) for _ in part) if error is not None]
            # As long as trying again may help one of them, it is tried again.
            failed.sort(key=lambda error: not isinstance(error, BackendUnavailable))
            done.append(failed[0] if failed else Extracted(ids, 0))
        return done

    async def recover(self, submissions: Sequence[Submission], intent: dict[str, Any]) -> None:
        """Nothing is ever begun that needs it."""

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        """Stores delete by themselves; nobody leaves it to the slow lane."""
        raise NotImplementedError
