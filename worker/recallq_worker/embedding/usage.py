"""What embedding costs, as counted in one process since its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EmbeddingUsage:
    """What one model was asked for."""

    model: str
    texts: int
    """That callers brought."""
    cache_hits: int
    """Of these, found in memory."""
    shared_hits: int
    """Of these, found in Redis."""
    joined: int
    """Of these, the same as one that was on its way."""
    requests: int
    """To the provider, those that failed too."""
    failed_requests: int
    tokens_used: int
    """As the provider counts them; 0 where it does not say."""


class UsageCounter:
    """Counts as it goes."""

    __slots__ = (
        "cache_hits",
        "failed_requests",
        "joined",
        "requests",
        "shared_hits",
        "texts",
        "tokens_used",
    )

    def __init__(self) -> None:
        self.texts = self.cache_hits = self.shared_hits = self.joined = 0
        self.requests = self.failed_requests = self.tokens_used = 0

    def snapshot(self, model: str) -> EmbeddingUsage:
        return EmbeddingUsage(model, **{name: getattr(self, name) for name in self.__slots__})
