"""Texts to vectors: providers, and what makes few and safe requests of many callers' texts.

A backend makes one `EmbeddingBatcher` per process, with `make_batcher`, and asks nothing else.
"""

from recallq_worker.embedding.base import Embedded, Embedder, Kind, Refused, Throttled, Vector
from recallq_worker.embedding.batcher import EmbeddingBatcher
from recallq_worker.embedding.documents import DocumentEmbedder, make_document_embedder
from recallq_worker.embedding.factory import make_batcher, make_embedder
from recallq_worker.embedding.usage import EmbeddingUsage

__all__ = [
    "DocumentEmbedder",
    "Embedded",
    "Embedder",
    "EmbeddingBatcher",
    "EmbeddingUsage",
    "Kind",
    "Refused",
    "Throttled",
    "Vector",
    "make_batcher",
    "make_document_embedder",
    "make_embedder",
]
