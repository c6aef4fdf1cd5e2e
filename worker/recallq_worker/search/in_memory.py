"""One user's index in the memory of a process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence

import orjson

from recallq_worker.backends.base import Record
from recallq_worker.search.entries import entries_of, session_digest
from recallq_worker.search.finder import Snapshot
from recallq_worker.search.scoring import EntriesPart, Part, Place, SegmentPart
from recallq_worker.search.segments import (
    IDS_TOGETHER,
    Segment,
    recency_in,
    sessions_in,
    vocabulary_in,
)
from recallq_worker.search.upkeep import compacted, is_due, to_merge

_MOST_MERGED = 16_384
"""Messages of a segment: making it holds up everything else in the process."""


class MemoryIndex:
    """What a user's messages are found by. No method waits for anything."""

    def __init__(self) -> None:
        self._unweighed: dict[bytes, Record] = {}
        """Messages that have no entry yet: whoever searches makes them all at once."""
        self._entries: dict[bytes, bytes] = {}
        self._part: EntriesPart | None = None
        """The entries as searches see them, until there are others."""
        self._texts: dict[bytes, str] = {}
        """Of the messages that are entries."""
        self._segments: dict[int, Segment] = {}
        self._gone: dict[bytes, str] = {}
        """Messages that segments still know, and their sessions."""
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """How many messages it knows."""
        entered = len(self._unweighed) + len(self._entries)
        return entered + self._indexed - len(self._gone)

    @property
    def _indexed(self) -> int:
        return sum(segment.size for segment in self._segments.values())

    def add(self, record: Record) -> None:
        record_id = record.record_id.encode()
        if record_id in self._gone:
            self.clean()  # it was there before, and a segment still knows it
        self._unweighed[record_id] = record
        self._part = None
        self._tidy()

    def remove(self, session_id: str, ids: Collection[str]) -> None:
        """Forgets messages of a session. Until `clean`, segments may still know them."""
        self._part = None
        for record_id in ids:
            key = record_id.encode()
            if self._unweighed.pop(key, None) is None and self._entries.pop(key, None) is None:
                self._gone[key] = session_id
            self._texts.pop(key, None)
        self._tidy()

    def clean(self) -> None:
        """Takes what is gone out of the segments."""
        digests = {session_digest(session) for session in self._gone.values()}
        for key, segment in list(self._segments.items()):
            _, sessions = sessions_in(segment.fields[b"s"])
            if not digests.isdisjoint(sessions.tolist()):
                left = compacted({}, [], [segment.fields], self._gone)
                if left is None:
                    del self._segments[key]
                else:
                    self._segments[key] = left
        self._gone.clear()

    def reader(self, record: Callable[[str], Record | None]) -> MemoryReader:
        """For one search; `record` finds a record by its id."""
        self._weigh()
        if self._part is None:
            self._part = EntriesPart(self._entries)
        segments = sorted(self._segments.values(), key=lambda each: each.last)
        return MemoryReader(segments, self._part, list(self._texts.values()), len(self), record)

    def _weigh(self) -> None:
        """Makes entries of what has been added."""
        if self._unweighed:
            records = self._unweighed.values()
            entries = entries_of(
                [record.scope.session_id or "" for record in records],
                [record.order for record in records],
                [record.message for record in records],
            )
            for record_id, (entry, text) in zip(self._unweighed, entries, strict=True):
                self._entries[record_id] = entry
                self._texts[record_id] = text
            self._unweighed.clear()

    def _tidy(self) -> None:
        entered = len(self._unweighed) + len(self._entries)
        if not is_due(entered, len(self._gone), self._indexed):
            return
        self._weigh()
        self._part = None
        if self._gone:
            self.clean()
        if not self._entries:
            return
        sizes = {key: segment.size for key, segment in self._segments.items()}
        merged = [
            self._segments.pop(key).fields
            for key in to_merge(len(self._entries), sizes, _MOST_MERGED)
        ]
        made = compacted(self._entries, self._texts.values(), merged)
        assert made is not None  # there are entries
        self._segments[next(self._numbers)] = made
        self._entries.clear()
        self._texts.clear()


class MemoryReader:
    """A `recallq_worker.search.finder.Reader`."""

    def __init__(
        self,
        segments: Sequence[Segment],
        entries: EntriesPart,
        texts: Sequence[str],
        total: int,
        record: Callable[[str], Record | None],
    ) -> None:
        self._segments = segments
        self._entries = entries
        self._texts = texts
        self._total = total
        self._record = record

    async def look_up(self, terms: Sequence[int]) -> Snapshot:
        self._parts: list[Part] = [
            SegmentPart(each.size, each.bits, each.fields[b"s"], each.fields)
            for each in self._segments
        ]
        return Snapshot([*self._parts, self._entries], self._total)

    async def recency(self) -> None:
        for part, segment in zip(self._parts, self._segments, strict=True):
            if not segment.ordered:
                part.recency = recency_in(segment.fields[b"o"], segment.size)

    async def vocabularies(self) -> Sequence[str]:
        return [*(vocabulary_in(each.fields[b"v"]) for each in self._segments), *self._texts]

    async def read(self, places: Sequence[Place]) -> Sequence[Record | None]:
        return [self._record(self._id_at(place)) for place in places]

    async def ids(self, places: Sequence[Place]) -> Sequence[str]:
        return [self._id_at(place) for place in places]

    async def records(self, ids: Sequence[str]) -> Sequence[Record | None]:
        return [self._record(record_id) for record_id in ids]

    def _id_at(self, place: Place) -> str:
        if place.part == len(self._segments):
            return str(self._entries.ids[place.number].decode())
        block, at = divmod(place.number, IDS_TOGETHER)
        ids: list[str] = orjson.loads(self._segments[place.part].fields[b"d%d" % block])
        return ids[at]
