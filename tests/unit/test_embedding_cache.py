"""Vectors that are kept: in memory, within bounds, and in a real Redis, if it is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from recallq.embedded import EmbeddedRedis
from recallq.errors import ConfigurationError
from recallq_worker.embedding import EmbeddingBatcher, Kind, make_batcher
from recallq_worker.embedding.cache import Digests, VectorCache
from recallq_worker.embedding.shared_cache import SharedCache
from recallq_worker.models import ModelSettings
from tests.conftest import no_blocking
from tests.fake_embedder import DIMENSIONS, FakeEmbedder, vector_of

ENTRY = DIMENSIONS * 4 + 300


# --- in memory ------------------------------------------------------------------------------------


def test_what_was_not_used_for_the_longest_goes_first() -> None:
    cache = VectorCache(3 * ENTRY)
    for name in ("a", "b", "c"):
        cache.put(name.encode(), vector_of(name))
    assert cache.get(b"a") is not None
    cache.put(b"d", vector_of("d"))
    assert cache.get(b"b") is None
    assert len(cache) == 3
    assert cache.size == 3 * ENTRY
    np.testing.assert_array_equal(cache.get(b"d"), vector_of("d"))
    cache.clear()
    assert (len(cache), cache.size) == (0, 0)


@given(
    st.lists(st.tuples(st.sampled_from(["put", "get", "old"]), st.integers(0, 9)), max_size=60),
    st.integers(0, 5),
)
def test_it_never_holds_more_than_it_may(steps: list[tuple[str, int]], room: int) -> None:
    now = [0.0]
    cache = VectorCache(room * ENTRY, lifetime=10.0, clock=lambda: now[0])
    for what, number in steps:
        key = bytes([number])
        if what == "put":
            cache.put(key, vector_of(str(number)))
            assert (key in cache) == (room > 0)
        elif what == "get":
            found = cache.get(key)
            if found is not None:
                np.testing.assert_array_equal(found, vector_of(str(number)))
        else:
            now[0] += number
            cache.expire()
        assert len(cache) <= room
        assert cache.size == len(cache) * ENTRY
    now[0] += 10
    cache.expire()
    assert len(cache) == 0


def test_entries_have_a_lifetime() -> None:
    now = [0.0]
    cache = VectorCache(1e6, lifetime=10.0, clock=lambda: now[0])
    cache.put(b"a", vector_of("a"))
    now[0] = 9.9
    assert cache.get(b"a") is not None
    now[0] = 10.0
    assert cache.get(b"a") is None
    assert cache.size == 0


def test_a_digest_tells_models_dimensions_kinds_and_texts_apart() -> None:
    found = {
        Digests(model, dimensions, kind).of(text)
        for model in ("a", "ab")
        for dimensions in (1, 11)
        for kind in Kind
        for text in (b"", b"1", b"text")
    }
    assert len(found) == 24
    assert all(len(digest) == 16 for digest in found)


# --- in Redis -------------------------------------------------------------------------------------


@asynccontextmanager
async def batching(
    url: str, namespace: str, *, ttl: int = 60, **options: Any
) -> AsyncIterator[tuple[EmbeddingBatcher, FakeEmbedder]]:
    embedder = FakeEmbedder(latency=0.001, account=namespace)
    shared = SharedCache(url, namespace=namespace, dimensions=DIMENSIONS, ttl=ttl)
    batcher = EmbeddingBatcher(embedder, shared_cache=shared, **options)
    with no_blocking():
        await batcher.start()
        try:
            yield batcher, embedder
        finally:
            await batcher.stop()


async def test_another_worker_finds_what_one_has_embedded(redis_url: str, namespace: str) -> None:
    texts = [f"text {number}" for number in range(25)]
    async with batching(redis_url, namespace, ttl=100) as (batcher, _):
        await batcher.embed(texts)
        assert batcher.usage().shared_hits == 0
    async with batching(redis_url, namespace) as (batcher, embedder):
        found = await batcher.embed([*texts, "new"])
        for vector, text in zip(found, [*texts, "new"], strict=True):
            assert vector.dtype == np.float32
            np.testing.assert_array_equal(vector, vector_of(text))
        assert not found[0].flags.writeable
        assert embedder.sent == ["new"]
        assert batcher.usage().shared_hits == 25
        # From then on it is in memory, and a query is no document.
        await batcher.embed(texts)
        assert batcher.usage().cache_hits == 25
        await batcher.embed(["text 1"], Kind.QUERY)
        assert embedder.sent == ["new", "text 1"]
    with redis.Redis.from_url(redis_url) as client:
        keys = client.keys(f"{namespace}:*")
        assert len(keys) == 27
        assert all(key.startswith(f"{namespace}:embedding:".encode()) for key in keys)
        assert b"text" not in b"".join(keys)
        assert all(0 < client.ttl(key) <= 100 for key in keys)
        assert all(len(client.get(key) or b"") == DIMENSIONS * 4 for key in keys)


async def test_what_is_damaged_is_embedded_again(redis_url: str, namespace: str) -> None:
    async with batching(redis_url, namespace) as (batcher, _):
        await batcher.embed(["a", "b", "c", "d"])
    with redis.Redis.from_url(redis_url) as client:
        first, second, third, *_ = client.keys(f"{namespace}:*")
        client.set(first, b"short")
        client.set(second, np.full(DIMENSIONS, np.nan, dtype=np.float32).tobytes())
        client.delete(third)
    async with batching(redis_url, namespace) as (batcher, embedder):
        await batcher.embed(["a", "b", "c", "d"])
        assert len(embedder.sent) == 3


async def test_a_redis_that_has_gone_costs_neither_errors_nor_time(
    namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "recallq_worker")
    with EmbeddedRedis() as server:
        async with batching(server.url, namespace) as (batcher, embedder):
            await batcher.embed(["one"])
            await asyncio.to_thread(server.stop)
            loop = asyncio.get_running_loop()
            began = loop.time()
            for number in range(50):
                await batcher.embed([f"text {number}"])
            # Asked once, or twice, not fifty times.
            assert loop.time() - began < 50 * 0.02 + 2
            assert len(embedder.sent) == 51
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "the Redis that keeps embeddings does not answer" in told[0]


async def test_a_redis_that_hangs_costs_little_time(namespace: str) -> None:
    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(silence, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    async with server, batching(f"redis://127.0.0.1:{port}/0", namespace) as (batcher, embedder):
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(batcher.embed([f"text {number}"]) for number in range(50)))
        assert loop.time() - began < 2
        assert len(embedder.sent) == 50


async def test_who_is_cancelled_while_redis_is_asked(redis_url: str, namespace: str) -> None:
    async with batching(redis_url, namespace) as (batcher, embedder):
        for turns in range(12):
            call = asyncio.create_task(batcher.embed([f"text {turns}"]))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        await asyncio.sleep(0.1)
        assert batcher._items == {}
        texts = [f"text {turns}" for turns in range(12)]
        for vector, text in zip(await batcher.embed(texts), texts, strict=True):
            np.testing.assert_array_equal(vector, vector_of(text))
        assert embedder.in_flight == 0


async def test_a_stop_while_redis_is_asked(redis_url: str, namespace: str) -> None:
    async with batching(redis_url, namespace) as (batcher, _):
        calls = [asyncio.create_task(batcher.embed([f"text {n}"] * 300)) for n in range(20)]
        await asyncio.sleep(0)
        await batcher.stop()
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
        assert all(isinstance(each, Exception) for each in outcomes)


def test_the_shared_cache_is_off_unless_it_is_asked_for(redis_url: str) -> None:
    settings = {"embedding_api_key": "k", "embedding_provider": "openai"}
    assert make_batcher(ModelSettings.load(**settings), store_url=redis_url)._shared is None
    settings["embedding_cache_ttl"] = "3600"
    assert make_batcher(ModelSettings.load(**settings), store_url=redis_url)._shared is not None
    with pytest.raises(ConfigurationError, match="RECALLQ_EMBEDDING_CACHE_TTL needs a Redis"):
        make_batcher(ModelSettings.load(**settings))
