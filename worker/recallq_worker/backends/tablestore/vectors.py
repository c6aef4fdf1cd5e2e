"""The vectors of texts, as Tablestore takes them: what the backend asks of the embedding layer."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from typing import Self

import orjson

from recallq.errors import BackendError, ConfigurationError, JobError
from recallq_worker.backends.tablestore.settings import TablestoreSettings
from recallq_worker.embedding import EmbeddingBatcher, EmbeddingUsage, Kind, make_batcher
from recallq_worker.embedding.texts import beginning
from recallq_worker.models import ModelSettings
from recallq_worker.settings import WorkerSettings

_BYTES_A_TOKEN = 3
"""Of UTF-8, or more: of English text it is four, of Chinese about three."""
_MOST_TOKENS = 8192
_FEW_TOKENS = 2048
_TAKES_FEW = re.compile(r"text-embedding-v[12]\b")


class Vectors:
    """The embedding model behind one store."""

    def __init__(self, batcher: EmbeddingBatcher) -> None:
        self._batcher = batcher
        self.dimension = batcher.embedder.dimensions
        few = _TAKES_FEW.match(batcher.embedder.model)
        self._most_bytes = _BYTES_A_TOKEN * (_FEW_TOKENS if few else _MOST_TOKENS)

    @classmethod
    def from_settings(cls, worker: WorkerSettings, own: TablestoreSettings) -> Self:
        """Raises `ConfigurationError`, `MissingExtra`."""
        models = ModelSettings.load()
        if own.vector_dimension is not None and models.embedding_dimensions is None:
            models = ModelSettings.load(embedding_dimensions=own.vector_dimension)
        chosen = (
            models.embedding_provider,
            models.embedding_base_url,
            models.embedding_model,
            models.embedding_callable,
        )
        if not any(chosen) and os.environ.get("DASHSCOPE_API_KEY"):
            # As agentscope-runtime had it, whatever other keys there are.
            models = models.model_copy(update={"embedding_provider": "dashscope"})
        vectors = cls(make_batcher(models, store_url=worker.store_url, namespace=worker.namespace))
        if own.vector_dimension not in (None, vectors.dimension):
            raise ConfigurationError(
                f"RECALLQ_TABLESTORE_VECTOR_DIMENSION is {own.vector_dimension} and the embedding "
                f"model gives {vectors.dimension} (RECALLQ_EMBEDDING_DIMENSIONS)"
            )
        return vectors

    async def start(self) -> None:
        await self._batcher.start()

    async def stop(self) -> None:
        await self._batcher.stop()

    async def of(self, texts: Sequence[str]) -> list[str | JobError]:
        """The vector of each text as Tablestore holds it, or why it has none.

        Of a text that is longer than the model takes, that of its beginning. Raises
        `BackendUnavailable`.
        """
        cut = [beginning(text, self._most_bytes) for text in texts]
        try:
            return [_stored(vector) for vector in await self._batcher.embed(cut)]
        except BackendError as error:
            if len(cut) == 1:
                return [error]
        # One of them is to blame, or all are: each has an answer of its own. What was embedded
        # before is not embedded again.
        each = await asyncio.gather(
            *(self._batcher.embed([text]) for text in cut), return_exceptions=True
        )
        told: list[str | JobError] = []
        for answer in each:
            if isinstance(answer, JobError):
                told.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                told.append(_stored(answer[0]))
        return told

    async def of_query(self, text: str) -> list[float]:
        """The vector to look for."""
        (vector,) = await self._batcher.embed([beginning(text, self._most_bytes)], Kind.QUERY)
        return [float(each) for each in vector]

    async def check(self) -> str:
        """Asks the model; says what it is. Raises `BackendUnavailable`, `BackendError`."""
        return await self._batcher.check()

    def usage(self) -> EmbeddingUsage:
        return self._batcher.usage()


def _stored(vector: object) -> str:
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY).decode()
