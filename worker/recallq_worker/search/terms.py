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
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from recallq.messages import message_text
from recallq_worker.search.text import COUNTS, TERM, Kind, Token, codes, fold, term_of, tokens

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


class Analysis(NamedTuple):
    """What there is to know of a message."""

    weights: dict[int, int]
    """Its terms, with their weights from 1 to `FULL`."""
    usual: int
    """The weight of those that it says once."""
    text: str
    """Its text, folded, with every chunk in a line of its own."""


def analyze(message: Mapping[str, Any]) -> Analysis:
    """The terms of a message, a JSON object."""
    said = fold(message_text(message)).split()
    found = Counter(map(codes.__getitem__, said))
    counts: dict[int, int] = {}
    length = 0
    for code, count in found.items():
        if isinstance(code, int):
            if code > TERM:
                length += count
                code -= COUNTS  # noqa: PLW2901  # what is left is the term
            counts[code] = counts.get(code, 0) + count
            continue
        for each in code:
            length += count if each > TERM else 0
            counts[each & TERM] = counts.get(each & TERM, 0) + count
        if len(counts) > _MOST_TERMS:
            break
    norm = _SATURATION * (1 - _LENGTH_MATTERS + _LENGTH_MATTERS * length / _USUAL_LENGTH)
    usual = round(FULL / (1 + norm)) or 1
    weights = {
        term: usual if count == 1 else round(FULL * count / (count + norm)) or 1
        for term, count in counts.items()
    }
    if not _NAMED_FIELDS.isdisjoint(message):
        for term, weight in _terms_of_fields(*_fields_of(message)):
            if weights.get(term, 0) < weight:
                weights[term] = weight
    return Analysis(weights, usual, "\n".join(said))


def lines_of(message: Mapping[str, Any]) -> str:
    """The text of a message, folded, as `Analysis` has it."""
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
