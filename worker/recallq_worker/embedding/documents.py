"""The vectors of stored texts and of queries, for backends that keep vectors themselves.

Texts that are longer than the model takes count by their beginning, and a text that it refuses
fails for itself: what a batch of jobs brings together does not fail together.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from recallq.errors import BackendError, JobError
from recallq_worker.embedding.base import Kind, Vector
from recallq_worker.embedding.batcher import EmbeddingBatcher
from recallq_worker.embedding.factory import make_batcher
from recallq_worker.embedding.texts import beginning
from recallq_worker.embedding.usage import EmbeddingUsage
from recallq_worker.models import ModelSettings

_BYTES_A_TOKEN = 3
"""Of UTF-8, or more: of English text it is four, of Chinese about three."""
_MOST_TOKENS = 8192
_FEW_TOKENS = 2048
_TAKES_FEW = re.compile(r"text-embedding-v[12]\b")


def make_document_embedder(store_url: str, namespace: str) -> DocumentEmbedder:
    """The embedding model that the environment names; see `ModelSettings`.

    Raises `ConfigurationError`.
    """
    return DocumentEmbedder(
        make_batcher(ModelSettings.load(), store_url=store_url, namespace=namespace)
    )


class DocumentEmbedder:
    """The embedding model behind one store. Belongs to the event loop that starts it."""

    def __init__(self, batcher: EmbeddingBatcher) -> None:
        self._batcher = batcher
        self.dimensions = batcher.embedder.dimensions
        self.model = batcher.embedder.model
        few = _TAKES_FEW.match(self.model)
        self._most_bytes = _BYTES_A_TOKEN * (_FEW_TOKENS if few else _MOST_TOKENS)

    async def start(self) -> None:
        """Raises `MissingExtra`, `ConfigurationError`."""
        await self._batcher.start()

    async def stop(self) -> None:
        await self._batcher.stop()

    async def of(self, texts: Sequence[str]) -> list[Vector | JobError]:
        """The vector of each text, or why it has none. Raises `BackendUnavailable`."""
        cut = [beginning(text, self._most_bytes) for text in texts]
        try:
            return [*await self._batcher.embed(cut)]
        except BackendError as error:
            if len(cut) == 1:
                return [error]
        # One of them is to blame, or all are: each has an answer of its own. What was embedded
        # before is not embedded again.
        each = await asyncio.gather(
            *(self._batcher.embed([text]) for text in cut), return_exceptions=True
        )
        told: list[Vector | JobError] = []
        for answer in each:
            if isinstance(answer, JobError):
                told.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                told.append(answer[0])
        return told

    async def of_query(self, text: str) -> Vector:
        """The vector to look for. Raises `BackendUnavailable`, `BackendError`."""
        (vector,) = await self._batcher.embed([beginning(text, self._most_bytes)], Kind.QUERY)
        return vector

    async def check(self) -> str:
        """Asks the model; says what it is, and what was embedded since the start.

        Raises `BackendUnavailable`, `BackendError`.
        """
        model, usage = await self._batcher.check(), self._batcher.usage()
        return (
            f"{model}; since its start this process embedded {usage.texts:,} texts in "
            f"{usage.requests:,} requests, {usage.tokens_used:,} tokens"
        )

    def usage(self) -> EmbeddingUsage:
        """What was embedded since the start."""
        return self._batcher.usage()
