"""Memories in the memory of one worker process: for trying RecallQ out and for tests.

Everything is gone when the worker stops, and a second worker is refused, because it would answer
from a memory of its own.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from recallq.contract import Health, Scope
from recallq.errors import JobError
from recallq_worker.backends.base import Added, Hit, Record
from recallq_worker.embedding import make_document_embedder
from recallq_worker.search.finder import Wanted, find
from recallq_worker.search.in_memory import MemoryIndex
from recallq_worker.search.memory_vectors import MemoryVectorRows
from recallq_worker.search.semantic import SemanticSearch
from recallq_worker.settings import WorkerSettings

_Place = tuple[int, str]
"""(order key, record id): where a record stands among the others."""


@dataclass(slots=True)
class _User:
    records: dict[str, Record] = field(default_factory=dict)
    everything: list[_Place] = field(default_factory=list)
    sessions: dict[str, list[_Place]] = field(default_factory=dict)
    fence: int = 0
    session_fences: dict[str, int] = field(default_factory=dict)
    index: MemoryIndex = field(default_factory=MemoryIndex)

    def places(self, session_id: str | None) -> list[_Place]:
        if session_id is None:
            return self.everything
        return self.sessions.get(session_id, [])

    def fenced(self, session_id: str, epoch: int) -> bool:
        return epoch < max(self.fence, self.session_fences.get(session_id, 0))

    def insert(self, record: Record) -> None:
        place = (record.order, record.record_id)
        self.records[record.record_id] = record
        insort(self.everything, place)
        insort(self.sessions.setdefault(record.scope.session_id or "", []), place)
        self.index.add(record)

    def remove(self, session_id: str, gone: set[_Place]) -> None:
        self.everything = [place for place in self.everything if place not in gone]
        left = [place for place in self.sessions[session_id] if place not in gone]
        if left:
            self.sessions[session_id] = left
        else:
            del self.sessions[session_id]
        for _, record_id in gone:
            del self.records[record_id]
        self.index.remove(session_id, {record_id for _, record_id in gone})


class InMemoryStore:
    """A `MemoryStore` in plain dictionaries. No method awaits in the middle of a change."""

    name: ClassVar[str] = "in_memory"
    single_process: ClassVar[bool] = True
    indexes = False

    def __init__(
        self,
        max_messages_per_session: int | None = None,
        semantic: SemanticSearch[MemoryVectorRows] | None = None,
    ) -> None:
        """With `semantic`, messages are also found by their meaning."""
        self._max_messages = max_messages_per_session
        self._semantic = semantic
        if semantic is not None:
            self.indexes = True
        self._users: dict[tuple[str, str], _User] = {}

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> Self:
        semantic = None
        if settings.search_strategy != "keyword":
            embedder = make_document_embedder(settings.store_url, settings.namespace)
            rows = MemoryVectorRows(embedder.dimensions)
            semantic = SemanticSearch(embedder, rows, settings.search_strategy)
        return cls(settings.max_messages_per_session, semantic)

    async def start(self) -> None:
        if self._semantic is not None:
            await self._semantic.start()

    async def stop(self) -> None:
        if self._semantic is not None:
            await self._semantic.stop()
        self._users.clear()

    async def add(self, records: Sequence[Record]) -> list[Added]:
        return [self._add(record) for record in records]

    def _add(self, record: Record) -> Added:
        scope = record.scope
        session_id = scope.session_id or ""
        user = self._users.setdefault((scope.tenant, scope.user_id), _User())
        fenced = user.fenced(session_id, record.epoch)
        if (before := user.records.get(record.record_id)) is not None:
            if before.epoch < record.epoch:
                # Submitted once more, under the same key, after a delete that is yet to come.
                before = user.records[record.record_id] = replace(before, epoch=record.epoch)
            if record.order < before.order and not fenced:
                # Or before it, and overtaken since by what was submitted after it.
                user.remove(session_id, {(before.order, before.record_id)})
                user.index.clean()
                user.insert(replace(before, order=record.order))
            return Added.KNOWN
        if fenced:
            return Added.FENCED
        user.insert(record)
        session = user.sessions[session_id]
        if self._max_messages is not None and len(session) > self._max_messages:
            oldest = set(session[: -self._max_messages])
            user.remove(session_id, oldest)
            if self._semantic is not None:
                self._semantic.rows.drop(scope, [record_id for _, record_id in oldest])
        return Added.NEW

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        user = self._users.get((scope.tenant, scope.user_id), _User())
        reader = user.index.reader(user.records.get)
        wanted = Wanted(query, scope.session_id, top_k, score_threshold)
        if self._semantic is not None:
            return await self._semantic.find(reader, scope, wanted)
        return await find(reader, wanted)

    async def index(
        self, records: Sequence[Record], *, patience: float
    ) -> Sequence[JobError | None]:
        if self._semantic is None:
            return [None] * len(records)
        return await self._semantic.index(records, self._stored)

    async def _stored(self, scope: Scope, ids: Sequence[str]) -> dict[str, Record]:
        user = self._users.get((scope.tenant, scope.user_id), _User())
        return {each: user.records[each] for each in ids if each in user.records}

    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]:
        user = self._users.get((scope.tenant, scope.user_id), _User())
        places = user.places(scope.session_id)[offset : offset + limit]
        return [user.records[record_id] for _, record_id in places]

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        # The user's entry stays even when it is empty: it holds the fence against late adds.
        user = self._users.setdefault((scope.tenant, scope.user_id), _User())
        if scope.session_id is None:
            user.fence = max(user.fence, before_epoch)
            user.session_fences = {
                session: fence
                for session, fence in user.session_fences.items()
                if fence > user.fence
            }
            sessions = list(user.sessions)
        else:
            fence = user.session_fences.get(scope.session_id, 0)
            user.session_fences[scope.session_id] = max(fence, before_epoch)
            sessions = [scope.session_id] if scope.session_id in user.sessions else []
        removed = 0
        for session_id in sessions:
            gone = {
                place
                for place in user.sessions[session_id]
                if user.records[place[1]].epoch < before_epoch
            }
            if gone:
                user.remove(session_id, gone)
                removed += len(gone)
        user.index.clean()
        if self._semantic is not None:
            await self._semantic.rows.delete(scope, before_epoch)
        return removed

    async def health(self) -> Health:
        detail = f"{len(self._users):,} users"
        if self._semantic is not None:
            try:
                detail += f", searched by meaning with {await self._semantic.embedder.check()}"
            except JobError as error:
                return Health(ok=False, backend=self.name, detail=str(error))
        return Health(ok=True, backend=self.name, detail=detail)
