"""How a text is cut into words for the keyword search.

Words are what stands between spaces and punctuation, in whatever script, with case and Unicode
forms evened out. Chinese, Japanese and Korean, written without spaces or nearly so, give every
character and every pair of neighbours: a pair is rarer, so a match of it counts for more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from recallq_worker.search.text import fold

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_PIECE = re.compile(f"([{_CJK}]+)|[^\\W{_CJK}]+")


def words_of(text: str) -> Iterator[str]:
    """The words of `text`, each as often as it occurs."""
    for piece in _PIECE.finditer(fold(text)):
        run = piece[0]
        if piece[1] is None:
            yield run
            continue
        yield from run
        for start in range(len(run) - 1):
            yield run[start : start + 2]
