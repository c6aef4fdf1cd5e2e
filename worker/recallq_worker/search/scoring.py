"""Which messages answer a query, and how well.

A message answers if a term of the query occurs in it. Its score is the sum of the weights of the
query's terms in it, the rarer the more, as a share of what it would be if it said all of them over
and over: between 0 and 1, whatever the query and however much the user has stored. A message that
says every term once scores about 0.6, and one that says the rarer half of them more than half that.

A conversation is understood in its course, so a term that stands in a neighbouring message of the
session counts, too, at a part of its weight there; it counts once, so who repeats what was said
before gains nothing, and equal messages stay equal. (On the conversations of LoCoMo, taking from
the neighbours what is missing finds more than adding a share of their scores.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from recallq_worker.search.entries import DamagedIndex, Messages, session_digest, starts_of
from recallq_worker.search.segments import bucket_of, postings_in, sessions_in
from recallq_worker.search.terms import FULL, Array, QueryTerm
from recallq_worker.search.text import Kind

_PART_OF_A_WORD = 2
"""What is found as a part of a word weighs so many times less."""
_NEIGHBOURS = ((1, 0.6), (2, 0.42), (3, 0.35))
"""How far away a neighbour is, and the part of a weight that counts from there."""
_OFFSETS = np.array([[0], *([sign * far] for far, _ in _NEIGHBOURS for sign in (1, -1))])
_SHARES = np.array(
    [[1.0], *([share] for _, share in _NEIGHBOURS for _ in range(2))], dtype=np.float32
)
_ALL = 1024
"""Candidates for whom neighbours are looked at; of more, those at and around the best."""
MOST_EQUALS = 64
"""Equals that are read more than are wanted: their order is in the records."""
_DIGITS = 6
"""Decimals of a score that mean anything: behind them, ties would not be ties."""


class Part(ABC):
    """Messages of one user as a query sees them: those of a session together, in their order."""

    recency: Array | None = None
    """Of each message a number that is higher for a later one. None if they stand so, or nearly."""

    def __init__(self, size: int, starts: Array, digests: Array) -> None:
        """`starts` are the numbers of the sessions' first messages, `digests` the sessions'."""
        self.size = size
        self.starts = starts
        self.digests = digests

    @abstractmethod
    def postings(self, term: int) -> tuple[Array, Array] | None:
        """Numbers of messages, each once, and weights."""


class SegmentPart(Part):
    """A segment, of which perhaps only the buckets of some terms are there."""

    def __init__(
        self, size: int, bits: int, sessions: bytes, buckets: Mapping[bytes, bytes]
    ) -> None:
        """Raises `DamagedIndex`."""
        super().__init__(size, *sessions_in(sessions))
        if self.starts[-1] >= size:
            raise DamagedIndex("the sessions of a segment")
        self._bits = bits
        self._buckets = buckets

    def postings(self, term: int) -> tuple[Array, Array] | None:
        bucket = self._buckets.get(bucket_of(term, self._bits))
        found = None if bucket is None else postings_in(bucket, term)
        if found is not None and found[0].max() >= self.size:
            raise DamagedIndex("a bucket of a segment")
        return found


class EntriesPart(Part):
    """Messages that are in no segment yet."""

    def __init__(self, entries: Mapping[bytes, bytes]) -> None:
        """Raises `DamagedIndex`."""
        messages = Messages.of_entries(entries)
        places = messages.places()
        order = np.empty_like(places)
        order[places] = np.arange(len(places))
        sessions = messages.sessions[order]
        starts = starts_of(sessions)
        super().__init__(len(messages), starts, sessions[starts])
        self.ids = [messages.ids[number] for number in order.tolist()]
        recency = np.empty_like(places)
        recency[np.argsort(messages.orders[order], kind="stable")] = np.arange(len(places))
        self.recency = recency
        by_term = np.argsort(messages.terms, kind="stable")
        self._terms = messages.terms[by_term]
        self._numbers = places[messages.numbers[by_term]]
        self._weights = messages.weights[by_term]

    @property
    def terms(self) -> int:
        """How many the messages have together."""
        return len(self._terms)

    def postings(self, term: int) -> tuple[Array, Array] | None:
        first = int(self._terms.searchsorted(np.uint32(term)))
        last = int(self._terms.searchsorted(np.uint32(term), side="right"))
        return (self._numbers[first:last], self._weights[first:last]) if last > first else None


class Place(NamedTuple):
    """Where a message stands."""

    part: int
    number: int


class Ranked:
    """The messages that answer a query, best first, the later of equals first."""

    def __init__(
        self, parts: Sequence[Part], scores: Array, places: Array, *, complete: bool = True
    ) -> None:
        self.complete = complete
        """Whether these are all that answer."""
        self._parts = parts
        self._bases = _bases(parts)
        self._scores = scores
        self._places = places
        self.sort()

    def __len__(self) -> int:
        return len(self._scores)

    def sort(self) -> None:
        """Puts them into their order, by what is known of recency."""
        best = np.lexsort((_recency(self._parts, self._bases, self._places), self._scores))[::-1]
        self._scores, self._places = self._scores[best], self._places[best]

    def torn(self, count: int) -> bool:
        """Whether so many equals are around number `count` that recency has to be known exactly."""
        first, last = max(0, count - 1), count + MOST_EQUALS
        return len(self) > last and bool(self._scores[first] == self._scores[last])

    def portion(self, first: int, count: int) -> Iterator[tuple[Place, float]]:
        """`count` of them from `first` on, and those that are equal to the last, about."""
        scores = self._scores[first : first + count + MOST_EQUALS]
        if len(scores) > count:
            scores = scores[: int(np.count_nonzero(scores >= scores[count - 1]))]
        places = self._places[first : first + len(scores)]
        parts = np.searchsorted(self._bases, places, side="right") - 1
        numbers = places - self._bases[parts]
        for part, number, score in zip(
            parts.tolist(), numbers.tolist(), scores.tolist(), strict=True
        ):
            yield Place(part, number), score


def rank(
    parts: Sequence[Part],
    terms: Sequence[QueryTerm],
    *,
    total: int,
    session_id: str | None,
    most: int,
) -> Ranked:
    """The best of the messages that answer: `most` of them at least, if there are so many.

    `parts` are from old to new, and `total` is the number of the user's messages. Says of each term
    in how many messages it occurs. Raises `DamagedIndex`.
    """
    bases = _bases(parts)
    own = np.zeros(int(bases[-1]), dtype=np.float32)
    found: list[tuple[np.float32, Array]] = []
    possible = 0.0
    for term in terms:
        places, values = _postings(parts, bases, term)
        term.count = len(places)
        if term.kind is Kind.WHOLE and not term.count:
            continue  # its words speak for it
        rarity = np.float32(math.log(1 + max(total - term.count, 0.5) / (term.count + 0.5)))
        possible += float(rarity)
        if term.count:
            own[places] += rarity * values
            weights = np.zeros(len(own), dtype="u1")
            weights[places] = values
            found.append((rarity, weights))
    candidates = np.flatnonzero(own)
    if session_id is not None:
        candidates = _of_session(parts, bases, candidates, session_digest(session_id))
    complete = len(candidates) <= max(_ALL, 2 * most)
    if not complete:
        candidates = _around_the_best(candidates, own, max(_ALL // 4, 2 * most))
    if not len(candidates):
        return Ranked([], np.empty(0), candidates)
    scores = _with_neighbours(parts, bases, candidates, found) / (possible * FULL)
    return Ranked(parts, np.round(scores, _DIGITS), candidates, complete=complete)


def _bases(parts: Sequence[Part]) -> Array:
    """Where the messages of each part begin when all are numbered."""
    return np.cumsum([0, *(part.size for part in parts)])


def _postings(parts: Sequence[Part], bases: Array, term: QueryTerm) -> tuple[Array, Array]:
    """The places of the messages that hold a term, each once, and its weights there."""
    places: list[Array] = []
    values: list[Array] = []
    for each in (term.term, *term.parts):
        is_part = each != term.term and not term.is_lone
        for part, base in zip(parts, bases.tolist(), strict=False):
            postings = part.postings(each)
            if postings is not None:
                # 16 bits, in a segment.
                places.append(postings[0].astype(np.int64) + base)
                values.append(postings[1] // _PART_OF_A_WORD if is_part else postings[1])
    if not places:
        return np.empty(0, np.int64), np.empty(0, "u1")
    if not term.parts:
        return np.concatenate(places), np.concatenate(values)
    everywhere, which = np.unique(np.concatenate(places), return_inverse=True)
    highest = np.zeros(len(everywhere), dtype="u1")
    np.maximum.at(highest, which, np.concatenate(values))
    return everywhere, highest


def _of_session(parts: Sequence[Part], bases: Array, candidates: Array, digest: int) -> Array:
    kept = [candidates[:0]]
    for part, base in zip(parts, bases.tolist(), strict=False):
        edges = np.append(part.starts, part.size) + base
        for which in np.flatnonzero(part.digests == np.uint64(digest)).tolist():
            first, last = np.searchsorted(candidates, edges[which : which + 2])
            kept.append(candidates[first:last])
    return np.concatenate(kept)


def _around_the_best(candidates: Array, own: Array, many: int) -> Array:
    """The best by themselves, the later of equals, and those near to them."""
    scores = own[candidates]
    edge = np.partition(scores, len(scores) - many)[len(scores) - many]
    better = candidates[scores > edge]
    equal = candidates[scores == edge]
    best = np.concatenate([better, equal[len(equal) - (many - len(better)) :]])
    chosen = np.zeros(len(own), dtype=bool)
    near = (best + _OFFSETS).ravel()
    chosen[near[(near >= 0) & (near < len(own))]] = True
    return candidates[chosen[candidates]]


def _with_neighbours(
    parts: Sequence[Part],
    bases: Array,
    candidates: Array,
    found: Sequence[tuple[np.float32, Array]],
) -> Array:
    starts = np.concatenate(
        [part.starts + base for part, base in zip(parts, bases.tolist(), strict=False)]
    )
    which = np.searchsorted(starts, candidates, side="right") - 1
    near = candidates + _OFFSETS
    same = (near >= starts[which]) & (near < np.append(starts[1:], bases[-1])[which])
    shares = np.where(same, _SHARES, np.float32(0))
    np.clip(near, 0, int(bases[-1]) - 1, out=near)
    scores = np.zeros(len(candidates))
    for rarity, weights in found:
        scores += rarity * (weights[near] * shares).max(axis=0)
    return scores


def _recency(parts: Sequence[Part], bases: Array, places: Array) -> Array:
    if all(part.recency is None for part in parts):
        return places
    recency = places.copy()
    for part, base in zip(parts, bases.tolist(), strict=False):
        if part.recency is not None:
            here = (places >= base) & (places < base + part.size)
            recency[here] = part.recency[places[here] - base] + base
    return recency
