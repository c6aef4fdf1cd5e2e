"""One search, from the query's text to the records: the same wherever an index is kept.

First the query's terms are looked up. One that occurs nowhere may be a part of a word, so it is
looked for in the words that do occur; so are all, where fewer messages answer than are wanted. Then
the best are read, and whatever has vanished meanwhile makes room for the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from recallq_worker.backends.base import Hit, Record
from recallq_worker.search.scoring import Part, Place, Ranked, rank
from recallq_worker.search.terms import QueryTerm, query_terms
from recallq_worker.search.vocabulary import with_part

_SPARE_WORDS = 2
"""Words that a part is looked for in, beyond as many as messages are wanted: each is in one."""


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

    async def recency(self) -> None:
        """Lets parts of the last snapshot in which several sessions stand know their recency.

        Raises `Moved`.
        """
        ...

    async def read(self, places: Sequence[Place]) -> Sequence[Record | None]:
        """The records at places of the last snapshot; None for those that are gone.

        Raises `Moved`.
        """
        ...

    async def ids(self, places: Sequence[Place]) -> Sequence[str]:
        """Their ids alone. Raises `Moved`."""
        ...

    async def records(self, ids: Sequence[str]) -> Sequence[Record | None]:
        """Records by their ids; None for those that are gone."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a search is to find."""

    query: str
    session_id: str | None
    top_k: int
    score_threshold: float | None


async def find(reader: Reader, wanted: Wanted) -> list[Hit]:
    """The best matches by their words, best first, ties by recency."""
    most = wanted.top_k
    while True:
        ranked = await _ranked_with_parts(reader, wanted, most)
        if ranked.torn(wanted.top_k):
            await reader.recency()
            ranked.sort()
        found: list[Hit] = []
        looked_at, good_enough = 0, True
        while len(found) < wanted.top_k and looked_at < len(ranked) and good_enough:
            portion = list(ranked.portion(looked_at, wanted.top_k))
            looked_at += len(portion)
            chosen = [each for each in portion if _is_enough(each[1], wanted)]
            good_enough = len(chosen) == len(portion)
            if chosen:
                records = await reader.read([place for place, _ in chosen])
                found += _hits(records, [score for _, score in chosen])
        if len(found) >= wanted.top_k or ranked.complete or not good_enough:
            return _best(found, wanted)
        most *= 4  # the best are gone, by their age say, and hide others


async def ranked_by_words(reader: Reader, wanted: Wanted, most: int) -> dict[str, float]:
    """The ids of the best matches by their words, `most` or a few more, and their scores."""
    ranked = await _ranked_with_parts(reader, wanted, most)
    portion = list(ranked.portion(0, most))
    ids = await reader.ids([place for place, _ in portion]) if portion else []
    return {record_id: score for record_id, (_, score) in zip(ids, portion, strict=True)}


async def best_of(
    reader: Reader, scores: Mapping[str, float], wanted: Wanted
) -> tuple[list[Hit], bool]:
    """The best of records that somebody has scored, if they are there, and in the session that is
    wanted; and whether some were not."""
    ranked = sorted(
        ((record_id, round(score, 6)) for record_id, score in scores.items() if score > 0),
        key=lambda each: -each[1],
    )
    ranked = [each for each in ranked if _is_enough(each[1], wanted)]
    found: list[Hit] = []
    looked_at = 0
    while len(found) < wanted.top_k and looked_at < len(ranked):
        end = looked_at + wanted.top_k
        while end < len(ranked) and ranked[end][1] == ranked[end - 1][1]:
            end += 1  # equals are put into their order by what is in the records
        portion = ranked[looked_at:end]
        looked_at = end
        records = await reader.records([record_id for record_id, _ in portion])
        found += _hits(records, [score for _, score in portion])
    return _best(found, wanted), len(found) < min(looked_at, len(ranked))


async def _ranked_with_parts(reader: Reader, wanted: Wanted, most: int) -> Ranked:
    terms = query_terms(wanted.query)
    if not terms:
        return Ranked([], np.empty(0), np.empty(0, dtype=np.int64))
    ranked = await _ranked(reader, terms, wanted, most)
    few = len(ranked) < wanted.top_k
    partly = [
        term for term in terms if term.may_be_a_part and (few or term.is_lone or not term.count)
    ]
    if partly and _look_for_parts(partly, await reader.vocabularies(), wanted.top_k + _SPARE_WORDS):
        ranked = await _ranked(reader, terms, wanted, most)
    return ranked


async def _ranked(reader: Reader, terms: Sequence[QueryTerm], wanted: Wanted, most: int) -> Ranked:
    snapshot = await reader.look_up([each for term in terms for each in (term.term, *term.parts)])
    return rank(
        snapshot.parts, terms, total=snapshot.total, session_id=wanted.session_id, most=most
    )


def _look_for_parts(terms: Sequence[QueryTerm], vocabularies: Sequence[str], most: int) -> bool:
    """Notes the words that terms are a part of, `most` for each; whether there are any."""
    for term in terms:
        words = with_part(vocabularies, term.text, most)
        term.parts = tuple({word.term for word in words} - {term.term})
    return any(term.parts for term in terms)


def _is_enough(score: float, wanted: Wanted) -> bool:
    return wanted.score_threshold is None or score >= wanted.score_threshold


def _hits(records: Sequence[Record | None], scores: Sequence[float]) -> Iterator[Hit]:
    for record, score in zip(records, scores, strict=True):
        if record is not None:
            yield Hit(record, score)


def _best(found: list[Hit], wanted: Wanted) -> list[Hit]:
    found.sort(key=lambda hit: (hit.score, hit.record.order, hit.record.record_id), reverse=True)
    return found[: wanted.top_k]
