"""When entries become a segment, which segments are merged with it, and how that is done.

Sizes grow by four from level to level, so a message is written into a segment once for each power
of four, and there are at most three segments of a level.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import numpy as np

from recallq_worker.search.entries import Messages
from recallq_worker.search.segments import MOST_MESSAGES, Segment, decode, encode
from recallq_worker.search.vocabulary import still_in_use, tokens_in

ENTRIES = 128
"""Messages that become a segment: every search reads their entries."""
_FEW = 3
"""Segments of a level that are left alone."""
_FACTOR = 4
_GONE = 4
"""One in so many messages of an index may be gone before it is cleaned up, where nobody asks."""

K = TypeVar("K")


def is_due(entries: int, gone: int, indexed: int) -> bool:
    """Whether entries are to become a segment, or what is gone to be taken out of segments."""
    return entries >= ENTRIES or gone >= max(ENTRIES, indexed // _GONE)


def to_merge(entries: int, segments: Mapping[K, int], most: int = MOST_MESSAGES) -> list[K]:
    """The segments that are merged into the one made of so many entries.

    `segments` are there, with their numbers of messages; nothing larger than `most` is made.
    """
    size = entries
    left = dict(segments)
    chosen: list[K] = []
    while True:
        level = _level(size)
        near = [key for key, count in left.items() if _level(count) <= level]
        if len(near) < _FEW:
            return chosen
        for key in sorted(near, key=left.__getitem__):
            if size + left[key] > most:
                return chosen
            size += left.pop(key)
            chosen.append(key)


def _level(size: int) -> int:
    level = 0
    while size >= ENTRIES * _FACTOR:
        size //= _FACTOR
        level += 1
    return level


def compacted(
    entries: Mapping[bytes, bytes],
    texts: Iterable[str],
    segments: Iterable[Mapping[bytes, bytes]],
    gone: Collection[bytes] = (),
) -> Segment | None:
    """One segment of entries and segments - at least one - without the messages that are gone.

    `texts` are those of the entries' messages, as `recallq_worker.search.terms.Weighed` has them.
    None if nothing is left. It is work for the processor. Raises `DamagedIndex`.
    """
    vocabulary = tokens_in(texts)
    parts = [Messages.of_entries(entries)] if entries else []
    for fields in segments:
        messages, tokens = decode(fields)
        parts.append(messages)
        vocabulary |= tokens
    together = Messages.joined(parts)
    left = together.without(set(gone)) if gone else together
    if len(left) < len(together):
        before = np.unique(together.terms, return_counts=True)
        after = np.unique(left.terms, return_counts=True)
        fewer = dict(zip(*(each.tolist() for each in before), strict=True))
        terms = dict(zip(*(each.tolist() for each in after), strict=True))
        removed = {term for term, count in fewer.items() if terms.get(term, 0) < count}
        vocabulary = still_in_use(vocabulary, terms, removed)
    return encode(left, vocabulary) if len(left) else None
