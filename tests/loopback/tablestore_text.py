"""Texts in a search index: how they become words, and how well words fit.

``single_word`` is as documented: each Chinese character, and what else lies between spaces and
punctuation, in lower case. ``max_word`` needs the service's dictionary; instead, a text counts with
its Chinese characters and all pairs of neighbours, and a query with the pairs only, or with a
character that stands alone. On the examples in the tests of the official SDK this finds the same,
but for queries that want all words: pairs across two words are wanted too. ``min_word`` is taken
for the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tablestore.protobuf import search_pb2 as pb

from tests.loopback.tablestore_errors import invalid

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_PIECES = re.compile(rf"[{_CJK}]+|[^\W{_CJK}]+")
_SINGLE = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_IS_CJK = re.compile(rf"[{_CJK}]")
_PARTS = re.compile(r"[^\W\d]+|\d+")
_FUZZY_CHARACTERS = 1024


@dataclass(frozen=True)
class Analyzer:
    words: Callable[[str], list[str]]
    """Of a text that is indexed."""
    query: Callable[[str], list[str]]
    """Of a text that is looked for."""
    sequence: Callable[[str], list[str]]
    """What a phrase wants one after the other."""


def analyzer_of(field: Any) -> Analyzer:
    """That of a TEXT field's schema."""
    name = field.analyzer or "single_word"
    if name == "single_word":
        parameter = pb.SingleWordAnalyzerParameter.FromString(field.analyzer_parameter)
        single = _single_word(
            case_sensitive=parameter.case_sensitive, delimit_word=parameter.delimit_word
        )
        return Analyzer(single, single, single)
    if name in ("max_word", "min_word"):
        single = _single_word(case_sensitive=False, delimit_word=False)
        return Analyzer(_max_words, _max_query, single)
    if name == "split":
        delimiter = pb.SplitAnalyzerParameter.FromString(field.analyzer_parameter).delimiter

        def split(text: str) -> list[str]:
            return [each for each in text.split(delimiter or None) if each]

        return Analyzer(split, split, split)
    if name == "fuzzy":
        return Analyzer(_fuzzy_words, lambda text: [text.lower()], lambda text: list(text.lower()))
    raise invalid(f"unsupported analyzer: {name}")


def _single_word(*, case_sensitive: bool, delimit_word: bool) -> Callable[[str], list[str]]:
    def words(text: str) -> list[str]:
        found = _SINGLE.findall(text if case_sensitive else text.lower())
        if not delimit_word:
            return found
        return [part for word in found for part in _PARTS.findall(word)]

    return words


def _max_words(text: str) -> list[str]:
    found: list[str] = []
    for piece in _PIECES.findall(text.lower()):
        if _IS_CJK.match(piece):
            found += [*piece, *_pairs(piece)]
        else:
            found.append(piece)
    return found


def _max_query(text: str) -> list[str]:
    found: list[str] = []
    for piece in _PIECES.findall(text.lower()):
        found += (_pairs(piece) or [piece]) if _IS_CJK.match(piece) else [piece]
    return found


def _pairs(piece: str) -> list[str]:
    return [piece[at : at + 2] for at in range(len(piece) - 1)]


def _fuzzy_words(text: str) -> list[str]:
    text = text.lower()[:_FUZZY_CHARACTERS]
    return [text[at : at + size] for size in (1, 2, 3) for at in range(len(text) - size + 1)]


def has_phrase(sequence: tuple[str, ...], phrase: list[str], slop: int) -> bool:
    """Whether `phrase` occurs in order, with at most `slop` other words in it."""
    if not phrase:
        return False
    for start, word in enumerate(sequence):
        if word != phrase[0]:
            continue
        at, gaps = start, 0
        for wanted in phrase[1:]:
            window = sequence[at + 1 : at + 2 + slop - gaps]
            if wanted not in window:
                break
            skipped = window.index(wanted)
            at, gaps = at + 1 + skipped, gaps + skipped
        else:
            return True
    return False


_K1, _B = 1.2, 0.75


def bm25(frequency: int, length: int, average: float, holders: int, documents: int) -> float:
    """How well a document fits a word, by the formula of Lucene.

    Scores are documented as BM25; the parameters are the usual ones.
    """
    rarity = math.log(1 + (documents - holders + 0.5) / (holders + 0.5))
    weight = frequency + _K1 * (1 - _B + _B * length / (average or 1.0))
    return rarity * frequency * (_K1 + 1) / weight
