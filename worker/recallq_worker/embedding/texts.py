"""Texts, before they are embedded."""

from __future__ import annotations

LONGEST = 18_000
"""Bytes of a text that every usual model takes: 6,000 to 8,000 tokens."""


def beginning(text: str, most_bytes: int = LONGEST) -> str:
    """As much of a text as takes so many bytes: what its vector is to be of."""
    if len(text) * 4 <= most_bytes:
        return text
    return text.encode(errors="replace")[:most_bytes].decode(errors="ignore")
