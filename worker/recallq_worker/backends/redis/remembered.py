"""What a process remembers of indexes: texts of records, vocabularies of segments, entries.

None ever changes under what it is remembered by, so it is right. Texts and vocabularies are for
those who look for a part of a word, and for making segments; a user's entries, for every search.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

from recallq_worker.backends.base import Record
from recallq_worker.search.scoring import EntriesPart

K = TypeVar("K")

_RECORDS_BYTES = 8 << 20
_SEGMENTS_BYTES = 24 << 20
_EACH = 200
"""Bytes, roughly, of an entry besides its text."""
_PARTS_BYTES = 128 << 20
_LARGEST_RECORD = 2048
"""Bytes of the value of a record that is kept; it takes some three times as many."""


class Entered(NamedTuple):
    """A user's messages that are in no segment, at a moment."""

    mark: bytes
    """What the moment is known by."""
    entries: dict[bytes, bytes]
    part: EntriesPart
    records: dict[bytes, Record]
    """Those that searches have read."""

    @property
    def size(self) -> int:
        """Bytes, at most about, with all records: it does not change while they are read."""
        return (1 + len(self.entries)) * (_EACH + 3 * _LARGEST_RECORD) + self.part.bytes


class Remembered:
    """What one process remembers, within a number of bytes."""

    def __init__(self) -> None:
        self._texts: _Lately[tuple[str, bytes, int]] = _Lately(_RECORDS_BYTES)
        self._vocabularies: _Lately[str] = _Lately(_SEGMENTS_BYTES)
        self._entered: OrderedDict[str, Entered] = OrderedDict()
        self._entered_size = 0

    def entered_of(self, base: str) -> Entered | None:
        """What was in a user's entries when they were last looked at."""
        entered = self._entered.get(base)
        if entered is not None:
            self._entered.move_to_end(base)
        return entered

    @staticmethod
    def keep_record(
        records: dict[bytes, Record], record_id: bytes, record: Record, value: bytes | None
    ) -> None:
        """Keeps a record that was read among `records` of an `Entered`, unless it is large."""
        if value is not None and len(value) <= _LARGEST_RECORD:
            records[record_id] = record

    def forget_entered(self, base: str) -> None:
        """Something of the user has been deleted."""
        before = self._entered.pop(base, None)
        if before is not None:
            self._entered_size -= before.size

    def keep_entered(self, base: str, entered: Entered) -> None:
        self.forget_entered(base)
        self._entered[base] = entered
        self._entered_size += entered.size
        while self._entered_size > _PARTS_BYTES and len(self._entered) > 1:
            _, oldest = self._entered.popitem(last=False)
            self._entered_size -= oldest.size

    def text_of(self, base: str, record_id: bytes, entry: bytes) -> str | None:
        """The text of the record that has this entry: an id may be stored again with another."""
        return self._texts.get((base, record_id, hash(entry)))

    def keep_text(self, base: str, record_id: bytes, entry: bytes, text: str) -> None:
        self._texts.put((base, record_id, hash(entry)), text)

    def vocabulary_of(self, segment: str) -> str | None:
        """The tokens of the segment under a key, by lines."""
        return self._vocabularies.get(segment)

    def keep_vocabulary(self, segment: str, vocabulary: str) -> None:
        self._vocabularies.put(segment, vocabulary)


class _Lately(Generic[K]):
    """Texts that were put or got last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._texts: OrderedDict[K, str] = OrderedDict()

    def get(self, key: K) -> str | None:
        text = self._texts.get(key)
        if text is not None:
            self._texts.move_to_end(key)
        return text

    def put(self, key: K, text: str) -> None:
        before = self._texts.pop(key, None)
        if before is not None:
            self._size -= _EACH + len(before)
        self._texts[key] = text
        self._size += _EACH + len(text)
        while self._size > self._most:
            _, oldest = self._texts.popitem(last=False)
            self._size -= _EACH + len(oldest)
