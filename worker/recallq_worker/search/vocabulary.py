"""The words that occur, for those who look for a part of one.

A vocabulary is a text of tokens, one a line. So are the remembered texts of messages, but for
punctuation: their lines are chunks, which may hold several tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from recallq_worker.search.english import stem
from recallq_worker.search.text import Kind, Token, chunks

_LONGEST = 200
"""Characters of a token that somebody may remember a part of."""
_LOOKED_AT = 4
"""Occurrences that are looked at for each that is wanted."""


def tokens_in(texts: Iterable[str]) -> set[str]:
    """The tokens that a part of a word may be looked for in; of folded texts, one chunk a line."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text.split("\n"))
    seen.discard("")
    return {
        token.text
        for chunk in seen
        for token in chunks[chunk]
        if token.kind is not Kind.STOP_WORD and len(token.text) <= _LONGEST
    }


def still_in_use(
    tokens: Iterable[str], terms: Collection[int], removed: Collection[int]
) -> set[str]:
    """What of the tokens is left when messages are removed, with the terms that are left and those
    of the removed.

    Of several forms of a word that others still say, nobody knows whose they were; what they share
    takes their place, or the shortest where that is no word.
    """
    forms: dict[int, list[Token]] = {}
    for text in tokens:
        for token in chunks[text]:
            if token.text == text and token.term in terms:
                forms.setdefault(token.term, []).append(token)
    return {
        text
        for term, same in forms.items()
        for text in (
            [_shared(term, same)] if term in removed and len(same) > 1 else [t.text for t in same]
        )
    }


def _shared(term: int, forms: Sequence[Token]) -> str:
    shortest = min((token.text for token in forms), key=lambda text: (len(text), text))
    shared = stem(shortest)
    found = chunks[shared]
    same = len(found) == 1 and found[0].term == term and found[0].kind is not Kind.STOP_WORD
    return shared if same else shortest


def with_part(vocabularies: Iterable[str], part: str, most: int) -> list[Token]:
    """Tokens that hold a part of a word: those that begin with it first, the shorter first."""
    lines: set[str] = set()
    for vocabulary in vocabularies:
        limit = len(lines) + _LOOKED_AT * most
        at = vocabulary.find(part)
        while at >= 0 and len(lines) < limit:
            begin = vocabulary.rfind("\n", 0, at) + 1
            end = vocabulary.find("\n", at)
            end = len(vocabulary) if end < 0 else end
            lines.add(vocabulary[begin:end])
            at = vocabulary.find(part, end)
    found = {
        token
        for line in lines
        for token in chunks[line]
        if part in token.text and token.kind is not Kind.STOP_WORD
    }
    ranked = sorted(found, key=lambda each: (not each.text.startswith(part), len(each.text), each))
    return ranked[:most]
