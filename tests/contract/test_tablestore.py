"""The tablestore backend, with the real SDKs against servers that speak the real protocols."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable, ConfigurationError
from recallq_worker.backends.base import Added, Record
from recallq_worker.backends.tablestore.rows import owner_of
from recallq_worker.backends.tablestore.settings import TablestoreSettings
from recallq_worker.backends.tablestore.store import TablestoreStore
from recallq_worker.backends.tablestore.vectors import embedder_from_settings
from recallq_worker.settings import WorkerSettings
from tests.contract.store_conformance import FindsWords, StoreConformance, record, texts
from tests.loopback.dashscope_api import DashScopeServer
from tests.loopback.tablestore_api import TablestoreServer
from tests.support import eventually

NEW, KNOWN, FENCED = Added.NEW, Added.KNOWN, Added.FENCED
DIMENSIONS = 256


@pytest.fixture  # one for each: an instance has room for 64 tables, and each test makes two
def lagging() -> Iterator[TablestoreServer]:
    """Its search index sees what is written two seconds later."""
    with TablestoreServer(index_lag=2.0) as server:
        yield server


@pytest.fixture(scope="module")
def dashscope() -> Iterator[DashScopeServer]:
    with DashScopeServer() as server:
        yield server


@pytest.fixture
def server() -> Iterator[TablestoreServer]:
    with TablestoreServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As a user of DashScope has it."""
    if "dashscope" in request.fixturenames:
        dashscope: DashScopeServer = request.getfixturevalue("dashscope")
        monkeypatch.setenv("DASHSCOPE_API_KEY", dashscope.api_key)
        monkeypatch.setenv("DASHSCOPE_HTTP_BASE_URL", dashscope.base_url)
        monkeypatch.setenv("RECALLQ_EMBEDDING_DIMENSIONS", str(DIMENSIONS))
        dashscope.reset_counts()


def configured(server: TablestoreServer, **more: Any) -> TablestoreSettings:
    return TablestoreSettings.load(
        end_point=server.url,
        instance_name=server.instance_name,
        access_key_id=server.access_key_id,
        access_key_secret=server.access_key_secret,
        **more,
    )


def by_vector(server: TablestoreServer, **more: Any) -> TablestoreStore:
    settings = configured(server, search_strategy="vector", **more)
    vectors = embedder_from_settings(WorkerSettings.load(), settings)
    return TablestoreStore(settings, vectors=vectors)


@asynccontextmanager
async def opened(store: TablestoreStore) -> AsyncIterator[TablestoreStore]:
    try:
        await store.start()
        yield store
    finally:
        await store.stop()


@pytest.fixture
async def store(server: TablestoreServer) -> AsyncIterator[TablestoreStore]:
    async with opened(TablestoreStore(configured(server))) as store:
        yield store


async def page(store: TablestoreStore, scope: Scope, limit: int = 100) -> list[Record]:
    return await store.list(scope, offset=0, limit=limit)


class TestFullText(FindsWords):
    moves = False  # the order key is a part of the row's primary key

    highest_score: ClassVar[float] = float("inf")
    """BM25's scores have no bound."""
    finds_parts_of_words: ClassVar[bool] = False

    @pytest.fixture(autouse=True)
    def _lagging(self, lagging: TablestoreServer) -> None:
        self.server = lagging

    @asynccontextmanager
    async def open_store(self, redis_url: str, namespace: str) -> AsyncIterator[TablestoreStore]:
        table = namespace.replace("-", "_")
        async with opened(TablestoreStore(configured(self.server, table_name=table))) as store:
            yield store


