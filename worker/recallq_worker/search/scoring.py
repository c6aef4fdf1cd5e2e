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

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True, slots=True)
class Around:
    """What a term weighs among messages that are in no segment, with their neighbours' share."""

    answers: Array
    """bool, of each message: whether the term occurs in it."""
    count: int
    """In how many it does."""
    weights: Array
    """f64, of each message."""


_NOWHERE = Around(np.zeros(0, dtype=bool), 0, np.zeros(0))
_REMEMBERED_TERMS = 64
"""Terms of which a part remembers what they weigh in it: a user's searches are about few things."""


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
        self._near: tuple[Array, Array] | None = None
        self._around: dict[int, Around] = {}

    @property
    def bytes(self) -> int:
        """What it takes of memory at most, about, besides the ids."""
        remembered = 2 * _OFFSETS.size * 8 + _REMEMBERED_TERMS * 9 if self.size <= _ALL else 0
        return len(self._terms) * 15 + self.size * remembered

    def around(self, term: int) -> Around:
        """What a term weighs in each message: for parts of few."""
        known = self._around.get(term)
        if known is not None:
            return known
        found = self.postings(term)
        if found is None:
            return _NOWHERE
        if self._near is None:
            self._near = _near(self.starts, self.size, np.arange(self.size))
        near, shares = self._near
        places, values = found
        weights = np.zeros(self.size, dtype="u1")
        weights[places] = values
        answers = np.zeros(self.size, dtype=bool)
        answers[places] = True
        heaviest = np.maximum.reduce(weights[near] * shares, axis=0)
        if len(self._around) >= _REMEMBERED_TERMS:
            self._around.clear()
        around = Around(answers, len(places), heaviest.astype(np.float64))
        self._around[term] = around
        return around

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
        if len(self._parts) == 1:
            yield from zip(map(partial(Place, 0), places.tolist()), scores.tolist(), strict=True)
            return
        for place, score in zip(places.tolist(), scores.tolist(), strict=True):
            part = bisect_right(self._bases, place) - 1
            yield Place(part, place - self._bases[part]), score


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
    few = _few(parts, terms)
    if few is not None:
        return _rank_entries(few, terms, total, session_id)
    bases = _bases(parts)
    own = np.zeros(bases[-1], dtype=np.float32)
    weights = np.zeros((len(terms), bases[-1]), dtype="u1")
    rarities = np.zeros(len(terms))
    possible = 0.0
    for row, term in enumerate(terms):
        places, values = _postings(parts, bases, term)
        term.count = len(places)
        if term.kind is Kind.WHOLE and not term.count:
            continue  # its words speak for it
        rarity = _rarity(term.count, total)
        possible += rarity
        if term.count:
            own[places] += np.float32(rarity) * values
            weights[row, places] = values
            rarities[row] = rarity
    candidates = np.flatnonzero(own)
    if session_id is not None:
        candidates = _of_session(parts, bases, candidates, session_digest(session_id))
    complete = len(candidates) <= max(_ALL, 2 * most)
    if not complete:
        candidates = _around_the_best(candidates, own, max(_ALL // 4, 2 * most))
    if not len(candidates):
        return Ranked([], np.empty(0), candidates)
    scores = _with_neighbours(parts, bases, candidates, weights) * rarities[:, None]
    # Row by row, so that equal messages have equal scores.
    ranked = np.add.reduce(scores, axis=0) / (possible * FULL)
    return Ranked(parts, ranked.round(_DIGITS), candidates, complete=complete)


def _few(parts: Sequence[Part], terms: Sequence[QueryTerm]) -> EntriesPart | None:
    """The only part, if it has few messages and whole words alone are looked for."""
    if len(parts) != 1 or not isinstance(parts[0], EntriesPart) or parts[0].size > _ALL:
        return None
    return None if any(term.parts for term in terms) else parts[0]


def _rank_entries(
    part: EntriesPart, terms: Sequence[QueryTerm], total: int, session_id: str | None
) -> Ranked:
    """The same, where there are few messages: what each term weighs is remembered."""
    answers = np.zeros(part.size, dtype=bool)
    scores = np.zeros(part.size)
    possible = 0.0
    for term in terms:
        around = part.around(term.term)
        term.count = around.count
        if term.kind is Kind.WHOLE and not term.count:
            continue
        rarity = _rarity(term.count, total)
        possible += rarity
        if term.count:
            answers |= around.answers
            scores += rarity * around.weights
    candidates = answers.nonzero()[0]
    if session_id is not None:
        candidates = _of_session([part], [0], candidates, session_digest(session_id))
    if not len(candidates):
        return Ranked([], np.empty(0), candidates)
    return Ranked([part], (scores[candidates] / (possible * FULL)).round(_DIGITS), candidates)


def _rarity(count: int, total: int) -> float:
    return math.log(1 + max(total - count, 0.5) / (count + 0.5))


def _bases(parts: Sequence[Part]) -> list[int]:
    """Where the messages of each part begin when all are numbered, and where the last ends."""
    return [*itertools.accumulate((part.size for part in parts), initial=0)]


def _postings(parts: Sequence[Part], bases: Sequence[int], term: QueryTerm) -> tuple[Array, Array]:
    """The places of the messages that hold a term, each once, and its weights there."""
    places: list[Array] = []
    values: list[Array] = []
    for each in (term.term, *term.parts):
        is_part = each != term.term and not term.is_lone
        for part, base in zip(parts, bases, strict=False):
            postings = part.postings(each)
            if postings is not None:
                # 16 bits, in a segment.
                places.append(postings[0].astype(np.int64) + base if base else postings[0])
                values.append(postings[1] // _PART_OF_A_WORD if is_part else postings[1])
    if not places:
        return np.empty(0, np.int64), np.empty(0, "u1")
    if len(places) == 1:
        return places[0], values[0]
    if not term.parts:
        return np.concatenate(places), np.concatenate(values)
    everywhere, which = np.unique(np.concatenate(places), return_inverse=True)
    highest = np.zeros(len(everywhere), dtype="u1")
    np.maximum.at(highest, which, np.concatenate(values))
    return everywhere, highest


def _of_session(
    parts: Sequence[Part], bases: Sequence[int], candidates: Array, digest: int
) -> Array:
    kept = [candidates[:0]]
    for part, base in zip(parts, bases, strict=False):
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
    parts: Sequence[Part], bases: Sequence[int], candidates: Array, weights: Array
) -> Array:
    """Of each term, a row of `weights`, what it weighs for candidates and their neighbours."""
    near, shares = _near(_joined([part.starts for part in parts], bases), bases[-1], candidates)
    heaviest: Array = np.maximum.reduce(weights[:, near] * shares, axis=1)
    return heaviest.astype(np.float64)


def _near(starts: Array, size: int, candidates: Array) -> tuple[Array, Array]:
    """Of each candidate its own place and those of its neighbours, and their shares."""
    which = starts.searchsorted(candidates, side="right")
    ends = np.append(starts[1:], size)
    near = candidates + _OFFSETS
    same = (near >= starts[which - 1]) & (near < ends[which - 1])
    # What is of another session has no share, wherever it is.
    return near * same, same * _SHARES


def _joined(arrays: Sequence[Array], bases: Sequence[int]) -> Array:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate([each + base for each, base in zip(arrays, bases, strict=False)])


def _recency(parts: Sequence[Part], bases: Sequence[int], places: Array) -> Array:
    if all(part.recency is None for part in parts):
        return places
    if len(parts) == 1 and parts[0].recency is not None:
        return parts[0].recency[places]
    recency = places.copy()
    for part, base in zip(parts, bases, strict=False):
        if part.recency is not None:
            here = (places >= base) & (places < base + part.size)
            recency[here] = part.recency[places[here] - base] + base
    return recency
