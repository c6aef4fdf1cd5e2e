"""Search by meaning: what has a vector and what has none, and what a search does without."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable
from recallq_worker.backends.base import Added, Hit, Record, takes_second_step
from recallq_worker.backends.in_memory import InMemoryStore
from recallq_worker.embedding import (
    DocumentEmbedder,
    Embedded,
    EmbeddingBatcher,
    Kind,
    Refused,
    Vector,
)
from recallq_worker.search import semantic
from recallq_worker.search.memory_vectors import MemoryVectorRows
from recallq_worker.search.semantic import SemanticSearch, text_of
from tests.fake_embedder import FakeEmbedder, Request
from tests.virtual_time import now, run_virtually

_numbers = itertools.count(1)
USER = Scope("t", "u")

MEANINGS = [
    {"tea", "beverage", "drink", "sencha"},
    {"car", "vehicle", "automobile"},
    {"lisbon", "portugal", "city"},
    {"dog", "puppy", "pet"},
]


def meaning_of(text: str) -> Vector:
    """How often each of a few things is spoken of."""
    words = text.lower().replace(":", " ").split()
    return np.array([sum(word in each for word in words) for each in MEANINGS], dtype=np.float32)


class Understanding(FakeEmbedder):
    """Knows a few words that mean the same; does as `fate` says, as its parent does."""

    def __init__(self) -> None:
        account = f"understanding {next(_numbers)}"  # what one test fails with, slows no other
        super().__init__(latency=0, account=account, dimensions=len(MEANINGS))

    async def embed(self, texts: Sequence[str], kind: Kind) -> Embedded:
        await super().embed(texts, kind)
        return Embedded([meaning_of(text) for text in texts], len(texts))

    @property
    def documents(self) -> list[str]:
        """What was embedded, but for queries."""
        return [
            text
            for request in self.requests
            if request.kind is Kind.DOCUMENT
            for text in request.texts
        ]


Strategy = Literal["vector", "hybrid"]


@asynccontextmanager
async def searching(
    strategy: Strategy = "hybrid",
    max_messages: int | None = None,
    **options: Any,
) -> AsyncIterator[tuple[InMemoryStore, Understanding]]:
    embedder = Understanding()
    batcher = EmbeddingBatcher(embedder, **{"linger": 0.001, **options})
    rows = MemoryVectorRows(embedder.dimensions)
    search = SemanticSearch(DocumentEmbedder(batcher), rows, strategy)
    store = InMemoryStore(max_messages, search)
    await store.start()
    try:
        yield store, embedder
    finally:
        await store.stop()


def said(
    text: str,
    session: str = "s",
    *,
    user: str = "u",
    record_id: str | None = None,
    epoch: int = 0,
    **fields: Any,
) -> Record:
    number = next(_numbers)
    message = {"role": "user", "content": text, **fields}
    name = record_id or f"r{number:08}"
    return Record(name, Scope("t", user, session), number, epoch, message)


async def stored(store: InMemoryStore, *records: Record) -> None:
    """In both steps."""
    await store.add(records)
    assert await store.index(records, patience=60) == [None] * len(records)


async def hits(
    store: InMemoryStore,
    query: str,
    *,
    session: str | None = None,
    user: str = "u",
    top_k: int = 10,
    least: float | None = None,
) -> list[Hit]:
    scope = Scope("t", user, session)
    return await store.search(scope, query, top_k=top_k, score_threshold=least)


def texts(found: list[Hit]) -> list[str]:
    return [hit.record.message["content"] for hit in found]


async def vectors_of(store: InMemoryStore, *records: Record) -> dict[str, int]:
    """Those that have a vector, and its epoch."""
    assert store._semantic is not None
    epochs = await store._semantic.rows.epochs(USER, [each.record_id for each in records])
    return dict(epochs)


def failing(error: Exception, kind: Kind | None = None) -> Callable[[Request], Exception | None]:
    return lambda request: error if kind in (None, request.kind) else None


# --- finding --------------------------------------------------------------------------------------


async def test_a_message_is_found_by_its_words_before_it_has_a_vector() -> None:
    async with searching() as (store, embedder):
        assert takes_second_step(store)
        await store.add([said("a cup of tea")])
        assert texts(await hits(store, "tea")) == ["a cup of tea"]
        assert await hits(store, "beverage") == []
        assert embedder.sent == ["tea", "beverage"]


@pytest.mark.parametrize("strategy", ["hybrid", "vector"])
async def test_a_message_is_found_by_its_meaning(strategy: Strategy) -> None:
    async with searching(strategy) as (store, _):
        await stored(store, said("a cup of sencha"), said("my car"), said("nothing much"))
        found = await hits(store, "beverage")
        assert texts(found) == ["a cup of sencha"]
        assert 0 < found[0].score <= 1


async def test_words_and_meaning_are_added_up() -> None:
    async with searching() as (store, _):
        both, words, meaning = said("sencha tea"), said("tea lisbon"), said("sencha", "other")
        await stored(store, both, meaning)
        await store.add([words])
        found = await hits(store, "sencha tea")
        assert [hit.record for hit in found] == [both, meaning, words]
        by_words = {hit.record.record_id: hit.score for hit in await hits_by_words(store)}
        for hit in found:
            cosine = 0.0 if hit.record is words else 1.0
            expected = 0.7 * by_words[hit.record.record_id] + 0.3 * cosine
            assert hit.score == pytest.approx(expected, abs=1e-5)
        assert all(0 < hit.score <= 1 for hit in found)


async def hits_by_words(store: InMemoryStore) -> list[Hit]:
    """What a store without meaning finds."""
    other = InMemoryStore()
    await other.add(await store.list(USER, offset=0, limit=100))
    return await hits(other, "sencha tea")


async def test_of_a_pure_vector_search_the_score_is_the_cosine() -> None:
    async with searching("vector") as (store, _):
        await stored(store, said("tea"), said("tea car"), said("tea car dog"), said("lisbon"))
        found = await hits(store, "drink")
        assert texts(found) == ["tea", "tea car", "tea car dog"]
        assert [hit.score for hit in found] == pytest.approx([1, 2**-0.5, 3**-0.5], abs=1e-5)


async def test_a_pure_vector_search_finds_nothing_by_words() -> None:
    async with searching("vector") as (store, _):
        await store.add([said("tea")])
        await stored(store, said("zebra"))
        assert await hits(store, "tea") == []
        assert await hits(store, "zebra") == []


@pytest.mark.parametrize("strategy", ["hybrid", "vector"])
async def test_equals_come_newest_first_and_no_more_than_are_wanted(strategy: Strategy) -> None:
    async with searching(strategy) as (store, _):
        await stored(store, *(said("tea", f"s{n % 2}", number=n) for n in range(9)))
        found = await hits(store, "tea", top_k=3)
        assert [hit.record.message["number"] for hit in found] == [8, 7, 6]


@pytest.mark.parametrize("strategy", ["hybrid", "vector"])
async def test_a_threshold_keeps_what_reaches_it(strategy: Strategy) -> None:
    async with searching(strategy) as (store, _):
        await stored(store, said("tea"), said("tea car dog lisbon"))
        best, other = await hits(store, "drink tea")
        assert len(await hits(store, "drink tea", least=other.score)) == 2
        assert len(await hits(store, "drink tea", least=best.score)) == 1
        assert await hits(store, "drink tea", least=1.01) == []


@pytest.mark.parametrize("strategy", ["hybrid", "vector"])
async def test_sessions_and_users_keep_apart(strategy: Strategy) -> None:
    async with searching(strategy) as (store, _):
        mine, there, others = said("sencha"), said("tea", "t"), said("tea", user="v")
        await stored(store, mine, there, others)
        assert [hit.record for hit in await hits(store, "drink")] == [there, mine]
        assert [hit.record for hit in await hits(store, "tea", session="t")] == [there]
        assert [hit.record for hit in await hits(store, "tea", session="s")] == [mine]
        assert await hits(store, "tea", session="none") == []
        assert [hit.record for hit in await hits(store, "tea", user="v")] == [others]
        assert await hits(store, "tea", user="nobody") == []


@pytest.mark.parametrize("strategy", ["hybrid", "vector"])
@pytest.mark.parametrize("query", ["", " ", "\n\t"])
async def test_an_empty_query_finds_nothing_and_is_not_embedded(
    strategy: Strategy, query: str
) -> None:
    async with searching(strategy) as (store, embedder):
        await stored(store, said("tea"))
        asked = len(embedder.requests)
        assert await hits(store, query) == []
        assert len(embedder.requests) == asked


async def test_a_word_that_is_rare_by_meaning_is_found_among_very_many() -> None:
    """The most similar of all are compared, not the most similar of those found by words."""
    async with searching() as (store, _):
        await stored(store, said("a puppy", "early"))
        await stored(store, *(said(f"nothing {n}", f"s{n}") for n in range(600)))
        assert texts(await hits(store, "pet"))[0] == "a puppy"


# --- while the embedding service does not answer --------------------------------------------------


def test_words_answer_while_the_service_fails() -> None:
    async def main() -> None:
        async with searching() as (store, embedder):
            await stored(store, said("tea"))
            embedder.fate = failing(BackendUnavailable("down"), Kind.QUERY)
            found = await hits(store, "tea please")
            assert texts(found) == ["tea"]
            assert 0 < found[0].score <= 0.7
            assert await hits(store, "beverage") == []

    run_virtually(main())


def test_words_answer_while_the_service_hangs() -> None:
    async def main() -> None:
        async with searching(timeout=600) as (store, embedder):
            await stored(store, said("tea"))
            embedder.latency = 500
            began = now()
            assert texts(await hits(store, "tea please")) == ["tea"]
            assert now() - began == pytest.approx(semantic._PATIENCE)

    run_virtually(main())


def test_what_is_left_out_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the reason, there is one."""

    async def main() -> None:
        async with searching(timeout=600) as (store, embedder):
            embedder.fate = failing(BackendUnavailable("down"))
            await hits(store, "tea")
            embedder.fate = lambda request: None
            embedder.latency = 500
            await hits(store, "coffee")

    with caplog.at_level(logging.WARNING, logger=semantic.__name__):
        run_virtually(main())
    told = [each.getMessage() for each in caplog.records if each.name == semantic.__name__]
    assert len(told) == 2
    assert "down" in told[0]
    assert all(each.removeprefix("searching by words alone:").strip() for each in told)