class TestVectors(StoreConformance):
    moves = False  # the order key is a part of the row's primary key

    @pytest.fixture(autouse=True)
    def _lagging(self, lagging: TablestoreServer, dashscope: DashScopeServer) -> None:
        self.server = lagging
        self.dashscope = dashscope

    @asynccontextmanager
    async def open_store(self, redis_url: str, namespace: str) -> AsyncIterator[TablestoreStore]:
        async with opened(by_vector(self.server, table_name=namespace.replace("-", "_"))) as store:
            yield store

    async def test_the_nearest_come_first(self, store: TablestoreStore, user: str) -> None:
        await self.stored(
            store,
            [
                record(user, "the train to Lisbon is late"),
                record(user, "green tea with honey"),
                record(user, "绿茶 green tea"),
                record(user, "我喜欢杭州的龙井茶"),
            ],
        )
        scope = Scope("default", user)
        hits = await store.search(scope, "green tea with", top_k=2, score_threshold=None)
        assert texts([hit.record for hit in hits]) == ["green tea with honey", "绿茶 green tea"]
        assert hits[0].score > hits[1].score
        (hit,) = await store.search(scope, "龙井茶", top_k=1, score_threshold=None)
        assert hit.record.message["content"] == "我喜欢杭州的龙井茶"

    async def test_a_threshold_and_a_session_bound_them(
        self, store: TablestoreStore, user: str
    ) -> None:
        await self.stored(store, [record(user, f"green tea {n}") for n in range(20)])
        await self.stored(store, [record(user, "a train"), record(user, "tea", session="t")])
        scope = Scope("default", user)
        everything = await store.search(scope, "green tea", top_k=50, score_threshold=None)
        assert len(everything) == 22
        worst = everything[-1].score
        better = await store.search(scope, "green tea", top_k=50, score_threshold=worst + 0.01)
        assert {hit.record.message["content"] for hit in better}.isdisjoint({"a train"})
        assert len(better) == 21
        there = await store.search(
            Scope("default", user, "t"), "green tea", top_k=50, score_threshold=None
        )
        assert texts([hit.record for hit in there]) == ["tea"]

    async def test_stored_first_and_embedded_once(self, store: TablestoreStore, user: str) -> None:
        records = [record(user, f"tea {n} of {user}") for n in range(30)]
        self.dashscope.reset_counts()
        await store.add(records)
        assert self.dashscope.embedding_calls == 0
        assert len(await page(store, Scope("default", user))) == 30
        assert not any(await store.index(records, patience=60))
        assert self.dashscope.embedding_calls == 3
        assert not any(await store.index(records, patience=60))
        assert self.dashscope.embedding_calls == 3

    async def test_what_has_no_text_needs_no_vector(
        self, store: TablestoreStore, user: str
    ) -> None:
        self.dashscope.reset_counts()
        image = {"type": "image", "image_url": "https://example.com/tea.png"}
        await self.stored(store, [record(user, message={"role": "user", "content": [image]})])
        await self.stored(store, [record(user, "   ")])
        assert self.dashscope.embedding_calls == 0

    async def test_one_text_that_is_refused_harms_no_other(
        self, store: TablestoreStore, user: str
    ) -> None:
        self.dashscope.inappropriate = lambda text: "forbidden" in text
        records = [record(user, f"tea {n} {user}") for n in range(25)]
        records[7] = record(user, f"forbidden fruit {user}")
        await store.add(records)
        try:
            errors = await store.index(records, patience=60)
        finally:
            self.dashscope.inappropriate = lambda text: False
        assert [at for at, error in enumerate(errors) if error is not None] == [7]
        assert isinstance(errors[7], BackendError)
        assert "fruit" not in str(errors[7])
        hits = await store.search(Scope("default", user), "tea", top_k=50, score_threshold=None)
        assert len(hits) == 24

    async def test_a_text_that_is_too_long_is_found_by_its_beginning(
        self, store: TablestoreStore, user: str
    ) -> None:
        await self.stored(store, [record(user, "green tea " + "and so on " * 10_000)])
        hits = await store.search(Scope("default", user), "green", top_k=5, score_threshold=None)
        assert len(hits) == 1
        assert len(hits[0].record.message["content"]) > 100_000

    async def test_what_is_deleted_meanwhile_costs_nothing(
        self, store: TablestoreStore, user: str
    ) -> None:
        self.dashscope.reset_counts()
        records = [record(user, f"tea {n}") for n in range(5)]
        await store.add(records)
        await store.delete(Scope("default", user), before_epoch=1)
        assert not any(await store.index(records, patience=60))
        assert self.dashscope.embedding_calls == 0

    async def test_the_same_key_with_another_text(self, store: TablestoreStore, user: str) -> None:
        first = record(user, "green tea", record_id="same")
        again = record(user, "black coffee", record_id="same")
        await self.stored(store, [first])
        await self.stored(store, [again])
        hits = await store.search(Scope("default", user), "green", top_k=5, score_threshold=None)
        assert texts([hit.record for hit in hits]) == ["green tea"]


