"""How well a message answers a query: the seam behind which ranking lives.

A store hands its candidates to `best`, and nothing else in the code knows how they are judged.

The measure is the share of the query's terms that the text holds: 1 for a term found as a whole,
half of that for one found inside another word. It ignores case and Unicode forms. A single letter
counts only as a word of its own. Chinese, Japanese and Korean, written without spaces or nearly
so, are cut into pairs of neighbouring characters.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections.abc import Iterable, Iterator

from recallq.messages import message_text
from recallq_worker.backends.base import Hit, Record

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_CJK_RUN = re.compile(f"[{_CJK}]+")
_WORD = re.compile(f"[^\\W{_CJK}]+")
_INSIDE = re.compile(r"\w(?:.*\w)?", re.DOTALL)
"""A word without the punctuation around it."""
_LETTER = f"[^\\W{_CJK}]"
"""What makes a word longer when it stands next to it: scripts without spaces do not."""

_MOST_TERMS = 200
"""Terms of a query beyond these are not looked for: whole conversations are used as queries."""

_PART_OF_A_WORD = 0.5


def fold(text: str) -> str:
    """`text` with case and compatibility forms evened out."""
    return unicodedata.normalize("NFKC", text).casefold()


class Query:
    """A query, taken apart once for many candidates."""

    def __init__(self, text: str) -> None:
        words: dict[str, None] = {}  # ordered and without repeats
        pairs: dict[str, None] = {}
        for chunk in fold(text).split():
            for run in _CJK_RUN.findall(chunk):
                if len(run) == 1:
                    pairs[run] = None
                for start in range(len(run) - 1):
                    pairs[run[start : start + 2]] = None
            for piece in _CJK_RUN.split(chunk):
                # Kept whole inside: an order number or an e-mail address is one term.
                if word := _INSIDE.search(piece):
                    words[word[0]] = None
            if len(words) + len(pairs) >= _MOST_TERMS:
                break
        self._words = tuple(words)[:_MOST_TERMS]
        self._pairs = tuple(pairs)[:_MOST_TERMS]
        self._count = len(self._words) + len(self._pairs)

    def score(self, text: str) -> float:
        """Between 0, nothing found, and 1, every term found as a whole."""
        if not self._count:
            return 0.0
        folded = fold(text)
        found = float(sum(pair in folded for pair in self._pairs))
        tokens: set[str] | None = None
        for word in self._words:
            if word not in folded:
                continue
            if tokens is None:
                tokens = set(_WORD.findall(folded))
            if word in tokens or _stands_alone(word, folded):
                found += 1.0
            elif len(word) > 1:
                found += _PART_OF_A_WORD
        return found / self._count


def _stands_alone(word: str, text: str) -> bool:
    """Whether a term that is no plain word occurs with no letter or digit next to it."""
    if _WORD.fullmatch(word):
        return False
    return re.search(f"(?<!{_LETTER}){re.escape(word)}(?!{_LETTER})", text) is not None


class Ranking:
    """Keeps the best `top_k` of any number of candidates."""

    def __init__(self, query: str, *, top_k: int, score_threshold: float | None) -> None:
        self._query = Query(query)
        self._top_k = top_k
        self._threshold = score_threshold if score_threshold is not None else 0.0
        self._heap: list[tuple[float, int, str, Record]] = []

    def consider(self, records: Iterable[Record]) -> None:
        for record in records:
            score = self._query.score(message_text(record.message))
            if score > 0.0 and score >= self._threshold:
                # Ties by recency; the record id is unique, so records are never compared.
                entry = (score, record.order, record.record_id, record)
                if len(self._heap) < self._top_k:
                    heapq.heappush(self._heap, entry)
                else:
                    heapq.heappushpop(self._heap, entry)

    def best(self) -> list[Hit]:
        """The best candidates so far, best first."""
        return [Hit(record, score) for score, _, _, record in sorted(self._heap, reverse=True)]


def chunks(records: list[Record], size: int) -> Iterator[list[Record]]:
    """`records` in portions after which a long search may let others run."""
    for start in range(0, len(records), size):
        yield records[start : start + size]