def test_a_pure_vector_search_fails_with_the_service() -> None:
    async def main() -> None:
        async with searching("vector") as (store, embedder):
            await stored(store, said("tea"))
            embedder.fate = failing(BackendUnavailable("down"))
            with pytest.raises(BackendUnavailable):
                await hits(store, "beverage")

    run_virtually(main())


def test_words_answer_a_query_that_the_model_refuses() -> None:
    """What a content filter thinks of a query takes nobody's memory away."""

    async def main() -> None:
        async with searching() as (store, embedder):
            await stored(store, said("tea"))
            embedder.fate = failing(Refused("inappropriate"), Kind.QUERY)
            assert texts(await hits(store, "tea please")) == ["tea"]

    run_virtually(main())


def test_a_wrong_key_is_no_reason_for_searching_by_words() -> None:
    """Nobody would ever notice."""

    async def main() -> None:
        async with searching() as (store, embedder):
            await store.add([said("tea")])
            embedder.fate = failing(BackendError("the key is wrong"))
            with pytest.raises(BackendError, match="key"):
                await hits(store, "tea")

    run_virtually(main())


# --- the second step ------------------------------------------------------------------------------


async def test_messages_of_many_users_are_embedded_together() -> None:
    async with searching() as (store, embedder):
        records = [said(f"tea {n}", user=f"u{n}") for n in range(10)]
        await stored(store, *records)
        assert len(embedder.requests) == 1
        assert sorted(embedder.documents) == sorted(f"tea {n}" for n in range(10))
        for n in range(10):
            assert texts(await hits(store, "beverage", user=f"u{n}")) == [f"tea {n}"]


