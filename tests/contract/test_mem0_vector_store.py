"""mem0's vector store on plain Redis, by itself and under a real `mem0.Memory`."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from recallq.errors import BackendError
from recallq_worker.backends.base import Added
from recallq_worker.vectors import NEVER_FENCED

# mem0 reads both as it is imported: it would call home, and make a directory in the user's own.
os.environ["MEM0_TELEMETRY"] = "False"
os.environ["MEM0_DIR"] = tempfile.mkdtemp(prefix="recallq-test-mem0-")

from mem0 import AsyncMemory, Memory  # type: ignore[import-untyped]
from mem0.configs.base import MemoryConfig  # type: ignore[import-untyped]
from mem0.utils.factory import EmbedderFactory, LlmFactory, VectorStoreFactory  # type: ignore[import-untyped]

from recallq_worker.backends.mem0.filters import matcher
from recallq_worker.backends.mem0.vector_store import RedisVectorStore, owner_is, register

DIMENSIONS = 64
EAST, NORTH, NORTHEAST = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]


class WordEmbedder:
    """Texts with words in common are similar; the same text always has the same vector."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def embed(self, text: str, memory_action: str | None = None) -> list[float]:
        vector = [0.0] * DIMENSIONS
        for word in text.lower().split():
            vector[sha256(word.encode()).digest()[0] % DIMENSIONS] += 1.0
        return vector

    def embed_batch(self, texts: list[str], memory_action: str = "add") -> list[list[float]]:
        return [self.embed(text, memory_action) for text in texts]


