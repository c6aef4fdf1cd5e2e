"""The terms of messages, and how those of a single message are kept: its *entry*.

An entry is a head - version (u8), usual weight (u8), number of terms that have it (u16), order key
(i64), digest of the session's id (u64) - then these terms (u32), then the others, each with its
weight (u8). All numbers here and in segments are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from recallq_worker.search.terms import Array, Weighed, weigh

VERSION = 1
"""Of how indexes are kept, and of how texts become terms: one of another version is made anew."""

_HEAD = struct.Struct("<BBHqQ")
_HEADS = np.dtype(
    [("version", "u1"), ("usual", "u1"), ("count", "<u2"), ("order", "<i8"), ("session", "<u8")]
)
_OTHER = np.dtype([("term", "<u4"), ("weight", "u1")])


class DamagedIndex(Exception):
    """A part of an index is not what was written. It is made anew, from the records."""


@lru_cache(maxsize=8192)
def session_digest(session_id: str) -> int:
    """What stands for a session in an index."""
    digest = blake2b(session_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def entries_of(
    sessions: Sequence[str], orders: Sequence[int], messages: Sequence[Mapping[str, Any]]
) -> list[tuple[bytes, str]]:
    """The entries of messages, JSON objects, and their texts as `Weighed` has them; `sessions` and
    `orders` are their session ids and order keys."""
    weighed = weigh(messages)
    return list(zip(encode_entries(sessions, orders, weighed), weighed.texts, strict=True))


def encode_entries(sessions: Sequence[str], orders: Sequence[int], weighed: Weighed) -> list[bytes]:
    """The entries of messages that have been weighed."""
    count = len(weighed.texts)
    same = weighed.weights == weighed.usual[weighed.numbers]
    firsts, first_edges = _cut(weighed.terms[same], weighed.numbers[same], count)
    others = np.empty(len(same) - len(firsts) // 4, dtype=_OTHER)
    others["term"], others["weight"] = weighed.terms[~same], weighed.weights[~same]
    seconds, second_edges = _cut(others, weighed.numbers[~same], count)
    entries = []
    for number, (session_id, order, usual) in enumerate(
        zip(sessions, orders, weighed.usual.tolist(), strict=True)
    ):
        first, last = first_edges[number : number + 2]
        head = _HEAD.pack(VERSION, usual, (last - first) // 4, order, session_digest(session_id))
        second = seconds[second_edges[number] : second_edges[number + 1]]
        entries.append(head + firsts[first:last] + second)
    return entries


def _cut(values: Array, numbers: Array, count: int) -> tuple[bytes, list[int]]:
    """Values one after the other, and at which bytes those of each message begin and end."""
    edges = np.cumsum(np.bincount(numbers, minlength=count)) * values.itemsize
    return values.tobytes(), [0, *edges.tolist()]


@dataclass(slots=True)
class Messages:
    """The terms of any number of messages."""

    ids: list[bytes]
    """Of the records."""
    sessions: Array
    """u64, of each message: the digest of its session."""
    orders: Array
    """i64, of each message."""
    terms: Array
    """u32, of each posting."""
    numbers: Array
    """i64, of each posting: the message, by its place above."""
    weights: Array
    """u8, of each posting."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of_entries(cls, entries: Mapping[bytes, bytes]) -> Messages:
        """What entries say, which are under the ids of their records.

        Raises `DamagedIndex`, also for entries of another version.
        """
        values = list(entries.values())
        sizes = np.fromiter(map(len, values), np.int64, len(values))
        if (sizes < _HEAD.size).any():
            raise DamagedIndex("an entry")
        heads = np.frombuffer(b"".join([value[: _HEAD.size] for value in values]), dtype=_HEADS)
        same = heads["count"].astype(np.int64)
        middles = _HEAD.size + 4 * same
        others, left = np.divmod(sizes - middles, _OTHER.itemsize)
        if ((heads["version"] != VERSION) | (others < 0) | (left != 0)).any():
            raise DamagedIndex("an entry, or it is of another version")
        edges = middles.tolist()
        first = b"".join([value[_HEAD.size : at] for value, at in zip(values, edges, strict=True)])
        second = b"".join([value[at:] for value, at in zip(values, edges, strict=True)])
        rest = np.frombuffer(second, dtype=_OTHER)
        numbers = np.arange(len(values))
        return cls(
            ids=list(entries),
            sessions=heads["session"].astype("<u8"),
            orders=heads["order"].astype("<i8"),
            terms=np.concatenate([np.frombuffer(first, "<u4"), rest["term"]]),
            numbers=np.concatenate([np.repeat(numbers, same), np.repeat(numbers, others)]),
            weights=np.concatenate([np.repeat(heads["usual"], same), rest["weight"]]),
        )

    @classmethod
    def joined(cls, parts: Sequence[Messages]) -> Messages:
        """All of the parts; none of their messages is in two of them."""
        bases = np.cumsum([0, *(len(part) for part in parts)])
        return cls(
            ids=[record_id for part in parts for record_id in part.ids],
            sessions=np.concatenate([part.sessions for part in parts]),
            orders=np.concatenate([part.orders for part in parts]),
            terms=np.concatenate([part.terms for part in parts]),
            numbers=np.concatenate(
                [part.numbers + base for part, base in zip(parts, bases[:-1], strict=True)]
            ),
            weights=np.concatenate([part.weights for part in parts]),
        )

    def without(self, gone: set[bytes]) -> Messages:
        """What is left when some are taken away."""
        kept = np.array([record_id not in gone for record_id in self.ids], dtype=bool)
        places = np.cumsum(kept) - 1
        postings = kept[self.numbers]
        return Messages(
            ids=[record_id for record_id in self.ids if record_id not in gone],
            sessions=self.sessions[kept],
            orders=self.orders[kept],
            terms=self.terms[postings],
            numbers=places[self.numbers[postings]],
            weights=self.weights[postings],
        )

    def places(self) -> Array:
        """Of each message its place when those of a session stand together, in their order, and
        sessions in the order of their first messages."""
        keys: list[Array] = [self.orders]
        if (self.sessions != self.sessions[:1]).any():
            distinct, which = np.unique(self.sessions, return_inverse=True)
            firsts = np.full(len(distinct), np.iinfo(np.int64).max)
            np.minimum.at(firsts, which, self.orders)
            keys += [which, firsts[which]]
        if not np.diff(np.sort(self.orders)).all():
            keys.insert(0, np.array(self.ids))  # those of one add are in the order of their ids
        places = np.empty(len(self.ids), dtype=np.int64)
        places[np.lexsort(keys)] = np.arange(len(self.ids))
        return places


def starts_of(sessions: Array) -> Array:
    """Where sessions begin, among messages that stand in their places."""
    return np.flatnonzero(np.diff(sessions, prepend=sessions[:1] + np.uint64(1)))