async def test_what_has_a_vector_is_not_embedded_again() -> None:
    # Without a cache: it is the vectors that are there that count.
    async with searching(cache_bytes=0) as (store, embedder):
        record = said("tea")
        await stored(store, record)
        await stored(store, record)
        assert embedder.documents == ["tea"]
        new = said("car")
        await stored(store, record, new, new)
        assert embedder.documents == ["tea", "car"]


async def test_who_speaks_is_embedded_with_the_text() -> None:
    async with searching() as (store, embedder):
        await stored(store, said("tea", name="Ann"))
        assert embedder.documents == ["Ann: tea"]


@pytest.mark.parametrize("content", [None, "", " ", "\n", []])
async def test_what_has_no_text_has_no_vector(content: Any) -> None:
    async with searching() as (store, embedder):
        record = said("", name="Ann")
        record.message["content"] = content
        assert text_of(record.message) == ""
        await stored(store, record, said("tea"))
        assert embedder.documents == ["tea"]
        assert await vectors_of(store, record) == {}


def test_one_refused_text_fails_alone() -> None:
    async def main() -> None:
        async with searching() as (store, embedder):
            good, bad, fine = said("tea"), said("bad car"), said("dog")
            embedder.fate = lambda request: (
                Refused("inappropriate") if "bad car" in request.texts else None
            )
            await store.add([good, bad, fine])
            told = await store.index([good, bad, fine], patience=60)
            assert [isinstance(each, BackendError) for each in told] == [False, True, False]
            assert told[0] is told[2] is None
            assert set(await vectors_of(store, good, bad, fine)) == {
                good.record_id, fine.record_id,
            }  # fmt: skip
            # It is found by its words all the same.
            assert texts(await hits(store, "car")) == ["bad car"]
            assert texts(await hits(store, "beverage")) == ["tea"]

    run_virtually(main())