class TestTheTable:
    async def test_full_text_costs_no_embedding(
        self, store: TablestoreStore, dashscope: DashScopeServer, user: str
    ) -> None:
        records = [record(user, "tea")]
        await store.add(records)
        await store.index(records, patience=60)
        await store.search(Scope("default", user), "tea", top_k=5, score_threshold=None)
        assert dashscope.embedding_calls == 0

    async def test_starts_again_on_what_is_there(self, server: TablestoreServer, user: str) -> None:
        for number in range(3):
            async with opened(TablestoreStore(configured(server))) as store:
                await store.add([record(user, f"tea {number}")])
        async with opened(TablestoreStore(configured(server))) as store:
            assert len(await page(store, Scope("default", user))) == 3

    async def test_many_workers_start_at_once(self, server: TablestoreServer) -> None:
        stores = [TablestoreStore(configured(server)) for _ in range(8)]
        await asyncio.gather(*(each.start() for each in stores))
        assert all([(await each.health()).ok for each in stores])
        await asyncio.gather(*(each.stop() for each in stores))

    async def test_vectors_of_another_size_are_refused_and_nothing_changes(
        self,
        server: TablestoreServer,
        dashscope: DashScopeServer,
        monkeypatch: pytest.MonkeyPatch,
        user: str,
    ) -> None:
        async with opened(by_vector(server)) as store:
            await store.add([record(user, "tea")])
        monkeypatch.setenv("RECALLQ_EMBEDDING_DIMENSIONS", "512")
        with pytest.raises(ConfigurationError, match=r"256 dimensions.*512.*left as it is"):
            async with opened(by_vector(server)):
                pass
        monkeypatch.setenv("RECALLQ_EMBEDDING_DIMENSIONS", str(DIMENSIONS))
        with pytest.raises(ConfigurationError, match=r"cosine.*euclidean"):
            async with opened(by_vector(server, vector_metric_type="euclidean")):
                pass
        async with opened(by_vector(server)) as store:
            assert len(await page(store, Scope("default", user))) == 1

    async def test_a_dimension_that_the_model_does_not_give(
        self, server: TablestoreServer, dashscope: DashScopeServer
    ) -> None:
        with pytest.raises(ConfigurationError, match=r"VECTOR_DIMENSION is 100 and .* gives 256"):
            by_vector(server, vector_dimension=100)

    async def test_each_strategy_has_its_index(
        self,
        server: TablestoreServer,
        store: TablestoreStore,
        dashscope: DashScopeServer,
        user: str,
    ) -> None:
        mine = record(user, "green tea")
        async with opened(by_vector(server)) as other:
            await store.add([mine])
            await asyncio.gather(store.index([mine], patience=60), other.index([mine], patience=60))
            for each in (store, other):
                hits = await each.search(
                    Scope("default", user), "tea", top_k=5, score_threshold=None
                )
                assert texts([hit.record for hit in hits]) == ["green tea"]

    async def test_a_strange_table_is_left_alone(self, server: TablestoreServer) -> None:
        import tablestore as ots
        from tablestore_for_agent_memory.knowledge.knowledge_store import KnowledgeStore

        client = ots.OTSClient(
            server.url, server.access_key_id, server.access_key_secret, server.instance_name
        )
        await asyncio.to_thread(
            KnowledgeStore(client, vector_dimension=4, table_name="theirs").init_table
        )
        with pytest.raises(ConfigurationError, match=r"primary key \(document_id, tenant_id\)"):
            async with opened(TablestoreStore(configured(server, table_name="theirs"))):
                pass


class TestLargeUsers:
    async def test_ten_thousand_records(self, server: TablestoreServer, user: str) -> None:
        """Listed and deleted completely, by an index that has seen nothing yet."""
        server.index_lag = 60.0
        server.keep_bodies = False
        scope = Scope("default", user)
        async with opened(TablestoreStore(configured(server))) as store:
            for start in range(0, 10_000, 1000):
                await store.add(
                    [
                        record(user, str(n), session=f"s{n % 3}", order=n)
                        for n in range(start, start + 1000)
                    ]
                )
            await store.add([record(user + "2", "kept")])
            last = await store.list(scope, offset=9_990, limit=10)
            assert texts(last) == [str(n) for n in range(9_990, 10_000)]
            everything = await page(store, scope, limit=20_000)
            assert texts(everything) == [str(n) for n in range(10_000)]
            assert await store.delete(scope, before_epoch=1) == 10_000
            assert await page(store, scope) == []
            assert len(await page(store, Scope("default", user + "2"))) == 1

    async def test_large_messages(self, store: TablestoreStore, user: str) -> None:
        large = [record(user, f"{n}" + "x" * 1_000_000) for n in range(10)]
        assert await store.add(large) == [NEW] * 10
        assert len(await page(store, Scope("default", user))) == 10
        with pytest.raises(BackendError, match="Tablestore takes 2,097,152"):
            await store.add([record(user, "x" * 3_000_000, record_id="k", order=1)])
        await store.add([record(user, "smaller", record_id="k")])
        assert (await page(store, Scope("default", user)))[-1].message["content"] == "smaller"


