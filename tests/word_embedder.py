"""The model of `tests.plugins.word_vectors`, as a store's embedder."""

from __future__ import annotations

from collections.abc import Sequence

from recallq_worker.embedding import DocumentEmbedder, Embedded, EmbeddingBatcher, Kind
from tests.plugins.word_vectors import DIMENSIONS, vector_of


class WordEmbedder:
    """A `recallq_worker.embedding.Embedder`, which remembers what it was asked."""

    most_texts = 100
    most_request_tokens: int | None = None
    most_at_once: int | None = None

    def __init__(self) -> None:
        self.model = "words"
        self.account = "words"
        self.dimensions = DIMENSIONS
        self.texts: list[str] = []
        self.error: Exception | None = None
        """What every request ends with."""

    async def start(self) -> None:
        """Nothing to load."""

    async def stop(self) -> None:
        """Nothing to close."""

    async def embed(self, texts: Sequence[str], kind: Kind) -> Embedded:
        if self.error is not None:
            raise self.error
        self.texts += texts
        return Embedded([vector_of(text) for text in texts], len(texts))


def word_search() -> tuple[WordEmbedder, DocumentEmbedder]:
    """A model, and the embedder of a store that asks it."""
    model = WordEmbedder()
    return model, DocumentEmbedder(EmbeddingBatcher(model, linger=0.001, cache_bytes=0))