def test_all_fail_with_the_service_and_succeed_later() -> None:
    async def main() -> None:
        async with searching() as (store, embedder):
            record = said("tea")
            await store.add([record])
            embedder.fate = failing(BackendUnavailable("down"))
            with pytest.raises(BackendUnavailable):
                await store.index([record], patience=60)
            assert await vectors_of(store, record) == {}
            embedder.fate = lambda request: None
            await asyncio.sleep(600)  # virtual: as long as the batcher may pause
            assert await store.index([record], patience=60) == [None]
            assert await vectors_of(store, record) == {record.record_id: 0}

    run_virtually(main())


async def test_a_store_without_meaning_takes_one_step() -> None:
    store = InMemoryStore()
    record = said("tea")
    await store.add([record])
    assert not takes_second_step(store)
    assert await store.index([record], patience=1) == [None]


# --- deleting -------------------------------------------------------------------------------------


async def test_what_is_deleted_is_not_embedded() -> None:
    async with searching() as (store, embedder):
        gone, kept = said("tea"), said("sencha", "t")
        await store.add([gone, kept])
        await store.delete(Scope("t", "u", "s"), before_epoch=1)
        assert await store.index([gone, kept], patience=60) == [None, None]
        assert embedder.documents == ["sencha"]
        assert set(await vectors_of(store, gone, kept)) == {kept.record_id}


@pytest.mark.parametrize("session", ["s", None])
async def test_what_is_deleted_while_it_is_embedded_gets_no_vector(session: str | None) -> None:
    async with searching() as (store, embedder):
        gone, kept = said("tea"), said("sencha", "t", epoch=1)
        await store.add([gone, kept])
        deleted: list[asyncio.Task[int]] = []

        def delete(request: Request) -> None:
            scope = Scope("t", "u", session)
            deleted.append(asyncio.ensure_future(store.delete(scope, before_epoch=1)))

        embedder.fate = delete
        assert await store.index([gone, kept], patience=60) == [None, None]
        assert await deleted[0] == 1
        assert set(await vectors_of(store, gone, kept)) == {kept.record_id}
        embedder.fate = lambda request: None
        assert texts(await hits(store, "drink")) == ["sencha"]


async def test_a_delete_takes_vectors_of_its_scope_and_its_time() -> None:
    async with searching("vector") as (store, _):
        old, new, other = said("tea"), said("tea", epoch=1), said("tea", "t")
        others = said("tea", user="v")
        await stored(store, old, new, other, others)
        await store.delete(Scope("t", "u", "s"), before_epoch=1)
        assert set(await vectors_of(store, old, new, other)) == {new.record_id, other.record_id}
        await store.delete(Scope("t", "u"), before_epoch=2)
        assert await vectors_of(store, old, new, other) == {}
        assert await hits(store, "drink") == []
        assert len(await hits(store, "drink", user="v")) == 1


async def test_what_is_added_once_more_keeps_its_vector_over_a_delete_in_between() -> None:
    """Its second step has come after the delete was submitted, and before it ran."""
    async with searching("vector") as (store, _):
        before = said("tea", record_id="k1")
        after = replace(before, epoch=1)
        await stored(store, before)
        assert await store.add([after]) == [Added.KNOWN]
        assert await store.index([after], patience=60) == [None]
        assert await vectors_of(store, before) == {"k1": 1}
        assert await store.delete(USER, before_epoch=1) == 0
        assert texts(await hits(store, "drink")) == ["tea"]


async def test_what_is_added_once_more_has_a_vector_whenever_its_second_step_comes() -> None:
    async with searching("vector") as (store, _):
        before = said("tea", record_id="k1")
        after = replace(before, epoch=1)
        await stored(store, before)
        assert await store.add([after]) == [Added.KNOWN]
        assert await store.delete(USER, before_epoch=1) == 0
        assert await store.index([before, after], patience=60) == [None, None]
        assert await vectors_of(store, before) == {"k1": 1}
        assert texts(await hits(store, "drink")) == ["tea"]


async def test_what_falls_out_of_its_session_takes_its_vector_along() -> None:
    async with searching("vector", max_messages=2) as (store, _):
        records = [said("tea") for _ in range(5)]
        await stored(store, *records)
        assert set(await vectors_of(store, *records)) == {each.record_id for each in records[3:]}
        await store.add([said("car")])
        assert set(await vectors_of(store, *records)) == {records[4].record_id}


async def test_health_names_the_model_and_says_when_it_is_gone() -> None:
    async with searching() as (store, embedder):
        health = await store.health()
        assert health.ok
        assert "fake" in (health.detail or "")
    async with searching() as (store, embedder):
        embedder.fate = failing(BackendError("the key is wrong"))
        health = await store.health()
        assert not health.ok