class SilentLlm:
    """For memories that are added as they are."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def generate_response(self, messages: object, **_: object) -> str:
        return '{"memory": [{"text": "Ann lives in \\"Amsterdam\\" with Bob"}]}'


@pytest.fixture
def store(redis_url: str, namespace: str) -> Iterator[RedisVectorStore]:
    made = RedisVectorStore(redis_url, namespace, 3)
    yield made
    made.close()


def found(results: Any) -> list[str]:
    return [each.id for each in results]


# --- by itself ----------------------------------------------------------------------------------


def test_stores_and_finds(store: RedisVectorStore, user: str) -> None:
    payloads: list[dict[str, Any]] = [
        {"user_id": user, "data": "green tea", "run_id": "s1", "recallq_order": 2},
        {"user_id": user, "data": "black tea", "recallq_order": 1},
        {"user_id": user + "2", "data": "tea of another"},
    ]
    store.insert(vectors=[EAST, NORTH, EAST], payloads=payloads, ids=["a", "b", "c"])
    hits = store.search(query="", vectors=NORTHEAST, top_k=9, filters={"user_id": user})
    assert [(hit.id, hit.payload) for hit in hits] == [("a", payloads[0]), ("b", payloads[1])]
    assert [hit.score for hit in hits] == pytest.approx([0.5**0.5] * 2)
    batch = store.search_batch(["", ""], [EAST, NORTH], top_k=1, filters={"user_id": user})
    assert [found(each) for each in batch] == [["a"], ["b"]]
    assert found(store.search("", EAST, filters={"user_id": user, "run_id": "s1"})) == ["a"]
    assert store.search("", EAST, filters={"user_id": user, "run_id": "*"}) == []
    words = store.keyword_search(query="green", top_k=5, filters={"user_id": user})
    assert found(words) == ["a"]
    assert words[0].score is not None
    assert words[0].score > 0
    (rows,) = store.list(filters={"user_id": user}, top_k=10)
    assert found(rows) == ["b", "a"]
    assert found(store.list({"user_id": user}, top_k=1)[0]) == ["b"]
    assert store.list({"user_id": "nobody"}) == [[]]


def test_acts_by_id_for_the_owner_of_the_context(store: RedisVectorStore, user: str) -> None:
    store.insert([EAST], [{"user_id": user, "data": "tea"}], ["a"])
    for call in (
        lambda: store.get("a"),
        lambda: store.delete("a"),
        lambda: store.update("a", EAST),
        lambda: store.search("", EAST, filters={"agent_id": "x"}),
        store.list,
        lambda: store.insert([EAST], [{"data": "whose?"}], ["b"]),
    ):
        with pytest.raises(BackendError, match="owner_is"):
            call()
    with pytest.raises(BackendError, match="one string"):
        store.list({"user_id": {"in": [user]}})
    with owner_is(user + "2"):
        assert store.get("a") is None
        store.delete("a")
    with owner_is(user):
        row = store.get(vector_id="a")
        assert row is not None
        assert (row.id, row.payload, row.score) == ("a", {"user_id": user, "data": "tea"}, None)
        store.update(vector_id="a", vector=None, payload={"data": "milk"})
        store.update(vector_id="a", vector=NORTH)
        assert store.list()[0][0].payload == {"data": "milk"}
        assert store.search("", NORTH)[0].score == 1.0
        store.delete(vector_id="a")
        store.update("a", EAST, {"data": "again"})
        assert store.get("a") is None


def test_contexts_are_apart_and_follow_into_threads_of_asyncio(
    store: RedisVectorStore, user: str
) -> None:
    async def add(name: str) -> None:
        with owner_is(name):
            await asyncio.sleep(0)
            await asyncio.to_thread(store.insert, [EAST], [{"data": name}], ["a"])

    async def add_all() -> None:
        await asyncio.gather(*(add(f"{user}-{number}") for number in range(20)))

    asyncio.run(add_all())
    for number in range(20):
        with owner_is(f"{user}-{number}"):
            assert store.list()[0][0].payload == {"data": f"{user}-{number}"}
    failed: list[BaseException] = []

    def get() -> None:
        try:
            store.get("a")
        except BackendError as error:
            failed.append(error)

    with owner_is(user):
        thread = threading.Thread(target=get)
        thread.start()
        thread.join()
    assert len(failed) == 1  # a plain thread has a context of its own


def test_order_and_epoch_come_from_the_payload(store: RedisVectorStore, user: str) -> None:
    store.vectors.delete(user, group=None, before_epoch=5)
    store.vectors.delete(user, group="s", before_epoch=9)
    payloads: list[dict[str, Any]] = [
        {"recallq_epoch": 4},
        {"recallq_epoch": 5, "created_at": "2026-01-01T00:00:00.000001+00:00"},
        {"recallq_epoch": 8, "run_id": "s"},
        {"created_at": "2026-01-01T00:00:00"},
        {"recallq_order": 7, "run_id": "s"},
    ]
    with owner_is(user):
        store.insert([EAST] * 5, payloads, list("abcde"))
        assert found(store.list()[0]) == ["e", "d", "b"]
    rows = {row.id: row for row in store.vectors.get_many(user, list("abcde"))}
    assert [rows[each].epoch for each in "bde"] == [5, NEVER_FENCED, NEVER_FENCED]
    assert rows["b"].order == rows["d"].order + 1 == 1_767_225_600_000_001
    assert (rows["e"].order, rows["e"].group, rows["d"].group) == (7, "s", "")
    with owner_is(user, epoch=4):
        assert store.store([EAST], [{}], ["x"]) == [Added.FENCED]
    with owner_is(user, epoch=5):
        assert store.store([EAST] * 2) == [Added.NEW] * 2
    assert store.vectors.delete(user, group=None, before_epoch=6) == 3
    with pytest.raises(ValueError, match="as many"), owner_is(user):
        store.insert([EAST], [{}, {}], ["a"])


def test_filters_are_asked_of_payloads(store: RedisVectorStore, user: str) -> None:
    payloads = [{"user_id": user, "number": n, "recallq_order": n} for n in range(1500)]
    store.insert([EAST] * 1500, payloads, [f"r{n}" for n in range(1500)])
    late = {"user_id": user, "number": {"gte": 1497}, "agent_id": None}
    assert found(store.list(late)[0]) == ["r1497", "r1498", "r1499"]
    assert found(store.list(late, top_k=2)[0]) == ["r1497", "r1498"]
    assert found(store.search("", EAST, 9, late)) == ["r1499", "r1498", "r1497"]
    one = {"user_id": user, "$or": [{"number": 3}, {"number": {"lt": 1}}]}
    assert found(store.search("", EAST, 9, one)) == ["r3", "r0"]
    assert len(store.list({"user_id": user})[0]) == 100
    assert len(store.list({"user_id": user}, top_k=1200)[0]) == 1200
    with pytest.raises(ValueError, match="near"):
        store.search("", EAST, 9, {"user_id": "nobody", "number": {"near": 1}})


@pytest.mark.parametrize(
    ("filters", "holds"),
    [
        ({}, True),
        ({"city": "Delft"}, True),
        ({"city": "delft"}, False),
        ({"city": "Delft", "age": 41}, False),
        ({"none": None}, False),
        ({"city": {"eq": "Delft"}}, True),
        ({"city": {"ne": "Delft"}}, False),
        ({"none": {"ne": "Delft"}}, True),
        ({"city": {"in": ["Delft", "Leiden"]}}, True),
        ({"city": {"nin": ["Delft"]}}, False),
        ({"none": {"in": [None]}}, False),
        ({"none": {"nin": ["Delft"]}}, True),
        ({"age": {"gt": 39, "lt": 41}}, True),
        ({"age": {"gt": 40}}, False),
        ({"age": {"gte": 40, "lte": 40.0}}, True),
        ({"age": {"gt": "3"}}, False),
        ({"none": {"lt": 3}}, False),
        ({"vip": {"gte": 1}}, False),
        ({"city": {"lt": "E"}}, True),
        ({"city": {"contains": "elf"}}, True),
        ({"city": {"contains": "ELF"}}, False),
        ({"city": {"icontains": "ELF"}}, True),
        ({"tags": {"contains": "Tea"}}, True),
        ({"tags": {"contains": "te"}}, False),
        ({"tags": {"icontains": "tea"}}, True),
        ({"age": {"contains": "4"}}, False),
        ({"city": "*"}, True),
        ({"none": "*"}, False),
        ({"$or": [{"age": 1}, {"city": "Delft"}]}, True),
        ({"OR": [{"age": 1}, {"age": 2}]}, False),
        ({"$not": [{"age": 1}, {"city": "Delft"}]}, False),
        ({"NOT": [{"age": 1}, {"age": 2}]}, True),
        ({"AND": [{"age": 40}, {"NOT": [{"vip": False}]}]}, True),
        ({"$and": [{"age": 40}, {"OR": [{"vip": False}]}]}, False),
    ],
)
def test_filters(filters: dict[str, Any], *, holds: bool) -> None:
    payload = {"city": "Delft", "age": 40, "vip": True, "tags": ["Tea", 3]}
    assert matcher(filters)(payload) is holds


@pytest.mark.parametrize(
    "filters",
    [{"a": {"$eq": 1}}, {"a": {"like": 1}}, {"$nor": []}, {"OR": {"a": 1}}, {"NOT": ["a"]},
     {"a": {"in": "abc"}}, {"AND": [{"a": {"is": 1}}]}],
)  # fmt: skip
def test_filters_that_nobody_knows_are_refused(filters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="filter"):
        matcher(filters)


def test_collections(store: RedisVectorStore, redis_url: str, namespace: str, user: str) -> None:
    assert store.list_cols() == [namespace]
    store.create_col(namespace, 3, "cosine")
    with pytest.raises(ValueError, match="another collection"):
        store.create_col("other", 3, "cosine")
    assert store.col_info(namespace)["name"] == namespace
    other = RedisVectorStore(redis_url, f"{namespace}_entities", 3)
    try:
        for each in (store, other):
            each.insert([EAST] * 2, [{"user_id": user}, {"user_id": user + "2"}], ["a", "b"])
        store.reset()
        with Redis.from_url(redis_url) as redis:
            assert not [*redis.scan_iter(f"{namespace}:*")]
        assert len(other.list({"user_id": user})[0]) == 1
        other.delete_col()
    finally:
        other.close()


# --- under mem0 ---------------------------------------------------------------------------------


@pytest.fixture
def config(
    redis_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MemoryConfig:
    here = f"{__name__}.%s"
    embedders = {**EmbedderFactory.provider_to_class, "openai": here % "WordEmbedder"}
    monkeypatch.setattr(EmbedderFactory, "provider_to_class", embedders)
    _, llm_config = LlmFactory.provider_to_class["openai"]
    llms = {**LlmFactory.provider_to_class, "openai": (here % "SilentLlm", llm_config)}
    monkeypatch.setattr(LlmFactory, "provider_to_class", llms)
    stores = dict(VectorStoreFactory.provider_to_class)
    monkeypatch.setattr(VectorStoreFactory, "provider_to_class", stores)
    register()
    return MemoryConfig(
        vector_store={
            "provider": "redis",
            "config": {
                "redis_url": redis_url,
                "collection_name": namespace,
                "embedding_model_dims": DIMENSIONS,
            },
        },
        embedder={"provider": "openai", "config": {}},
        llm={"provider": "openai", "config": {}},
        history_db_path=str(tmp_path / "history.db"),
    )


@pytest.fixture
def memory(config: MemoryConfig) -> Iterator[Any]:
    made = Memory(config)
    yield made
    made.vector_store.close()
    if made._entity_store is not None:
        made._entity_store.close()
    made.close()


def test_mem0_adds_finds_changes_and_deletes(memory: Any, user: str) -> None:
    assert isinstance(memory.vector_store, RedisVectorStore)
    messages = [
        {"role": "user", "content": "Ann drinks green tea"},
        {"role": "assistant", "content": "Bob drinks black coffee"},
    ]
    added = memory.add(messages, user_id=user, run_id="s1", infer=False, metadata={"n": 1})
    assert [each["event"] for each in added["results"]] == ["ADD", "ADD"]
    memory.add("Carol drinks green water", user_id=user, run_id="s2", infer=False)
    memory.add("Dave drinks green tea", user_id=user + "2", infer=False)

    def texts(filters: dict[str, Any], query: str = "green tea") -> list[str]:
        return [each["memory"] for each in memory.search(query, filters=filters)["results"]]

    assert texts({"user_id": user}) == [
        "Ann drinks green tea", "Carol drinks green water",
    ]  # fmt: skip
    assert texts({"user_id": user, "run_id": "s2"}) == ["Carol drinks green water"]
    assert texts({"user_id": user, "n": {"gte": 1}}) == ["Ann drinks green tea"]
    assert texts({"user_id": user, "NOT": [{"role": "user"}]}, "drinks") == [
        "Bob drinks black coffee"
    ]
    everything = memory.get_all(filters={"user_id": user})["results"]
    assert [each["memory"] for each in everything] == [
        "Ann drinks green tea", "Bob drinks black coffee", "Carol drinks green water",
    ]  # fmt: skip
    first = everything[0]["id"]
    with owner_is(user):
        assert memory.get(first)["memory"] == "Ann drinks green tea"
        memory.update(first, "Ann drinks hot milk")
        assert memory.get(first)["memory"] == "Ann drinks hot milk"
        memory.delete(first)
        assert memory.get(first) is None
        memory.delete_all(user_id=user, run_id="s2")
        assert len(memory.get_all(filters={"user_id": user})["results"]) == 1
        memory.delete_all(user_id=user)
    assert memory.get_all(filters={"user_id": user})["results"] == []
    assert len(memory.get_all(filters={"user_id": user + "2"})["results"]) == 1


def test_mem0_extracts_facts_and_forgets_them(memory: Any, user: str, namespace: str) -> None:
    """Facts bring entities with them, whose rows carry no epoch: the context's counts."""
    with owner_is(user, epoch=3):
        added = memory.add("hello", user_id=user, metadata={"recallq_epoch": 3})
        again = memory.add("hello", user_id=user, metadata={"recallq_epoch": 3})
        assert (len(added["results"]), again["results"]) == (1, [])
        memory._upsert_entity("Ann", "person", added["results"][0]["id"], {"user_id": user})
        (hit,) = memory.search("Where is Ann", filters={"user_id": user})["results"]
        assert hit["memory"].startswith("Ann lives")
    memories, entities = memory.vector_store.vectors, memory.entity_store.vectors
    assert entities.count(user) > 0
    assert entities.collection == f"{namespace}_entities"
    assert memories.delete(user, group=None, before_epoch=4) == 1
    entities.delete(user, group=None, before_epoch=4)
    assert (memories.count(user), entities.count(user)) == (0, 0)
    with owner_is(user, epoch=3):
        memory.add("hello", user_id=user, metadata={"recallq_epoch": 3})
    assert (memories.count(user), entities.count(user)) == (0, 0)


