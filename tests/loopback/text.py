"""Texts as vectors, without a model: texts that share words are similar, the same ones are equal.

A vector is a bag of words, hashed into its dimensions with CRC-32, which is the same in every
process, and brought to length one. Words are what lies between spaces and punctuation, in lower
case; Chinese, Japanese and Korean, which have no spaces, count by pairs of characters.
"""

from __future__ import annotations

import math
import re
import zlib

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_PIECES = re.compile(rf"[{_CJK}]+|[^\W{_CJK}]+")
_IS_CJK = re.compile(rf"[{_CJK}]")


def words(text: str) -> list[str]:
    found: list[str] = []
    for piece in _PIECES.findall(text.lower()):
        if _IS_CJK.match(piece) and len(piece) > 1:
            found += [piece[at : at + 2] for at in range(len(piece) - 1)]
        else:
            found.append(piece)
    return found


def embedding(text: str, dimensions: int) -> list[float]:
    """The vector of `text`; a text without words, such as "?!", counts as one word."""
    vector = [0.0] * dimensions
    for word in words(text) or [text]:
        vector[zlib.crc32(word.encode()) % dimensions] += 1.0
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector]


def similarity(one: str, other: str) -> float:
    """From 0, no word in common, to 1."""
    first, second = embedding(one, 4096), embedding(other, 4096)
    return sum(a * b for a, b in zip(first, second, strict=True) if a and b)


def tokens(text: str) -> int:
    """Roughly how many tokens a model would make of it: four bytes each, and one at least."""
    return max(1, -(-len(text.encode()) // 4))
