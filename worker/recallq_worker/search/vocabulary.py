"""The words that occur, for those who look for a part of one.

A vocabulary is a text of tokens, one a line. So are the remembered texts of messages, but for
punctuation: their lines are chunks, which may hold several tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from recallq_worker.search.text import Kind, Token, chunks

_LONGEST = 200
"""Characters of a token that somebody may remember a part of."""
_LOOKED_AT = 10
"""Occurrences that are looked at for each that is wanted."""


def tokens_in(texts: Iterable[str]) -> set[str]:
    """The tokens that a part of a word may be looked for in; of folded texts, one chunk a line."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text.split("\n"))
    seen.discard("")
    found: set[str] = set()
    for chunk in seen:
        found.update(chunks[chunk].words)
    return {token for token in found if len(token) <= _LONGEST}


def still_in_use(tokens: Iterable[str], terms: Collection[int]) -> set[str]:
    """Those of the tokens whose terms occur."""
    return {
        token
        for token in tokens
        if any(each.text == token and each.term in terms for each in chunks[token].tokens)
    }


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
        for token in chunks[line].tokens
        if part in token.text and token.kind is not Kind.STOP_WORD
    }
    ranked = sorted(found, key=lambda each: (not each.text.startswith(part), len(each.text), each))
    return ranked[:most]