def test_mem0_entities_are_linked_and_unlinked(memory: Any, user: str) -> None:
    filters = {"user_id": user}
    memory._upsert_entity("Ann", "person", "m1", filters)
    memory._upsert_entity("ann", "person", "m2", filters)
    (row,) = memory.entity_store.list(filters=filters, top_k=10_000)[0]
    assert row.payload["linked_memory_ids"] == ["m1", "m2"]
    with owner_is(user):
        memory._remove_memory_from_entity_store("m1", filters)
        (row,) = memory.entity_store.list(filters=filters)[0]
        assert row.payload["linked_memory_ids"] == ["m2"]
        memory._remove_memory_from_entity_store("m2", filters)
    assert memory.entity_store.list(filters=filters) == [[]]


async def test_mem0_in_asyncio(config: MemoryConfig, user: str) -> None:
    memory = AsyncMemory(config)
    try:
        with owner_is(user):
            added = await memory.add("Ann drinks green tea", user_id=user, infer=False)
            row_id = added["results"][0]["id"]
            assert (await memory.get(row_id))["memory"] == "Ann drinks green tea"
            found_ = await memory.search("tea", filters={"user_id": user})
            assert [each["id"] for each in found_["results"]] == [row_id]
            await memory.delete(row_id)
            assert await memory.get(row_id) is None
    finally:
        memory.vector_store.close()
        if memory._entity_store is not None:
            memory._entity_store.close()
        memory.close()


def test_mem0_starts_anew(memory: Any, user: str) -> None:
    memory.add("Ann drinks green tea", user_id=user, infer=False)
    memory.reset()
    assert memory.get_all(filters={"user_id": user})["results"] == []
