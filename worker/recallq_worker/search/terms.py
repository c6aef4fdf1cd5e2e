"""Which terms a message has and how much each counts; which terms a query looks for.

The weight of a term in a message is BM25's, of its frequency and of the message's length, with two
constants where BM25 has statistics of the whole collection: messages of a chat are short, so a
fixed usual length does as well, and a message's weights never change once it is stored. How rare a
term is, is known when somebody asks.

Who speaks and when it was said are terms of a message, too, where it says so itself (``name``,
``timestamp`` and the like), so that a question may name them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from recallq.messages import message_text
from recallq_worker.search.text import CODE_BYTES, TERM, Kind, Token, codes, fold, term_of, tokens

Array: TypeAlias = npt.NDArray[Any]

_SATURATION = 0.6
"""BM25's k1. Low: a word said twice says little more than once."""
_LENGTH_MATTERS = 0.3
"""BM25's b."""
_USUAL_LENGTH = 20
"""Words that are no stop words."""
FULL = 255
"""The weight that a term approaches which is said again and again."""

_SPEAKER_WEIGHT = round(0.7 * FULL)
_TIME_WEIGHT = round(0.5 * FULL)
_SPEAKER_FIELDS = ("name", "speaker", "author")
_TIME_FIELDS = ("timestamp", "created_at", "datetime", "date", "time")
_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
)  # fmt: skip
_ISO_DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})")
_DATE_PART = re.compile(r"(?<![\d:])(\d{4}|\d{1,2})(?:st|nd|rd|th)?(?![\d:])|([^\W\d_]{3,})")
_MILLISECONDS = 1e11
"""Epoch times above are in milliseconds: in seconds, it would be the year 5138."""
_MOST_OF_A_FIELD = 200
_NAMED_FIELDS = frozenset((*_SPEAKER_FIELDS, *_TIME_FIELDS))
_MOST_TERMS = 20_000
"""Distinct terms of a message that are looked at; beyond them it is a book."""
_MOST_QUERIED = 100
"""Distinct terms of a query; whole conversations are used as queries."""


class Weighed(NamedTuple):
    """What there is to know of messages."""

    texts: list[str]
    """Of each message: its text, folded, with every chunk in a line of its own."""
    usual: Array
    """u8, of each message: the weight of the terms that it says once."""
    numbers: Array
    """i64, of each term of a message, in order: the message, by its place above."""
    terms: Array
    """u32."""
    weights: Array
    """u8, from 1 to `FULL`."""


def weigh(messages: Sequence[Mapping[str, Any]]) -> Weighed:
    """The terms of messages, JSON objects: of many at once, for that takes little longer than of
    one."""
    said = [fold(message_text(message)).split() for message in messages]
    found = [b"".join(map(codes.__getitem__, each)) for each in said]
    sizes = np.fromiter(map(len, found), np.int64, len(found)) // CODE_BYTES
    every = np.frombuffer(b"".join(found), dtype="<u8")
    numbers = np.repeat(np.arange(len(said), dtype=np.uint64), sizes)
    lengths = np.bincount(numbers[every > TERM].view(np.int64), minlength=len(said))
    places = (numbers << np.uint64(32)) | (every & TERM)
    keys, counts = np.unique(places, return_counts=True)
    if sizes.size and sizes.max() > _MOST_TERMS:
        kept = _the_first_of_each(places)
        keys, counts = keys[kept], counts[kept]
    numbers = (keys >> np.uint64(32)).view(np.int64)
    norms = _SATURATION * (1 - _LENGTH_MATTERS + _LENGTH_MATTERS * lengths / _USUAL_LENGTH)
    usual = np.maximum(np.rint(FULL / (1 + norms)), 1).astype("u1")
    weights = np.maximum(np.rint(FULL * counts / (counts + norms[numbers])), 1).astype("u1")
    terms = keys.astype("<u4")
    fields = [
        (number << 32 | term, weight)
        for number, message in enumerate(messages)
        if not _NAMED_FIELDS.isdisjoint(message)
        for term, weight in _terms_of_fields(*_fields_of(message))
    ]
    if fields:
        numbers, terms, weights = _with_fields(keys, weights, fields)
    return Weighed(["\n".join(each) for each in said], usual, numbers, terms, weights)


