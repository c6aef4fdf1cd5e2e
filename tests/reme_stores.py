"""ReMe's own vector stores, for tests that drive them against real or loopback servers.

The library takes seconds to import and some megabytes of logs, so only those who ask for it get it.
Its stores want an embedding model of its class; `embedding_model` makes one of
`tests.loopback.text` that notes what it embeds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

from tests.loopback.text import embedding

StoreName = Literal["qdrant", "elasticsearch", "pgvector"]


def import_library() -> None:
    """Imports the library as workers do."""
    from recallq_worker.backends.reme.loading import import_reme

    import_reme("a test")


def embedding_model(dimensions: int = 64) -> Any:
    """A model of the library's class; ``.embedded`` are the texts it was given, in order."""
    import_library()
    from flowllm.core.embedding_model import BaseEmbeddingModel

    class WordsModel(BaseEmbeddingModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(model_name="words", dimensions=dimensions)
            self.embedded: list[str] = []

        async def _async_get_embeddings(self, input_text: str | list[str]) -> Any:
            if isinstance(input_text, str):
                self.embedded.append(input_text)
                return embedding(input_text, self.dimensions)
            self.embedded += input_text
            return [embedding(text, self.dimensions) for text in input_text]

    return WordsModel()


def node(
    unique_id: str, content: str, *, vector: list[float] | None = None, **metadata: Any
) -> Any:
    import_library()
    from flowllm.core.schema import VectorNode

    return VectorNode(unique_id=unique_id, content=content, vector=vector, metadata=metadata)


@asynccontextmanager
async def vector_store(
    name: StoreName, *, dimensions: int = 64, **options: Any
) -> AsyncIterator[Any]:
    """A store of the library; `options` are its own. Both of its clients are closed in the end."""
    import_library()
    from flowllm.core.context import C

    store = C.get_vector_store_class(name)(embedding_model=embedding_model(dimensions), **options)
    try:
        yield store
    finally:
        await store.async_close()
        store.close()  # the other client, which the library makes along with it


def ids(nodes: list[Any]) -> list[str]:
    return [each.unique_id for each in nodes]