class TestDeletion:
    async def test_a_write_that_comes_after_the_delete_is_never_seen(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        """Of a process that was frozen between two steps: here, in front of the write."""
        scope = Scope("default", user)
        late = record(user, "late tea", epoch=1)
        seen: list[list[Record]] = []
        with server.hold("BatchWriteRow"):
            adding = asyncio.create_task(store.add([late]))
            await asyncio.to_thread(server.wait_for_request, "BatchWriteRow")
            async with opened(TablestoreStore(configured(server))) as other:
                # The fence alone, as by another process: its own writes would be held as well.
                key = (owner_of("default", user), "f")
                server.seed(store._notes.name, [(key, {"epoch": 2})])
                seen.append(await page(other, scope))
        assert await adding == [FENCED]
        seen.append(await page(store, scope))
        assert seen == [[], []]

    async def test_a_process_that_dies_before_it_takes_back_leaves_nothing_to_see(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        scope = Scope("default", user)
        late = record(user, "late tea", epoch=1)
        await store.delete(scope, before_epoch=2)
        with server.hold("BatchGetRow"):
            adding = asyncio.create_task(store.add([late]))
            await asyncio.to_thread(server.wait_for_request, "BatchGetRow")
            adding.cancel()
            await asyncio.gather(adding, return_exceptions=True)
        assert await page(store, scope) == []
        assert await store.search(scope, "tea", top_k=5, score_threshold=None) == []
        assert await store.add([late]) == [FENCED]
        assert await page(store, scope) == []

    async def test_searches_do_not_find_what_the_index_has_yet_to_forget(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        records = [record(user, f"tea {n}", session=f"s{n % 2}") for n in range(6)]
        await store.add(records)
        await store.index(records, patience=60)
        server.index_lag = 30.0
        await store.delete(Scope("default", user, "s0"), before_epoch=1)
        hits = await store.search(Scope("default", user), "tea", top_k=9, score_threshold=None)
        assert sorted(texts([hit.record for hit in hits])) == ["tea 1", "tea 3", "tea 5"]
        await store.delete(Scope("default", user), before_epoch=2)
        assert (
            await store.search(Scope("default", user), "tea", top_k=9, score_threshold=None) == []
        )

    async def test_keys_may_be_used_again_after_a_delete(
        self, store: TablestoreStore, user: str
    ) -> None:
        scope = Scope("default", user)
        first = record(user, "one", record_id="k", order=1)
        assert await store.add([first]) == [NEW]
        await store.delete(scope, before_epoch=1)
        again = record(user, "two", record_id="k", order=2, epoch=1)
        assert await store.add([again]) == [NEW]
        assert await store.add([record(user, "two", record_id="k", order=3, epoch=1)]) == [KNOWN]
        assert texts(await page(store, scope)) == ["two"]

    async def test_fences_of_sessions_go_with_the_user(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        await store.add([record(user, "tea", session=f"s{n}") for n in range(5)])
        for number in range(5):
            await store.delete(Scope("default", user, f"s{number}"), before_epoch=1)
        await store.delete(Scope("default", user), before_epoch=2)
        assert len(server.rows(store._notes.name)) == 1
        assert server.rows(store._table.name) == []

    async def test_a_delete_that_is_interrupted_goes_on_where_it_was(
        self,
        server: TablestoreServer,
        store: TablestoreStore,
        user: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("recallq_worker.backends.tablestore.store._NOTED_EVERY", 1)
        scope = Scope("default", user, "s")
        for start in range(0, 3000, 1000):
            await store.add([record(user, "x" * 8000, order=start + n) for n in range(1000)])
        await store.add([record(user, "kept", session="t", order=9000)])
        server.keep_bodies = False
        deleting = asyncio.create_task(store.delete(scope, before_epoch=1))

        async def some_are_gone() -> bool:
            return server.row_count(store._table.name) < 2500

        await eventually(some_are_gone, every=0.001)
        deleting.cancel()
        await asyncio.gather(deleting, return_exceptions=True)
        left = server.row_count(store._table.name) - 1
        (fence,) = (row for row in server.rows(store._notes.name) if row["place"] == "f:s")
        assert str(fence["reached"]) > "r:"
        assert await store.delete(scope, before_epoch=1) == left
        assert texts(await page(store, Scope("default", user))) == ["kept"]

    async def test_fences_that_are_old_are_forgotten(
        self,
        server: TablestoreServer,
        store: TablestoreStore,
        user: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("recallq_worker.backends.tablestore.store._SWEEP", 1.0)
        await store.delete(Scope("default", user, "new"), before_epoch=5)
        key = (owner_of("default", user), "f:old")
        server.seed(store._notes.name, [(key, {"epoch": 5, "at": 1_000})])
        await store.delete(Scope("default", user, "another"), before_epoch=6)
        places = [row["place"] for row in server.rows(store._notes.name)]
        assert places == ["f:another", "f:new"]

    async def test_the_first_of_a_record_that_comes_twice_counts(
        self, store: TablestoreStore, user: str
    ) -> None:
        first = record(user, "first", record_id="same", epoch=1, order=1)
        second = record(user, "second", record_id="same", epoch=0, order=2)
        assert await store.add([first, second]) == [NEW, KNOWN]
        assert await store.delete(Scope("default", user), before_epoch=1) == 0
        assert await page(store, Scope("default", user)) == [first]

    async def test_the_same_id_of_two_users(self, store: TablestoreStore, user: str) -> None:
        await store.delete(Scope("default", "zed" + user), before_epoch=1)
        one, other = (record(name + user, record_id="same") for name in ("yan", "zed"))
        assert await store.add([one, other]) == [NEW, FENCED]

    async def test_searchable_means_after_the_last_delete(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        """The index must have heard that a record came again, not only that it came."""
        first = record(user, "tea", record_id="k", epoch=0)
        again = record(user, "tea", record_id="k", epoch=1)
        await store.add([first])
        await store.index([first], patience=60)
        server.index_lag = 1.5
        await store.add([again])
        await store.delete(Scope("default", user), before_epoch=1)
        assert not any(await store.index([again], patience=60))
        hits = await store.search(Scope("default", user), "tea", top_k=5, score_threshold=None)
        assert len(hits) == 1


class TestSearchIndex:
    async def test_a_new_one_is_waited_for(self, server: TablestoreServer, user: str) -> None:
        server.index_build_time = 3600.0
        async with opened(TablestoreStore(configured(server))) as store:
            mine = record(user, "tea")
            assert await store.add([mine]) == [NEW]
            with pytest.raises(BackendUnavailable, match="being built") as caught:
                await store.search(Scope("default", user), "tea", top_k=5, score_threshold=None)
            assert caught.value.retry_after is not None
            (error,) = await store.index([mine], patience=60)
            assert isinstance(error, BackendUnavailable)
            assert "being built" in str(error)
            health = await store.health()
            assert not health.ok
            assert "being built" in health.detail
            assert len(await page(store, Scope("default", user))) == 1

    async def test_a_table_that_is_not_ready_at_once(self, server: TablestoreServer) -> None:
        server.table_ready_time = 2.0
        async with opened(TablestoreStore(configured(server))) as store:
            assert store.indexes

    async def test_a_request_that_fails_makes_nothing_searchable(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        server.index_lag = 3600.0
        records = [record(user, f"tea {n}") for n in range(600)]
        await store.add(records)
        server.fail_with("Search", "OTSInternalServerError", times=8)
        errors = await store.index(records, patience=60)
        assert all(isinstance(each, BackendUnavailable) for each in errors)

    async def test_a_request_that_hangs_stops_nobody_else(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        records = [record(user, f"tea {n}") for n in range(2)]
        await store.add(records)
        server.hang("/Search$", 3600, times=1)
        first = asyncio.create_task(store.index(records[:1], patience=60))
        await asyncio.to_thread(server.wait_for_request, "/Search")
        assert not any(await store.index(records[1:], patience=60))
        assert not any(await first)


class TestTrouble:
    async def test_a_user_who_is_throttled_holds_up_nobody(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        theirs = owner_of("default", "busy" + user)
        busy = server.fail_rows(lambda key: key["owner"] == theirs, "OTSServerBusy")
        adding = [
            asyncio.create_task(store.add([record("busy" + user, str(n))])) for n in range(100)
        ]
        await asyncio.sleep(0.3)
        for number in range(5):
            assert await store.add([record(user, str(number))]) == [NEW]
        assert not any(each.done() for each in adding)
        assert busy
        server.clear_faults()
        await asyncio.gather(*adding, return_exceptions=True)

    async def test_an_answer_that_nobody_can_read(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        server.fail("BatchGetRow", 200, body="<html>log in</html>")
        with pytest.raises(BackendUnavailable, match="cannot be read"):
            await page(store, Scope("default", user, "s"))

    async def test_a_row_that_nobody_here_wrote_harms_no_other(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        await store.add([record(user, "tea")])
        key = (owner_of("default", user), "r:0000000000000001:strange")
        columns: dict[str, int | str] = {"epoch": 5, "session": "s", "message": "?", "text": "tea"}
        server.seed(store._table.name, [(key, columns)])
        assert texts(await page(store, Scope("default", user))) == ["tea"]
        hits = await store.search(Scope("default", user), "tea", top_k=5, score_threshold=None)
        assert len(hits) == 1

    async def test_rows_that_are_refused_for_now_are_written_in_the_end(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        server.fail_rows(30, "OTSServerBusy")
        assert await store.add([record(user, str(n)) for n in range(100)]) == [NEW] * 100
        assert len(await page(store, Scope("default", user))) == 100

    async def test_a_service_that_is_down(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        server.stop()
        with pytest.raises(BackendUnavailable, match="cannot be reached"):
            await store.add([record(user)])
        with pytest.raises(BackendUnavailable):
            await page(store, Scope("default", user))
        assert not (await store.health()).ok
        server.start()
        assert await store.add([record(user)]) == [NEW]

    async def test_credentials_that_are_wrong(self, server: TablestoreServer) -> None:
        settings = configured(server).model_copy(
            update={"access_key_secret": type(configured(server).access_key_secret)("not-it-42")}
        )
        with pytest.raises(BackendError, match="OTSAuthFailed") as caught:
            async with opened(TablestoreStore(settings)):
                pass
        assert "not-it-42" not in str(caught.value)
        assert "not-it-42" not in repr(settings)

    async def test_a_reply_that_is_lost_does_no_harm(
        self, server: TablestoreServer, store: TablestoreStore, user: str
    ) -> None:
        server.cut("BatchWriteRow", times=1, after=True)
        added = await store.add([record(user, str(n)) for n in range(10)])
        assert set(added) <= {NEW, KNOWN}
        assert len(await page(store, Scope("default", user))) == 10


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError) as caught:
        TablestoreSettings.load(end_point="https://x.cn-hangzhou.ots.aliyuncs.com")
    assert "RECALLQ_TABLESTORE_INSTANCE_NAME" in str(caught.value)
    assert "RECALLQ_TABLESTORE_ACCESS_KEY_SECRET" in str(caught.value)
    monkeypatch.setenv("RECALLQ_TABLESTORE_ACCESS_KEY_SECRET", "from-a-file\n")
    given = {"end_point": "https://x", "instance_name": "x", "access_key_id": "ak\n"}
    settings = TablestoreSettings.load(**given)
    assert settings.access_key_id.get_secret_value() == "ak"
    assert settings.access_key_secret.get_secret_value() == "from-a-file"
    with pytest.raises(ConfigurationError, match="must start with http"):
        TablestoreSettings.load(end_point="x.cn-hangzhou.ots.aliyuncs.com")


def test_what_the_backend_does_not_do_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="RECALLQ_STORE_TTL does not work"):
        TablestoreStore.from_settings(WorkerSettings.load(store_ttl=60))


async def test_a_store_stops_whose_start_failed(server: TablestoreServer) -> None:
    server.stop()
    store = TablestoreStore(configured(server))
    with pytest.raises(BackendUnavailable):
        await store.start()
    await store.stop()


async def test_waiting_for_the_index_ends_when_it_is_cancelled(
    server: TablestoreServer, store: TablestoreStore, user: str
) -> None:
    server.index_lag = 60.0
    records = [record(user, "tea")]
    await store.add(records)
    waiting = asyncio.create_task(store.index(records, patience=60))
    await asyncio.to_thread(server.wait_for_request, "/Search")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    async def nobody_waits() -> bool:
        return not store._watch._awaited

    await eventually(nobody_waits)
