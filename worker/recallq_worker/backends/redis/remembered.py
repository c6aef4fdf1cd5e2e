"""Texts of records and vocabularies of segments, as far as a process remembers them.

Neither ever changes under what it is remembered by, so it is right. Only who looks for a part of a
word needs them, and who makes segments; remembering spares reading the records for that.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")

_RECORDS_BYTES = 8 << 20
_SEGMENTS_BYTES = 24 << 20
_EACH = 200
"""Bytes, roughly, of an entry besides its text."""


class Remembered:
    """What one process remembers, within a number of bytes."""

    def __init__(self) -> None:
        self._texts: _Lately[tuple[str, bytes, int]] = _Lately(_RECORDS_BYTES)
        self._vocabularies: _Lately[str] = _Lately(_SEGMENTS_BYTES)

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
