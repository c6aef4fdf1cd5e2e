"""What embedding costs, as counted in one process since its start."""

from __future__ import annotations

from dataclasses import dataclass

from recallq_worker.model_usage import EMBEDDING_USAGE


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
    """To the provider that have come to their end, those that failed too."""
    failed_requests: int
    tokens_used: int
    """As the provider counts them; 0 where it does not say."""


class UsageCounter:
    """Counts as it goes, for its model and for the process."""

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

    def ended(self, tokens: int | None) -> None:
        """A request has come to its end; `tokens` is None if it failed."""
        self.requests += 1
        if tokens is None:
            self.failed_requests += 1
        else:
            self.tokens_used += tokens
            EMBEDDING_USAGE.spent(tokens)
        EMBEDDING_USAGE.ended(failed=tokens is None)

    def snapshot(self, model: str) -> EmbeddingUsage:
        return EmbeddingUsage(model, **{name: getattr(self, name) for name in self.__slots__})
