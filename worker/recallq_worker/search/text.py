"""A text into tokens, in any script; a query is cut in the same way.

A text is cut at white space into chunks. What comes of a chunk depends on nothing else, so it is
remembered: people repeat their words.

- A word is a run of letters and digits, with case, compatibility forms and Latin accents evened
  out.
- A chunk that holds more than a word - an order number, an address, a URL, a snake_case name - is a
  token as a whole, besides its words. Apostrophes make no such whole.
- Scripts that are written without spaces, or nearly so, are cut into pairs of neighbouring
  characters; a lone one stands for itself.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple
from zlib import crc32

import numpy as np
import regex

from recallq_worker.search.english import STOP_WORDS, stem

_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\u3005\u30fc"
)
_RUN = regex.compile(f"[{_UNSPACED}]+")
_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{M}\p{N}]*")
_ASCII_WORD = re.compile("[a-z0-9]+")
_INSIDE = regex.compile(r"[\p{L}\p{N}](?:.*[\p{L}\p{M}\p{N}])?", regex.DOTALL)
"""A chunk without the punctuation around it."""
_LATIN_ACCENTS = regex.compile(r"(?<=\p{Latin})\p{Mn}+")
_UNSEEN = "\u00ad\u200b\u200c\u200d\u2060\ufeff" + "".join(map(chr, range(0xFE00, 0xFE10)))
"""Soft hyphens, joiners and selectors of variants."""
_EVENED_OUT = str.maketrans("\u2019\u02bc\uff07", "'''", _UNSEEN)

_LONGEST_CHUNK = 2_000
"""Characters; longer ones are looked at in parts: texts without spaces, or encoded files."""
_MOST_OF_A_CHUNK = 200_000
_LONGEST_WHOLE = 200
_LONGEST_REMEMBERED = 32
"""Characters."""
_DIGIT = regex.compile(r"\d")
_PUNCTUATION = string.punctuation + "".join(map(chr, (*range(32), 127)))
"""All of ASCII that is no letter or digit."""
_MOST_REMEMBERED = 50_000


class Kind(IntEnum):
    """What sort of token it is."""

    WORD = 0
    STOP_WORD = 1
    """Counts only in queries that have nothing else."""
    WHOLE = 2
    """A chunk as it stood, besides its words."""
    PAIR = 3
    """Of characters of a script without spaces; or a lone one."""


class Token(NamedTuple):
    text: str
    """Folded, not stemmed: what a part of a word is looked for in."""
    term: int
    """What is indexed: 32 bits of what all forms of the word share."""
    kind: Kind


def fold(text: str) -> str:
    """`text` with case, compatibility forms and Latin accents evened out, and without characters
    that nobody sees."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_EVENED_OUT)
    folded = _LATIN_ACCENTS.sub("", unicodedata.normalize("NFD", folded))
    return unicodedata.normalize("NFC", folded)


class _Chunks(dict[str, tuple[Token, ...]]):
    """Chunks that were cut before, as far as they are remembered."""

    def __missing__(self, chunk: str) -> tuple[Token, ...]:
        found = tuple(
            token
            for start in range(0, min(len(chunk), _MOST_OF_A_CHUNK), _LONGEST_CHUNK)
            # The last of a part may make a pair with the first of the next.
            for token in _tokens_of(chunk[start : start + _LONGEST_CHUNK + 1])
        )
        if _comes_again(chunk):
            if len(self) >= _MOST_REMEMBERED:
                self.clear()  # what people say often is soon known again
            self[chunk] = found
        return found


def _comes_again(chunk: str) -> bool:
    """Whether to remember it: numbers are mostly new, and so is what is long."""
    return len(chunk) <= _LONGEST_REMEMBERED and _DIGIT.search(chunk) is None


chunks = _Chunks()
"""The tokens of a chunk of folded text, of which ``text.split()`` makes a list."""

COUNTS = 1 << 32
"""Added to a term's code where it counts for the length of a text."""
TERM = np.uint64(COUNTS - 1)
"""What of a code is the term."""
CODE_BYTES = 8


class _Codes(dict[str, bytes]):
    """The same chunks, as far as is needed to count terms."""

    def __missing__(self, chunk: str) -> bytes:
        word = chunk.strip(_PUNCTUATION) if len(chunk) <= _LONGEST_CHUNK else ""
        if word.isalnum() and word.isascii():
            code = _code(term_of(word), counts=word not in STOP_WORDS)
        else:
            code = b"".join(
                [
                    _code(token.term, counts=token.kind in (Kind.WORD, Kind.PAIR))
                    for token in chunks[chunk]
                ]
            )
        if _comes_again(chunk):
            if len(self) >= _MOST_REMEMBERED:
                self.clear()
            self[chunk] = code
        return code


def _code(term: int, *, counts: bool) -> bytes:
    return (term + COUNTS if counts else term).to_bytes(CODE_BYTES, "little")


codes = _Codes()
"""Of a chunk the codes of its terms, one after the other, as numbers of 64 bits (little-endian);
see `COUNTS`. They are looked up for every word that is stored."""


def tokens(text: str) -> Iterator[Token]:
    """The tokens of `text`, in order and each as often as it occurs."""
    for chunk in fold(text).split():
        yield from chunks[chunk]


def term_of(word: str) -> int:
    """The term of a folded word."""
    return crc32((word if word.isdigit() else stem(word)).encode(errors="replace"))


def _tokens_of(chunk: str) -> tuple[Token, ...]:
    if chunk.isascii():
        whole = chunk.strip(_PUNCTUATION)
        return tuple(_pieces(whole, _ASCII_WORD.findall(whole)))
    found: list[Token] = []
    end = 0
    for run in _RUN.finditer(chunk):
        found += _inside(chunk[end : run.start()])
        found += _pairs(run[0])
        end = run.end()
    return (*found, *_inside(chunk[end:]))


def _inside(chunk: str) -> Iterator[Token]:
    found = _INSIDE.search(chunk)
    return iter(()) if found is None else _pieces(found[0], _WORD.findall(found[0]))


def _pieces(whole: str, words: list[str]) -> Iterator[Token]:
    """The words of a chunk without the punctuation around it, and that as a whole."""
    for word in words:
        kind = Kind.STOP_WORD if word in STOP_WORDS else Kind.WORD
        yield Token(word, term_of(word), kind)
    if len(words) > 1 and len(whole) <= _LONGEST_WHOLE and whole.replace("'", "") != "".join(words):
        yield Token(whole, crc32(whole.encode(errors="replace")), Kind.WHOLE)


def _pairs(run: str) -> Iterator[Token]:
    for start in range(max(len(run) - 1, 1)):
        pair = run[start : start + 2]
        yield Token(pair, crc32(pair.encode()), Kind.PAIR)
