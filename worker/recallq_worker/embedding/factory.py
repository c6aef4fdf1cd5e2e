"""Embedders and batchers, as `recallq_worker.models` says."""

from __future__ import annotations

from recallq.errors import ConfigurationError
from recallq_worker.embedding.base import Embedder
from recallq_worker.embedding.batcher import EmbeddingBatcher
from recallq_worker.embedding.callables import CallableEmbedder
from recallq_worker.embedding.dashscope import DashScopeEmbedder
from recallq_worker.embedding.openai import OpenAIEmbedder
from recallq_worker.embedding.shared_cache import SharedCache
from recallq_worker.models import ModelSettings

_BATCH = 100
_COMPATIBLE_BATCH = 10
"""Texts that DashScope's models take at once, also by OpenAI's protocol."""
_AT_ONCE = 8


def make_embedder(settings: ModelSettings) -> Embedder:
    """The embedder that is set up; it connects to nothing and imports nothing before its start.

    Raises `ConfigurationError`, which says what is missing.
    """
    match settings.provider():
        case "callable":
            if settings.embedding_callable is None:
                raise ConfigurationError(
                    "RECALLQ_EMBEDDING_PROVIDER is callable: RECALLQ_EMBEDDING_CALLABLE must name "
                    "the function, as package.module:function"
                )
            return CallableEmbedder(
                settings.embedding_callable,
                model=settings.embedding_model,
                dimensions=settings.dimensions,
                most_texts=settings.embedding_batch or _BATCH,
                at_once=settings.embedding_concurrency,
            )
        case "dashscope":
            endpoint = settings.native_embedding()
            if endpoint.api_key is None:
                raise ConfigurationError(
                    "embedding with DashScope needs a key: set DASHSCOPE_API_KEY or "
                    "RECALLQ_EMBEDDING_API_KEY"
                )
            return DashScopeEmbedder(
                model=endpoint.model,
                base_url=_checked(endpoint.base_url),
                api_key=endpoint.api_key,
                dimensions=settings.dimensions,
                ask_for_dimensions=settings.embedding_dimensions is not None,
                most_texts=settings.embedding_batch,
                timeout=settings.embedding_timeout,
            )
        case "openai":
            endpoint = settings.embedding()
            if endpoint.api_key is None:
                raise ConfigurationError(
                    "embedding needs a key: set OPENAI_API_KEY, DASHSCOPE_API_KEY or "
                    "RECALLQ_EMBEDDING_API_KEY (with RECALLQ_EMBEDDING_BASE_URL for a server of "
                    "your own; a key it does not check may be any text)"
                )
            return OpenAIEmbedder(
                model=endpoint.model,
                base_url=_checked(endpoint.base_url),
                api_key=endpoint.api_key,
                dimensions=settings.dimensions,
                ask_for_dimensions=settings.embedding_dimensions is not None,
                own_environment=endpoint.is_openai,
                quota_renews=endpoint.is_dashscope,
                most_texts=settings.embedding_batch
                or (_COMPATIBLE_BATCH if endpoint.is_dashscope else _BATCH),
                timeout=settings.embedding_timeout,
            )


def _checked(base_url: str) -> str:
    if not base_url.startswith(("http://", "https://")):
        raise ConfigurationError(
            "RECALLQ_EMBEDDING_BASE_URL, or where else the base URL for embeddings is from, must "
            "begin with http:// or https://"
        )
    return base_url


def make_batcher(
    settings: ModelSettings, *, store_url: str | None = None, namespace: str = "recallq"
) -> EmbeddingBatcher:
    """The batcher that is set up, of which a process needs one.

    `store_url` is the Redis of the shared cache, where that is wanted, and `namespace` how its keys
    begin. Raises `ConfigurationError`.
    """
    embedder = make_embedder(settings)
    shared = None
    if settings.embedding_cache_ttl is not None:
        if store_url is None:
            raise ConfigurationError("RECALLQ_EMBEDDING_CACHE_TTL needs a Redis to keep vectors in")
        shared = SharedCache(
            store_url,
            namespace=namespace,
            dimensions=embedder.dimensions,
            ttl=settings.embedding_cache_ttl,
        )
    return EmbeddingBatcher(
        embedder,
        linger=settings.embedding_linger,
        at_once=settings.embedding_concurrency or _AT_ONCE,
        timeout=settings.embedding_timeout,
        patience=settings.embedding_patience,
        rpm=settings.embedding_rpm,
        tpm=settings.embedding_tpm,
        cache_bytes=settings.embedding_cache_mb * 1e6,
        shared_cache=shared,
    )
