"""One search, from the query's text to the records: the same wherever an index is kept.

First the query's terms are looked up. One that occurs nowhere may be a part of a word, so it is
looked for in the words that do occur; so are all, where fewer messages answer than are wanted. Then
the best are read, and whatever has vanished meanwhile makes room for the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from recallq_worker.backends.base import Hit, Record
from recallq_worker.search.scoring import Part, Place, Ranked, rank
from recallq_worker.search.terms import QueryTerm, query_terms
from recallq_worker.search.vocabulary import with_part

_MOST_WORDS = 64
"""Words that a part is looked for in."""


@dataclass(slots=True)
class Snapshot:
    """A user's index at a moment, as far as some terms are concerned."""

    parts: Sequence[Part]
    """From old to new."""
    total: int
    """How many messages the user has."""


class Moved(Exception):
    """The index has been put into another order: everything is to be looked up once more."""


class Reader(Protocol):
    """One user's index, wherever it is."""

    async def look_up(self, terms: Sequence[int]) -> Snapshot:
        """What is to be known of terms."""
        ...

    async def vocabularies(self) -> Sequence[str]:
        """The words that occur; see `recallq_worker.search.vocabulary`."""
        ...

    async def read(self, places: Sequence[Place]) -> Sequence[Record | None]:
        """The records at places of the last snapshot; None for those that are gone.

        Raises `Moved`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a search is to find."""

    query: str
    session_id: str | None
    top_k: int
    score_threshold: float | None


async def find(reader: Reader, wanted: Wanted) -> list[Hit]:
    """The best matches, best first, ties by recency."""
    terms = query_terms(wanted.query)
    if not terms:
        return []
    ranked = await _ranked(reader, terms, wanted)
    few = len(ranked) < wanted.top_k
    partly = [
        term for term in terms if term.may_be_a_part and (few or term.is_lone or not term.count)
    ]
    if partly and _look_for_parts(partly, await reader.vocabularies()):
        ranked = await _ranked(reader, terms, wanted)
    return await _hits(reader, ranked, wanted)


async def _ranked(reader: Reader, terms: Sequence[QueryTerm], wanted: Wanted) -> Ranked:
    snapshot = await reader.look_up([each for term in terms for each in (term.term, *term.parts)])
    return rank(
        snapshot.parts,
        terms,
        total=snapshot.total,
        session_id=wanted.session_id,
        most=wanted.top_k,
    )


def _look_for_parts(terms: Sequence[QueryTerm], vocabularies: Sequence[str]) -> bool:
    """Notes the words that terms are a part of; whether there are any."""
    for term in terms:
        words = with_part(vocabularies, term.text, _MOST_WORDS)
        term.parts = tuple({word.term for word in words} - {term.term})
    return any(term.parts for term in terms)


async def _hits(reader: Reader, ranked: Ranked, wanted: Wanted) -> list[Hit]:
    found: list[Hit] = []
    looked_at = 0
    while len(found) < wanted.top_k:
        portion = list(ranked.portion(looked_at, wanted.top_k))
        looked_at += len(portion)
        if wanted.score_threshold is not None:
            portion = [each for each in portion if each[1] >= wanted.score_threshold]
        if not portion:
            break
        records = await reader.read([place for place, _ in portion])
        found += [
            Hit(record, score)
            for record, (_, score) in zip(records, portion, strict=True)
            if record is not None
        ]
    found.sort(key=lambda hit: (hit.score, hit.record.order, hit.record.record_id), reverse=True)
    return found[: wanted.top_k]