def _the_first_of_each(places: Array) -> Array:
    """Which of the distinct places are among the first of their messages."""
    keys, firsts = np.unique(places, return_index=True)
    numbers = keys >> np.uint64(32)
    order = np.lexsort((firsts, numbers))
    rank = np.empty(len(keys), dtype=np.int64)
    rank[order] = np.arange(len(keys)) - np.searchsorted(numbers, numbers)
    kept: Array = rank < _MOST_TERMS
    return kept


def _with_fields(
    keys: Array, weights: Array, fields: Sequence[tuple[int, int]]
) -> tuple[Array, Array, Array]:
    """The terms of fields among those of texts: what is in both has the higher weight."""
    more = np.array(fields, dtype=np.uint64)
    together, which = np.unique(np.concatenate([keys, more[:, 0]]), return_inverse=True)
    highest = np.zeros(len(together), dtype="u1")
    np.maximum.at(highest, which, np.concatenate([weights, more[:, 1].astype("u1")]))
    return (together >> np.uint64(32)).view(np.int64), together.astype("<u4"), highest


def lines_of(message: Mapping[str, Any]) -> str:
    """The text of a message, folded, as `Weighed` has it."""
    return "\n".join(fold(message_text(message)).split())


def _fields_of(message: Mapping[str, Any]) -> tuple[str, str | float]:
    """Who speaks, and when, if the message says so."""
    for field in _TIME_FIELDS:
        when = message.get(field)
        if isinstance(when, str) and when.strip():
            return said_by(message), when[:_MOST_OF_A_FIELD]
        # A bool is an int, and no time.
        if isinstance(when, int | float) and not isinstance(when, bool):
            return said_by(message), when
    return said_by(message), ""


@lru_cache(maxsize=4096)
def _terms_of_fields(speaker: str, when: str | float) -> tuple[tuple[int, int], ...]:
    """Terms and weights; of a time its year, its month by name and its day."""
    found = [(token.term, _SPEAKER_WEIGHT) for token in tokens(speaker)]
    text = when if isinstance(when, str) else _of_epoch(when)
    if iso := _ISO_DATE.search(text):
        year, month, day = (int(part) for part in iso.groups())
        parts = [str(year), str(day)]
        if 1 <= month <= len(_MONTHS):
            parts.append(_MONTHS[month - 1])
    else:
        parts = [number.lstrip("0") or word for number, word in _DATE_PART.findall(fold(text))]
    return (*found, *((term_of(part), _TIME_WEIGHT) for part in parts if part))


def said_by(message: Mapping[str, Any]) -> str:
    """Who speaks, if the message says so."""
    for field in _SPEAKER_FIELDS:
        name = message.get(field)
        if isinstance(name, str) and name.strip():
            return name.strip()[:_MOST_OF_A_FIELD]
    return ""


def _of_epoch(seconds: float) -> str:
    try:
        seconds = float(seconds)
        if abs(seconds) > _MILLISECONDS:
            seconds /= 1000
        return datetime.fromtimestamp(seconds, UTC).date().isoformat()
    except (OverflowError, OSError, ValueError):
        return ""


@dataclass(slots=True)
class QueryTerm:
    """A term that is looked for."""

    text: str
    """As it was written, folded; a part of a word perhaps."""
    term: int
    kind: Kind
    parts: tuple[int, ...] = ()
    """Terms of words that it is a part of."""
    count: int = 0
    """In how many messages it occurs, once that is known."""

    @property
    def is_lone(self) -> bool:
        """Whether it is a single character of a script without spaces: a word as likely as not."""
        return self.kind is Kind.PAIR and len(self.text) == 1

    @property
    def may_be_a_part(self) -> bool:
        """Whether to look for words that hold it: a letter or digit is in too many."""
        if self.kind is Kind.STOP_WORD:
            return False
        return len(self.text) > 1 or self.is_lone


def query_terms(query: str) -> list[QueryTerm]:
    """The distinct terms of a query, without stop words if there are others."""
    found: dict[int, Token] = {}
    stop_words: dict[int, Token] = {}
    for token in tokens(query):
        (stop_words if token.kind is Kind.STOP_WORD else found).setdefault(token.term, token)
        if len(found) >= _MOST_QUERIED:
            break
    chosen = list((found or stop_words).values())[:_MOST_QUERIED]
    return [QueryTerm(token.text, token.term, token.kind) for token in chosen]
