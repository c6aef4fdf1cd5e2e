"""The redis backend, searched by meaning: vectors come in the second step, and go with records."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

import pytest

from recallq.contract import Scope
from recallq.errors import BackendUnavailable, ConfigurationError
from recallq_worker.backends.base import Record
from recallq_worker.backends.redis import RedisStore
from recallq_worker.backends.redis import store as store_module
from recallq_worker.backends.redis.store import Embeddings
from recallq_worker.backends.redis.vector_rows import RedisVectorRows
from recallq_worker.embedding import Embedded, Kind
from recallq_worker.embedding.base import Refused
from recallq_worker.reindexing import reindex
from recallq_worker.search import semantic, upkeep
from recallq_worker.search.semantic import SemanticSearch
from recallq_worker.settings import WorkerSettings
from tests.contract.store_conformance import StoreConformance, record
from tests.plugins.word_vectors import DIMENSIONS
from tests.support import redis_at
from tests.word_embedder import WordEmbedder, word_search

Strategy = Literal["vector", "hybrid"]


@asynccontextmanager
async def opened(
    redis_url: str,
    namespace: str,
    strategy: Strategy = "hybrid",
    dimensions: int = DIMENSIONS,
    **options: Any,
) -> AsyncIterator[tuple[RedisStore, WordEmbedder]]:
    model, embedder = word_search()
    embedder.dimensions = dimensions
    rows = RedisVectorRows(
        redis_url,
        namespace=namespace,
        dimensions=dimensions,
        ttl=options.get("ttl"),
        connect_timeout=5,
    )
    store = RedisStore(
        redis_url,
        namespace=namespace,
        semantic=SemanticSearch(embedder, rows, strategy),
        **options,
    )
    try:
        await store.start()
        yield store, model
    finally:
        await store.stop()


async def found(store: RedisStore, user: str, query: str, top_k: int = 100) -> list[str]:
    hits = await store.search(Scope("default", user), query, top_k=top_k, score_threshold=None)
    return [hit.record.record_id for hit in hits]


async def vector_keys(redis_url: str, namespace: str) -> list[str]:
    """Keys that hold rows; what else there is are fences and notes."""
    async with redis_at(redis_url) as redis:
        keys = [key.decode() async for key in redis.scan_iter(f"{namespace}:meaning:*")]
    return [key for key in keys if key.endswith((":r", ":v", ":o", ":c", ":n"))]


async def vectors_of(redis_url: str, namespace: str) -> set[str]:
    """Ids of all that has a vector."""
    async with redis_at(redis_url) as redis:
        ids: set[str] = set()
        for key in await vector_keys(redis_url, namespace):
            if key.endswith(":v"):
                ids.update(each.decode() for each in await redis.hkeys(key))  # type: ignore[union-attr]  # bytes
        return ids


def _of_now(text: str, session: str) -> Record:
    """An add of ann's that has its time to live before it."""
    return replace(record("ann", text, session=session), order=time.time_ns() // 1000)


class TestHybrid(StoreConformance):
    @asynccontextmanager
    async def open_store(self, redis_url: str, namespace: str) -> AsyncIterator[RedisStore]:
        async with opened(redis_url, namespace) as (store, _):
            yield store


class TestVector(StoreConformance):
    @asynccontextmanager
    async def open_store(self, redis_url: str, namespace: str) -> AsyncIterator[RedisStore]:
        async with opened(redis_url, namespace, "vector") as (store, _):
            yield store


class TestMeaning:
    async def test_is_found_by_words_at_once_and_by_meaning_later(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace) as (store, _):
            dog = record(user, "the dog sleeps", record_id="dog")
            await store.add([dog, record(user, "bread for breakfast", record_id="bread")])
            assert await found(store, user, "dog") == ["dog"]
            assert await found(store, user, "hound") == []
            assert await store.index([dog], patience=5) == [None]
            assert await found(store, user, "hound") == ["dog"]

    async def test_words_and_meaning_add_up(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace) as (store, _):
            both = [
                record(user, "a hound at the ocean", record_id="meaning"),
                record(user, "a dog at the sea", record_id="both"),
                record(user, "of a dog nothing is known here at all", record_id="less"),
            ]
            await store.add(both)
            await store.index(both, patience=5)
            assert (await found(store, user, "dog sea"))[0] == "both"
            assert set(await found(store, user, "dog sea")) == {"both", "meaning", "less"}

    async def test_another_worker_sees_what_one_has_embedded(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with (
            opened(redis_url, namespace, "vector") as (one, _),
            opened(redis_url, namespace, "vector") as (two, model),
        ):
            dog = record(user, "dog", record_id="dog")
            await one.add([dog])
            await one.index([dog], patience=5)
            assert await found(two, user, "hound") == ["dog"]
            await two.index([dog], patience=5)
            assert model.texts == ["hound"], "the message is not embedded again"

    async def test_who_speaks_is_part_of_what_is_embedded(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace, "vector") as (store, model):
            said = record(user, message={"role": "user", "name": "Ann", "content": "hello"})
            nothing = record(user, message={"role": "user", "name": "Ann", "content": None})
            await store.add([said, nothing])
            assert await store.index([said, nothing], patience=5) == [None, None]
            assert model.texts == ["Ann: hello"]

    async def test_while_the_model_is_away_words_find_it(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace) as (store, model):
            dog = record(user, "dog", record_id="dog")
            await store.add([dog])
            await store.index([dog], patience=5)
            model.error = BackendUnavailable("down")
            assert await found(store, user, "dog") == ["dog"]
            await store.add([cat := record(user, "cat")])
            with pytest.raises(BackendUnavailable):
                await store.index([cat], patience=5)

    async def test_by_meaning_alone_there_is_no_search_without_the_model(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace, "vector") as (store, model):
            await store.add([record(user, "dog")])
            model.error = BackendUnavailable("down")
            with pytest.raises(BackendUnavailable):
                await found(store, user, "dog")
            assert not (await store.health()).ok


class TestGoing:
    async def test_vectors_go_with_a_delete_and_late_ones_stay_away(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace) as (store, _):
            records = [record(user, f"dog {n}", session=f"s{n % 2}") for n in range(10)]
            await store.add(records)
            await store.index(records[:8], patience=5)
            await store.delete(Scope("default", user, "s1"), before_epoch=1)
            kept = {each.record_id for each in records[:8:2]}
            assert await vectors_of(redis_url, namespace) == kept
            await store.index(records, patience=5)
            assert await vectors_of(redis_url, namespace) == {
                each.record_id for each in records[::2]
            }
            await store.delete(Scope("default", user), before_epoch=2)
            await store.index(records, patience=5)
            assert await vector_keys(redis_url, namespace) == []

    async def test_what_is_deleted_while_it_is_embedded_gets_no_vector(
        self, redis_url: str, namespace: str, user: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with opened(redis_url, namespace) as (store, model):
            doomed = record(user, "dog")
            await store.add([doomed])
            embed = model.embed

            async def embed_late(*args: Any) -> Any:
                await store.delete(Scope("default", user), before_epoch=1)
                return await embed(*args)

            monkeypatch.setattr(model, "embed", embed_late)
            assert await store.index([doomed], patience=5) == [None]
            assert await vector_keys(redis_url, namespace) == []

    async def test_what_was_submitted_again_keeps_its_vector_over_a_delete_in_between(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace, "vector") as (store, _):
            before = record(user, "dog", record_id="k", epoch=0)
            after = record(user, "dog", record_id="k", epoch=1, order=before.order)
            for each in (before, after):
                await store.add([each])
                await store.index([each], patience=5)
            await store.delete(Scope("default", user), before_epoch=1)
            assert await found(store, user, "hound") == ["k"]

    async def test_vectors_of_what_is_trimmed_go_in_time(
        self, redis_url: str, namespace: str, user: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(upkeep, "ENTRIES", 8)
        async with opened(redis_url, namespace, max_messages_per_session=5) as (store, _):
            for number in range(40):
                added = record(user, f"dog {number}")
                await store.add([added])
                await store.index([added], patience=5)
            await store.settled()
            assert len(await found(store, user, "hound")) == 5
            assert len(await vectors_of(redis_url, namespace)) <= 15

    async def test_what_was_trimmed_and_is_stored_again_keeps_its_vector(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace, max_messages_per_session=3) as (store, _):
            await store.add([record(user, "cat", record_id="k")])
            await store.add([record(user, f"tea {n}") for n in range(3)])
            again = record(user, "dog", record_id="k")
            await store.add([again])
            await store.index([again], patience=5)
            await store.settled()
            assert (await found(store, user, "hound"))[0] == "k"
            assert await vectors_of(redis_url, namespace) == {"k"}

    async def test_vectors_expire_with_their_records(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace, ttl=3600) as (store, _):
            async with redis_at(redis_url) as redis:
                seconds, _ = await redis.time()
            made = record(user, "dog", record_id="dog")
            fresh = Record("dog", made.scope, seconds * 1_000_000, 0, made.message)
            old = Record("old", made.scope, (seconds - 7200) * 1_000_000, 0, made.message)
            await store.add([fresh])
            await store.index([fresh, old], patience=5)
            assert await found(store, user, "hound") == ["dog"]
            async with redis_at(redis_url) as redis:
                for key in await vector_keys(redis_url, namespace):
                    assert 3500 < await redis.ttl(key) <= 3600

    @pytest.mark.parametrize("call", ["epochs", "remove"])
    async def test_who_was_frozen_removes_nothing_that_was_added_since(
        self, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        """Embedded under the same id, by another worker, between two steps of the first one's."""
        async with opened(redis_url, namespace) as opened_one, opened(redis_url, namespace) as two:
            slow, quick = opened_one[0], two[0]
            first = record("ann", "dog", record_id="dog", epoch=1)
            again = replace(first, epoch=3)
            await slow.add([first])
            await slow.index([first], patience=5)
            assert slow._semantic is not None
            rows = slow._semantic.rows
            step = getattr(rows, call)

            async def freeze(*args: Any) -> Any:
                monkeypatch.setattr(rows, call, step)
                await quick.add([again])
                assert await quick.index([again], patience=5) == [None]
                return await step(*args)

            monkeypatch.setattr(rows, call, freeze)
            async with redis_at(redis_url) as redis:  # swept out, and its vector not yet
                base = f"{namespace}:m:{{default/ann}}"
                await redis.delete(*[key async for key in redis.scan_iter(f"{base}:*")])
            assert await slow.index([first], patience=5) == [None]
            assert await found(quick, "ann", "hound") == ["dog"]

    async def test_no_vector_outlives_its_time(self, redis_url: str, namespace: str) -> None:
        """Not after some were removed, nor while another is: the keys go on to expire."""
        async with opened(redis_url, namespace, ttl=3600) as (store, _):
            records = [_of_now(f"dog {n}", f"s{n}") for n in range(3)]
            await store.add(records)
            await store.index(records, patience=5)
            await store.delete(Scope("default", "ann", "s1"), before_epoch=1)
            async with redis_at(redis_url) as redis:
                lives = [await redis.ttl(key) for key in await vector_keys(redis_url, namespace)]
            assert len(lives) == 5
            assert all(3500 < each <= 3600 for each in lives)

    async def test_vectors_stay_when_memories_are_not_to_expire_any_more(
        self, redis_url: str, namespace: str
    ) -> None:
        async with opened(redis_url, namespace, ttl=3600) as (store, _):
            old = [_of_now(f"dog {n}", f"s{n}") for n in range(3)]
            await store.add(old)
            await store.index(old, patience=5)
        async with opened(redis_url, namespace) as (store, _):
            new = [_of_now("dog", "new")]
            await store.add(new)
            await store.index(new, patience=5)
            async with redis_at(redis_url) as redis:
                keys = [key async for key in redis.scan_iter(f"{namespace}:m*ann*")]
                lives = {key: await redis.ttl(key) for key in keys}
            assert sum(b":g:" in key for key in keys) == 4
            assert {key for key, life in lives.items() if life >= 0} == set()
            assert len(await found(store, "ann", "hound")) == 4


class TestSettingUp:
    async def test_vectors_of_another_size_are_refused_at_the_start(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with opened(redis_url, namespace) as (store, _):
            dog = record(user, "dog")
            await store.add([dog])
            await store.index([dog], patience=5)
        with pytest.raises(ConfigurationError, match="256 dimensions"):
            async with opened(redis_url, namespace, dimensions=128):
                pass

    async def test_reindexing_embeds_what_was_stored_before(
        self, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = RedisStore(redis_url, namespace=namespace)
        await store.start()
        for user in ("ann", "bob/x", "l" * 300):
            await store.add([record(user, f"dog {n}") for n in range(3)])
        await store.stop()
        monkeypatch.setenv("RECALLQ_EMBEDDING_CALLABLE", "tests.plugins.word_vectors:embed")
        monkeypatch.setenv("RECALLQ_EMBEDDING_DIMENSIONS", str(DIMENSIONS))
        settings = WorkerSettings.load(
            redis_url=redis_url, namespace=namespace, search_strategy="hybrid"
        )
        done = await reindex(settings)
        assert (done.users, done.embedded, done.skipped) == (3, 6, 1)
        assert (await reindex(settings)).embedded == 0
        store = RedisStore.from_settings(settings)
        await store.start()
        assert len(await found(store, "bob/x", "hound")) == 3
        assert "by meaning" in (await store.health()).detail
        await store.stop()

    async def test_reindexing_waits_for_what_is_away_for_a_moment_and_not_for_a_day(
        self, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = RedisStore(redis_url, namespace=namespace)
        await store.start()
        for user in ("ann", "bob"):
            await store.add([record(user, "dog")])
        await store.stop()
        monkeypatch.setenv("RECALLQ_EMBEDDING_CALLABLE", "tests.plugins.word_vectors:embed")
        monkeypatch.setenv("RECALLQ_EMBEDDING_DIMENSIONS", str(DIMENSIONS))
        settings = WorkerSettings.load(
            redis_url=redis_url, namespace=namespace, search_strategy="hybrid", retry_base=0.1
        )
        embed, trouble = RedisStore.embed, [BackendUnavailable("away", retry_after=0.2)]

        async def embed_or_not(store: RedisStore, base: str) -> Embeddings | None:
            if trouble:
                raise trouble.pop()
            return await embed(store, base)

        monkeypatch.setattr(RedisStore, "embed", embed_or_not)
        done = await reindex(settings)
        assert (done.users, done.embedded) == (2, 2)
        trouble.append(BackendUnavailable("no more today", retry_after=80_000))
        async with asyncio.timeout(10):
            with pytest.raises(BackendUnavailable, match="no more today"):
                await reindex(settings)

    async def test_reindexing_goes_past_what_the_model_refuses(
        self, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with opened(redis_url, namespace) as (store, model):
            for n in range(5):
                await store.add([record(f"user-{n}", text) for text in ("dog", f"word {n}")])
            refuse = "word 2"
            embed = model.embed

            async def pick(texts: Sequence[str], kind: Kind) -> Embedded:
                if any(refuse in text for text in texts):
                    raise Refused("it will not take that")
                return await embed(texts, kind)

            monkeypatch.setattr(model, "embed", pick)
            done = [await store.embed(store._base("default", f"user-{n}")) for n in range(5)]
        assert done == [Embeddings(2 - (n == 2), int(n == 2)) for n in range(5)]

    async def test_reindexing_passes_over_nobody_because_others_are_deleted(
        self, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_module, "_EMBEDDED_TOGETHER", 50)
        async with opened(redis_url, namespace) as (store, _):
            for n in range(6):  # of one order key are more than a page
                session = "old" if n < 2 else "new"
                await store.add([record("ann", f"dog {n}.{m}", session=session) for m in range(20)])
            same = record("ann", "hound").order
            await store.add(
                [
                    replace(record("ann", f"hound {m}", session="new"), order=same)
                    for m in range(120)
                ]
            )
            assert store._semantic is not None
            index, rounds = store._semantic.index, 0

            async def index_and_delete(*args: Any) -> Any:
                nonlocal rounds
                rounds += 1
                outcomes = await index(*args)
                if rounds == 1:
                    await store.delete(Scope("default", "ann", "old"), before_epoch=1)
                return outcomes

            monkeypatch.setattr(store._semantic, "index", index_and_delete)
            done = await store.embed(store._base("default", "ann"))
            assert done is not None
            left = {
                each.record_id
                for each in await store.list(Scope("default", "ann"), offset=0, limit=999)
            }
            assert len(left) == 200
        assert left <= await vectors_of(redis_url, namespace)
        assert 200 <= done.embedded <= 240

    async def test_a_model_that_is_not_set_up(
        self, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("OPENAI_API_KEY", "DASHSCOPE_API_KEY", "RECALLQ_EMBEDDING_CALLABLE"):
            monkeypatch.delenv(name, raising=False)
        settings = WorkerSettings.load(redis_url=redis_url, search_strategy="hybrid")
        with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
            RedisStore.from_settings(settings)


async def test_a_query_that_is_not_embedded_in_time_is_answered_by_words(
    redis_url: str, namespace: str, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semantic, "_PATIENCE", 0.05)
    async with opened(redis_url, namespace) as (store, model):
        await store.add([record(user, "dog", record_id="dog")])

        async def never(*_: Any) -> Any:
            await asyncio.Event().wait()

        monkeypatch.setattr(model, "embed", never)
        assert await found(store, user, "dog") == ["dog"]
