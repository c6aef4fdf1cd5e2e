"""What is done in the slow lane, whatever the backend: extractions and deletes of one that extracts
memories, or the second step of a store, which makes searchable what it keeps.

Neither a slow embedding service nor an outage of one holds up anything else there, and a crash
forgets nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Protocol

from recallq.contract import Scope
from recallq.errors import BackendUnavailable, InternalError, JobError
from recallq_worker.backends.base import (
    Extracted,
    IndexedStore,
    Journal,
    MemoryExtractor,
    Submission,
)

_PATIENCE = 6.0
"""Seconds that one look at a search index may take. What takes longer is looked for again, and does
not hold up what is there."""


class SlowWork(Protocol):
    """One kind of work; the calls are those of `MemoryExtractor`."""

    indexing: ClassVar[bool]
    """Whether it is for adds that are stored. Then there is no order to keep: they may be worked on
    in any, and an add that is to be tried again holds up no other."""
    most_jobs: ClassVar[int]
    """Jobs that are taken up at once."""

    @property
    def name(self) -> str:
        """The backend's."""
        ...

    def group(self, submission: Submission) -> Hashable: ...

    def tokens(self, submission: Submission) -> int: ...

    async def extract(
        self, submissions: Sequence[Submission], journal: Journal, *, alone: bool
    ) -> Sequence[Extracted | JobError]:
        """What came of each. An error of one is not the others'; nothing of it is stored that was
        not before. `alone`: a worker may have died of it before."""
        ...

    async def recover(
        self, submissions: Sequence[Submission], intent: dict[str, Any]
    ) -> Sequence[Extracted] | None: ...

    async def delete(self, scope: Scope, *, before_epoch: int) -> int: ...


class Extraction:
    """What an extractor does."""

    indexing: ClassVar[bool] = False
    most_jobs: ClassVar[int] = 200

    def __init__(self, extractor: MemoryExtractor) -> None:
        self.name = extractor.name
        self.group = extractor.group
        self.tokens = extractor.tokens
        self.recover = extractor.recover
        self.delete = extractor.delete
        self._extractor = extractor

    async def extract(
        self, submissions: Sequence[Submission], journal: Journal, *, alone: bool
    ) -> Sequence[Extracted | JobError]:
        return await self._extractor.extract(submissions, journal)


class Indexing:
    """A store's second step."""

    indexing: ClassVar[bool] = True
    most_jobs: ClassVar[int] = 1000

    def __init__(self, store: IndexedStore) -> None:
        self.name = store.name
        self._store = store

    def group(self, submission: Submission) -> None:
        """All may go together."""

    def tokens(self, submission: Submission) -> int:
        """Stores split what is long."""
        return 0

    async def extract(
        self, submissions: Sequence[Submission], journal: Journal, *, alone: bool
    ) -> list[Extracted | JobError]:
        """Makes the records of each submission searchable. Repeating it does no harm, so nobody
        need know of it. Where submissions go one by one, none is waited for: that is done together
        afterwards."""
        parts = [submission.records() for submission in submissions]
        records = [record for part in parts for record in part]
        errors = await self._store.index(records, patience=0.0 if alone else _PATIENCE)
        outcomes = iter(errors)
        done: list[Extracted | JobError] = []
        for part in parts:
            failed = [
                error
                if isinstance(error, JobError)
                else InternalError(f"backend {self.name} answered {type(error).__name__}")
                for error in (next(outcomes) for _ in part)
                if error is not None
            ]
            # As long as trying again may help one of them, it is tried again.
            failed.sort(key=lambda error: not isinstance(error, BackendUnavailable))
            done.append(failed[0] if failed else Extracted([each.record_id for each in part], 0))
        return done

    async def recover(self, submissions: Sequence[Submission], intent: dict[str, Any]) -> None:
        """Nothing is ever begun that needs it."""

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        """Stores delete by themselves; nobody leaves it to the slow lane."""
        raise InternalError("a delete came to the second step of a store")
