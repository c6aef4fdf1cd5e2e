"""Searches one user's index in Redis: one round trip for what is to be known of the query's terms,
one for the records that are not known from another search. Only who looks for a part of a word
needs more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, cast

from redis.commands.core import AsyncScript

from recallq.contract import Scope
from recallq.redis_client import RedisClient
from recallq_worker.backends.base import Record
from recallq_worker.backends.redis.index import RedisIndex
from recallq_worker.backends.redis.index_storage import Asking, IndexKeys, pairs
from recallq_worker.backends.redis.remembered import Entered, Remembered
from recallq_worker.backends.redis.together import Together
from recallq_worker.backends.redis.values import to_record
from recallq_worker.backends.redis.weighing import weigh_records
from recallq_worker.search.entries import VERSION, DamagedIndex
from recallq_worker.search.finder import Moved, Snapshot
from recallq_worker.search.scoring import EntriesPart, Part, Place, SegmentPart
from recallq_worker.search.segments import IDS_TOGETHER, recency_in, vocabulary_in


class StaleIndex(Exception):
    """The index is of another version, or of other messages than there are."""


class RedisReader:
    """A `recallq_worker.search.finder.Reader`, for one search."""

    def __init__(
        self,
        redis: RedisClient,
        asking: Asking,
        together: Together,
        look_up: AsyncScript,
        read: AsyncScript,
        index: RedisIndex,
        remembered: Remembered,
        base: str,
        scope: Scope,
        oldest: int | None,
    ) -> None:
        """`oldest` is the lowest order key of what has not expired."""
        self._redis = redis
        self._asking = asking
        self._together = together
        self._look_up = look_up
        self._read = read
        self._index = index
        self._remembered = remembered
        self._keys = IndexKeys(base)
        self._scope = scope
        self._oldest = oldest
        self._segments: list[str] = []
        self._parts: list[Part] = []
        self._mixed: set[str] = set()
        """Segments in which messages do not stand in their order."""
        self._entries: EntriesPart | None = None
        self._new: dict[bytes, bytes] = {}
        self._read_before: dict[bytes, Record] = {}

    async def look_up(self, terms: Sequence[int]) -> Snapshot:
        """Raises `StaleIndex`, `DamagedIndex`."""
        keys = self._keys
        known = self._remembered.entered_of(keys.base)
        mark = b"" if known is None else known.mark
        said = await self._together.call(
            self._look_up,
            keys.looked_up,
            [keys.segments, VERSION, mark, *dict.fromkeys(terms)],
        )
        self._segments, self._entries, self._new, self._read_before = [], None, {}, {}
        self._mixed = set()
        if said is None:
            return Snapshot([], 0)
        if said == 0:
            raise StaleIndex
        total, generation, mark, entries, segments = said
        if entries is not None:
            known = await self._entered(mark, generation, dict(pairs(entries)))
        assert known is not None  # its mark was given
        self._new, self._entries, self._read_before = known.entries, known.part, known.records
        parts: list[tuple[int, str, Part]] = []
        for name, about, sessions, buckets in segments:
            if sessions is None:
                raise DamagedIndex("a segment is missing")
            size, bits, last, ordered = map(int, about.split())
            if not ordered:
                self._mixed.add(name.decode())
            part = SegmentPart(size, bits, sessions, dict(pairs(buckets)))
            parts.append((last, name.decode(), part))
        parts.sort(key=lambda each: each[:2])
        self._segments = [name for _, name, _ in parts]
        self._parts = [part for _, _, part in parts]
        return Snapshot([*self._parts, self._entries], total)

    async def _entered(
        self, mark: bytes, generation: bytes, entries: dict[bytes, bytes]
    ) -> Entered:
        """What is in no segment; makes the entries that nobody has made yet."""
        base = self._keys.base
        values = [each for each in entries.items() if each[1][:1] in (b"[", b"")]
        if values:
            made = await weigh_records(values)
            for record_id, entry, text in made:
                entries[record_id] = entry
                self._remembered.keep_text(base, record_id, entry, text)
            self._index.fill(base, generation, {each[0]: each[1] for each in made})
        entered = Entered(mark, entries, EntriesPart(entries), {})
        self._remembered.keep_entered(base, entered)
        return entered

    async def recency(self) -> None:
        for name, part in zip(self._segments, self._parts, strict=True):
            if name in self._mixed:
                reply = self._redis.hget(self._keys.segments + name, "o")
                value = await self._asking(cast("Awaitable[bytes | None]", reply))
                if value is None:
                    raise Moved
                part.recency = recency_in(value, part.size)

    async def vocabularies(self) -> Sequence[str]:
        found: list[str] = []
        for name in self._segments:
            key = self._keys.segments + name
            known = self._remembered.vocabulary_of(key)
            if known is None:
                value = await self._asking(
                    cast("Awaitable[bytes | None]", self._redis.hget(key, "v"))
                )
                if value is None:
                    continue  # it was merged into another meanwhile; so it is when it is read
                known = vocabulary_in(value)
                self._remembered.keep_vocabulary(key, known)
            found.append(known)
        return [*found, *await self._index.texts_of(self._keys, self._new)]

    async def read(self, places: Sequence[Place]) -> Sequence[Record | None]:
        # Those that were there when the index was looked up, as they were read before.
        known = [self._known(place) for place in places]
        missing = [place for place, record in zip(places, known, strict=True) if record is None]
        if missing:
            ids, values = await self._at(missing, values=True)
            found = iter(
                self._record(record_id, value) for record_id, value in zip(ids, values, strict=True)
            )
            known = [next(found) if record is None else record for record in known]
        return [None if record is None else self._wanted(record) for record in known]

    def _known(self, place: Place) -> Record | None:
        if place.part != len(self._segments) or self._entries is None:
            return None
        return self._read_before.get(self._entries.ids[place.number])

    async def ids(self, places: Sequence[Place]) -> Sequence[str]:
        ids, _ = await self._at(places, values=False)
        return [record_id.decode() for record_id in ids]

    async def records(self, ids: Sequence[str]) -> Sequence[Record | None]:
        reply = self._redis.hmget(self._keys.records, list(ids))
        values = await self._asking(cast("Awaitable[list[bytes | None]]", reply))
        found = [
            self._record(record_id.encode(), value)
            for record_id, value in zip(ids, values, strict=True)
        ]
        return [None if record is None else self._wanted(record) for record in found]

    async def _at(
        self, places: Sequence[Place], *, values: bool
    ) -> tuple[list[bytes], list[bytes | None]]:
        """Ids of the records at places, and their values if they are wanted."""
        direct: list[bytes] = []
        blocks: list[Any] = []
        # Where the reply has each: entries come first in it.
        order: list[tuple[bool, int]] = []
        for part, number in places:
            if part == len(self._segments) and self._entries is not None:
                order.append((True, len(direct)))
                direct.append(self._entries.ids[number])
            else:
                order.append((False, len(blocks) // 3))
                block, at = divmod(number, IDS_TOGETHER)
                blocks += [self._segments[part], block, at]
        said = await self._together.call(
            self._read,
            [self._keys.records],
            [self._keys.segments, int(values), len(direct), *direct, *blocks],
        )
        if said is None:
            raise Moved
        if said == 0:
            raise DamagedIndex("the ids of a segment")
        where = [at if is_direct else len(direct) + at for is_direct, at in order]
        found, its_values = said
        return [found[at] for at in where], [its_values[at] for at in where if values]

    def _record(self, record_id: bytes, value: bytes | None) -> Record | None:
        record = None if value is None else to_record(record_id, value, self._scope)
        if record is not None and record_id in self._new:
            self._remembered.keep_record(self._read_before, record_id, record, value)
        return record

    def _wanted(self, record: Record) -> Record | None:
        if self._oldest is not None and record.order < self._oldest:
            return None  # has expired, and is yet to be swept out
        if self._scope.session_id not in (None, record.scope.session_id):
            return None
        return record
