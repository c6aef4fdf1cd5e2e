"""Adds that are stored first and searchable later: what callers see, and what a kill leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import orjson
import pytest

from recallq import (
    BackendError,
    BackendUnavailable,
    InternalError,
    JobState,
    JobTimeout,
    MemoryClient,
    UnknownJob,
    WorkerLost,
)
from recallq.contract import JobRef
from recallq.keys import Keys
from tests.loopback.dashscope_api import DashScopeServer
from tests.loopback.tablestore_api import TablestoreServer
from tests.support import Worker, redis_at

StartWorker = Callable[..., Worker]

NEVER = 3600.0


@pytest.fixture
def tables() -> Iterator[TablestoreServer]:
    """Its search index shows nothing before `show` is called."""
    with TablestoreServer(index_lag=NEVER) as server:
        yield server


async def show(tables: TablestoreServer) -> None:
    """The search index catches up, and does not lag any more."""
    tables.index_lag = 0.0
    await asyncio.to_thread(tables.sync_indexes)


def configured(server: TablestoreServer) -> dict[str, Any]:
    return {
        "backend": "tablestore",
        "tablestore_end_point": server.url,
        "tablestore_instance_name": server.instance_name,
        "tablestore_access_key_id": server.access_key_id,
        "tablestore_access_key_secret": server.access_key_secret,
    }


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace, timeout=60) as memory:
        yield memory


@pytest.fixture
async def worker(start_worker: StartWorker, tables: TablestoreServer) -> Worker:
    return await asyncio.to_thread(lambda: start_worker(**configured(tables)))


@pytest.fixture
def embeddings() -> Iterator[DashScopeServer]:
    with DashScopeServer() as server:
        yield server


def by_vector(tables: TablestoreServer, embeddings: DashScopeServer) -> dict[str, Any]:
    return configured(tables) | {
        "tablestore_search_strategy": "vector",
        "embedding_provider": "dashscope",
        "embedding_api_key": embeddings.api_key,
        "embedding_base_url": embeddings.base_url,
        "embedding_dimensions": 256,
        "retry_base": 0.2,
    }


async def listed(client: MemoryClient, user: str) -> list[str]:
    return [each.text for each in await client.list_memory(user, {"page_size": 100})]


async def found(client: MemoryClient, user: str, query: str) -> list[str]:
    return [each.text for each in await client.search_memory(user, query)]


async def test_an_add_returns_when_searches_find_it(
    client: MemoryClient, worker: Worker, tables: TablestoreServer
) -> None:
    tables.index_lag = 1.0
    added = await client.add_memory("ann", ["green tea", "black tea"])
    assert added.added == 2
    assert len(await found(client, "ann", "tea")) == 2


async def test_or_as_soon_as_it_is_stored(
    client: MemoryClient, worker: Worker, tables: TablestoreServer
) -> None:
    added = await client.add_memory("ann", "green tea", wait="stored")
    assert added.added == 1
    assert await listed(client, "ann") == ["green tea"]
    assert await found(client, "ann", "tea") == []
    await show(tables)
    assert await found(client, "ann", "tea") == ["green tea"]


async def test_a_handle_tells_both(
    client: MemoryClient, worker: Worker, tables: TablestoreServer
) -> None:
    handle = await client.submit_add("ann", "green tea")
    early = await handle.result(60, wait="stored")
    assert await listed(client, "ann") == ["green tea"]
    assert await handle.status() is JobState.STORED
    assert not await handle.cancel()
    await show(tables)
    assert await handle.result(60) == early
    assert await handle.status() is JobState.SUCCEEDED
    assert await found(client, "ann", "tea") == ["green tea"]
    assert await handle.result(60, wait="stored") == early


async def test_another_client_sees_it_as_well(
    client: MemoryClient,
    worker: Worker,
    tables: TablestoreServer,
    redis_url: str,
    namespace: str,
) -> None:
    handle = await client.submit_add("ann", "green tea")
    async with MemoryClient(redis_url, namespace=namespace, wait="stored") as other:
        theirs = other.handle(handle.id)
        assert (await theirs.result(60)).added == 1
        assert await theirs.status() is JobState.STORED
        await show(tables)
        assert (await theirs.result(60, wait="searchable")).added == 1


async def test_who_gives_up_waiting_is_told_that_it_is_stored(
    client: MemoryClient, worker: Worker, tables: TablestoreServer
) -> None:
    with pytest.raises(JobTimeout, match="stored, and will be searchable later"):
        await client.add_memory("ann", "green tea", timeout=8)
    await show(tables)
    assert await found(client, "ann", "tea") == ["green tea"]


async def test_the_index_may_take_longer_than_one_look(
    client: MemoryClient, worker: Worker, tables: TablestoreServer
) -> None:
    handle = await client.submit_add("ann", "green tea")
    await handle.result(60, wait="stored")
    await asyncio.sleep(9)
    assert await handle.status() is JobState.STORED
    await show(tables)
    assert (await handle.result(60)).added == 1


async def test_a_delete_in_between(
    client: MemoryClient, worker: Worker, tables: TablestoreServer
) -> None:
    handle = await client.submit_add("ann", "green tea")
    await handle.result(60, wait="stored")
    assert (await client.delete_memory("ann")).removed == 1
    assert await listed(client, "ann") == []
    assert (await handle.result(60)).added == 1
    await show(tables)
    assert await found(client, "ann", "tea") == []


@pytest.mark.parametrize("how", [Worker.kill, Worker.stop])
async def test_a_worker_that_dies_in_between(
    client: MemoryClient,
    worker: Worker,
    start_worker: StartWorker,
    tables: TablestoreServer,
    how: Callable[[Worker], None],
) -> None:
    handles = [await client.submit_add(f"user-{n % 5}", f"tea {n}") for n in range(20)]
    await asyncio.gather(*(each.result(60, wait="stored") for each in handles))
    await asyncio.to_thread(how, worker)
    await asyncio.to_thread(lambda: start_worker(**configured(tables)))
    assert {await each.status() for each in handles} == {JobState.STORED}
    await show(tables)
    results = await asyncio.gather(*(each.result(60) for each in handles))
    assert [each.added for each in results] == [1] * 20
    for user in range(5):
        mine = [f"tea {n}" for n in range(user, 20, 5)]
        assert await listed(client, f"user-{user}") == mine
        assert sorted(await found(client, f"user-{user}", "tea")) == sorted(mine)


async def test_the_same_add_twice(
    client: MemoryClient, worker: Worker, tables: TablestoreServer
) -> None:
    tables.index_lag = 0.2
    together = await asyncio.gather(
        *(client.add_memory("ann", "green tea", idempotency_key="k") for _ in range(3))
    )
    assert sum(each.added for each in together) == 1
    assert (await client.add_memory("ann", "green tea", idempotency_key="k")).added == 0
    assert await listed(client, "ann") == ["green tea"]
    await client.delete_memory("ann")
    assert (await client.add_memory("ann", "green tea", idempotency_key="k")).added == 1
    assert await found(client, "ann", "tea") == ["green tea"]


async def test_many_users_wait_side_by_side(
    client: MemoryClient, worker: Worker, tables: TablestoreServer
) -> None:
    """For the lag of the search index once, not once each."""
    tables.index_lag = 1.0
    await asyncio.gather(*(client.add_memory(f"u{n}", f"tea {n}") for n in range(200)))


class TestEmbedding:
    @pytest.fixture
    def tables(self) -> Iterator[TablestoreServer]:
        with TablestoreServer(index_lag=0.3) as server:
            yield server

    @pytest.fixture
    async def worker(
        self, start_worker: StartWorker, tables: TablestoreServer, embeddings: DashScopeServer
    ) -> Worker:
        return await asyncio.to_thread(lambda: start_worker(**by_vector(tables, embeddings)))

    async def test_texts_of_many_adds_share_requests(
        self, client: MemoryClient, worker: Worker, embeddings: DashScopeServer
    ) -> None:
        await asyncio.gather(
            *(client.add_memory(f"u{n % 50}", f"tea number {n}", timeout=90) for n in range(500))
        )
        assert 50 <= embeddings.embedding_calls <= 75
        hits = await client.search_memory("u7", "tea number 107", {"top_k": 1})
        assert [each.text for each in hits] == ["tea number 107"]

    async def test_an_outage_delays_searching_and_nothing_else(
        self, client: MemoryClient, worker: Worker, embeddings: DashScopeServer
    ) -> None:
        embeddings.fail("/text-embedding", 503)
        handles = [await client.submit_add(f"u{n}", f"tea {n}") for n in range(10)]
        results = await asyncio.gather(*(each.result(60, wait="stored") for each in handles))
        assert [each.added for each in results] == [1] * 10
        assert await listed(client, "u3") == ["tea 3"]
        assert {await each.status() for each in handles} == {JobState.STORED}
        embeddings.clear_faults()
        await asyncio.gather(*(each.result(60) for each in handles))
        assert await found(client, "u3", "tea") == ["tea 3"]

    async def test_a_text_that_is_refused_is_kept_and_told(
        self, client: MemoryClient, worker: Worker, embeddings: DashScopeServer
    ) -> None:
        embeddings.inappropriate = lambda text: "forbidden" in text
        good, bad = await asyncio.gather(
            client.submit_add("ann", "green tea"), client.submit_add("ann", "forbidden fruit")
        )
        assert (await good.result(60)).added == 1
        assert (await bad.result(60, wait="stored")).added == 1
        with pytest.raises(BackendError):
            await bad.result(60)
        assert await bad.status() is JobState.DEAD
        assert sorted(await listed(client, "ann")) == ["forbidden fruit", "green tea"]
        embeddings.inappropriate = lambda text: False
        (letter,) = await client.dead_letters.list("ann")
        replayed = await client.dead_letters.replay(letter)
        assert (await replayed.result(60)).added == 0
        assert await listed(client, "ann") == ["green tea", "forbidden fruit"]
        assert await found(client, "ann", "forbidden") == ["forbidden fruit", "green tea"]

    async def test_a_worker_that_dies_while_it_embeds(
        self,
        client: MemoryClient,
        worker: Worker,
        start_worker: StartWorker,
        tables: TablestoreServer,
        embeddings: DashScopeServer,
    ) -> None:
        with embeddings.hold("/text-embedding"):
            handles = [await client.submit_add(f"u{n % 5}", f"tea {n}") for n in range(30)]
            await asyncio.to_thread(embeddings.wait_for_request, "/text-embedding")
            await asyncio.gather(*(each.result(60, wait="stored") for each in handles))
            await asyncio.to_thread(worker.kill)
        await asyncio.to_thread(lambda: start_worker(**by_vector(tables, embeddings)))
        results = await asyncio.gather(*(each.result(60) for each in handles))
        assert [each.added for each in results] == [1] * 30
        for user in range(5):
            mine = [f"tea {n}" for n in range(user, 30, 5)]
            assert await listed(client, f"u{user}") == mine
            assert sorted(await found(client, f"u{user}", "tea")) == sorted(mine)


class TestTheSecondStep:
    """Of a store that does what texts tell it."""

    @pytest.fixture
    async def worker(self, start_worker: StartWorker) -> Worker:
        return await asyncio.to_thread(
            lambda: start_worker(backend="indexed", slow_attempts=3, retry_base=0.1)
        )

    async def test_a_call_that_is_cancelled_from_within_is_an_error(
        self, client: MemoryClient, worker: Worker, redis_url: str, namespace: str
    ) -> None:
        handle = await client.submit_add("ann", "tea index: cancel")
        with pytest.raises(InternalError, match="cancelled from within"):
            await handle.result(60)
        assert (await handle.result(60, wait="stored")).added == 1
        assert len(await index_calls(redis_url, namespace)) == 1

    async def test_a_mate_that_has_to_wait_holds_up_no_other(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        ann, bob = await asyncio.gather(
            client.submit_add("ann", "tea index: fail 1 times, wait 3600"),
            client.submit_add("bob", "fail 1 times: tea"),
        )
        assert JobRef.parse(ann.id).batch_id == JobRef.parse(bob.id).batch_id
        assert (await bob.result(60)).added == 1
        assert len(await found(client, "bob", "tea")) == 1
        assert await ann.status() is JobState.STORED

    async def test_what_is_unavailable_for_all_is_not_asked_one_by_one(
        self, client: MemoryClient, worker: Worker, redis_url: str, namespace: str
    ) -> None:
        handles = await asyncio.gather(
            *(client.submit_add(f"u{n}", "tea index: unavailable") for n in range(20))
        )
        for handle in handles:
            with pytest.raises(BackendUnavailable, match="stored and listed, but not searchable"):
                await handle.result(60)
        assert len(await index_calls(redis_url, namespace)) <= 3 * 2

    async def test_one_that_kills_its_workers_is_singled_out(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        texts = ["tea", "tea index: exit", *["tea"] * 8]
        handles = await asyncio.gather(
            *(client.submit_add(f"u{n}", text) for n, text in enumerate(texts))
        )
        waiting = asyncio.gather(*(each.result(110) for each in handles), return_exceptions=True)
        workers = 0
        while not waiting.done():
            victim = await asyncio.to_thread(lambda: start_worker(backend="indexed", ready=False))
            workers += 1
            while victim.is_alive() and not waiting.done():
                await asyncio.sleep(0.1)
        outcomes: list[Any] = await waiting
        assert isinstance(outcomes.pop(1), WorkerLost)
        assert [each.added for each in outcomes] == [1] * 9
        assert workers <= 8

    async def test_a_fleet_that_is_switched_to_another_backend_mixes_nothing(
        self, client: MemoryClient, start_worker: StartWorker, redis_url: str, namespace: str
    ) -> None:
        """What waits for a store's second step is no extractor's, and comes to no harm."""
        before = await asyncio.to_thread(lambda: start_worker(backend="indexed", lanes="live,bulk"))
        handles = await asyncio.gather(*(client.submit_add(f"u{n}", "tea") for n in range(4)))
        await asyncio.gather(*(each.result(60, wait="stored") for each in handles))
        await asyncio.to_thread(before.stop)
        extractor = await asyncio.to_thread(lambda: start_worker(backend="extractor"))
        assert (await client.add_memory("eve", "coffee")).added == 1
        async with redis_at(redis_url) as redis:
            done = await redis.lrange(f"{namespace}:extractions", 0, -1)
        assert [orjson.loads(each)["user"] for each in done] == ["eve"]
        assert {await each.status() for each in handles} == {JobState.STORED}
        await asyncio.to_thread(extractor.stop)
        await asyncio.to_thread(lambda: start_worker(backend="indexed"))
        results = await asyncio.gather(*(each.result(60) for each in handles))
        assert [each.added for each in results] == [1] * 4

    async def test_searches_do_not_wait_for_adds(
        self, worker: Worker, redis_url: str, namespace: str
    ) -> None:
        async with MemoryClient(redis_url, namespace=namespace, max_in_flight=5) as client:
            adding = [
                asyncio.create_task(client.add_memory("ann", "tea index: until released"))
                for _ in range(5)
            ]
            assert await client.search_memory("bob", "tea", timeout=20) == []
            assert not any(each.done() for each in adding)
            async with redis_at(redis_url) as redis:
                await redis.set(f"{namespace}:released", 1)
            await asyncio.gather(*adding)

    async def test_a_ledger_that_forgot_it_is_told(
        self, client: MemoryClient, worker: Worker, redis_url: str, namespace: str
    ) -> None:
        handle = await client.submit_add("ann", "tea index: until released")
        await handle.result(60, wait="stored")
        async with redis_at(redis_url) as redis:
            await redis.delete(Keys(namespace).batch(JobRef.parse(handle.id).batch_id))
        with pytest.raises(UnknownJob, match="stored, but nothing is known"):
            await handle.result(60)


async def index_calls(redis_url: str, namespace: str) -> list[list[str]]:
    async with redis_at(redis_url) as redis:
        calls = await redis.lrange(f"{namespace}:index-calls", 0, -1)
    return [orjson.loads(each) for each in calls]
