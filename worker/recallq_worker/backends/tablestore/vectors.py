"""The embedding model of the tablestore backend: how it is chosen."""

from __future__ import annotations

import os

import orjson

from recallq.errors import ConfigurationError
from recallq_worker.backends.tablestore.settings import TablestoreSettings
from recallq_worker.embedding import DocumentEmbedder, Vector, make_batcher
from recallq_worker.models import ModelSettings
from recallq_worker.settings import WorkerSettings


def embedder_from_settings(worker: WorkerSettings, own: TablestoreSettings) -> DocumentEmbedder:
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
    embedder = DocumentEmbedder(
        make_batcher(models, store_url=worker.store_url, namespace=worker.namespace)
    )
    if own.vector_dimension not in (None, embedder.dimensions):
        raise ConfigurationError(
            f"RECALLQ_TABLESTORE_VECTOR_DIMENSION is {own.vector_dimension} and the embedding "
            f"model gives {embedder.dimensions} (RECALLQ_EMBEDDING_DIMENSIONS)"
        )
    return embedder


def stored(vector: Vector) -> str:
    """A vector as Tablestore holds it."""
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY).decode()
