"""The tests' own PostgreSQL, and what ReMe's pgvector store does with it.

What goes wrong there is told here too, since whoever uses the store has to live with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from tests import postgres
from tests.postgres import PostgresServer
from tests.reme_stores import ids, node, vector_store

pytestmark = pytest.mark.skipif(postgres.missing() is not None, reason=str(postgres.missing()))

SESSION = "Team-A '2024' $1/团队"
ORDER = 1_800_000_000_000_001


@pytest.fixture(scope="module")
def _server() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture
def server(_server: PostgresServer) -> PostgresServer:
    _server.clear()
    return _server


def _store(server: PostgresServer, **options: Any) -> AbstractAsyncContextManager[Any]:
    return vector_store("pgvector", connection_string=server.url, **options)


@pytest.fixture
async def store(server: PostgresServer) -> AsyncIterator[Any]:
    async with _store(server) as store:
        yield store


async def test_nodes_are_kept_and_found(store: Any) -> None:
    tea = node("tea", "green tea", recallq_session=SESSION, recallq_order=ORDER, score=0.25)
    await store.async_insert([tea, node("coffee", "black coffee", author="x")], "w")
    found = await store.async_search("green tea leaves", "w", top_k=2)
    assert ids(found) == ["tea", "coffee"]
    assert found[0].metadata["score"] == pytest.approx(0.8165, abs=1e-3)  # ReMe's own is hidden
    assert found[0].metadata["recallq_order"] == ORDER
    listed = await store.async_list_workspace_nodes("w")
    assert {each.unique_id: each.metadata.get("score") for each in listed} == {
        "tea": 0.25,
        "coffee": None,
    }


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"recallq_session": SESSION}, ["1"]),
        ({"recallq_session": "team"}, []),
        ({"recallq_session": ["other", SESSION]}, ["1", "2"]),
        ({"recallq_session": []}, ["1", "2"]),  # as if it were not said
        ({"recallq_order": ORDER}, ["1"]),
        ({"recallq_order": str(ORDER)}, ["1"]),
        ({"flag": True}, []),  # it is compared as "True"
        ({"unique_id": "2"}, ["2"]),
        ({"nothing": "x"}, []),
    ],
)
@pytest.mark.parametrize("query", ["tea", ""])
async def test_filters(store: Any, query: str, conditions: Any, expected: list[str]) -> None:
    await store.async_insert(
        [
            node("1", "tea", recallq_session=SESSION, recallq_order=ORDER, flag=True),
            node("2", "tea", recallq_session="other", recallq_order=ORDER + 1),
        ],
        "w",
    )
    found = await store.async_search(query, "w", top_k=5, filter_dict=conditions)
    assert sorted(ids(found)) == expected


async def test_ranges_do_not_work(store: Any) -> None:
    """It writes ``metadata->>'key'::numeric``, which makes a number of the key."""
    from asyncpg import InvalidTextRepresentationError

    await store.async_insert(node("1", "tea", recallq_order=1), "w")
    with pytest.raises(InvalidTextRepresentationError, match='numeric: "recallq_order"'):
        await store.async_search("", "w", filter_dict={"recallq_order": {"gte": 1}})


async def test_more_than_eight_values_are_too_many(store: Any) -> None:
    from asyncpg import IndeterminateDatatypeError

    await store.async_insert(node("1", "tea", recallq_session="s1"), "w")
    for count in (8, 9):
        sessions = {"recallq_session": [f"s{number}" for number in range(count)]}
        assert ids(await store.async_search("", "w", filter_dict=sessions)) == ["1"]
        if count == 8:
            assert ids(await store.async_search("tea", "w", filter_dict=sessions)) == ["1"]
        else:
            with pytest.raises(IndeterminateDatatypeError):
                await store.async_search("tea", "w", filter_dict=sessions)


async def test_an_insert_keeps_vectors_and_replaces(store: Any) -> None:
    await store.async_insert([node("1", "old")], "w")
    await store.async_insert([node("1", "new", vector=[3.0] + [0.0] * 63)], "w")
    assert store.embedding_model.embedded == ["old"]
    (found,) = await store.async_list_workspace_nodes("w")
    assert (found.content, found.vector[0]) == ("new", 3.0)


async def test_deletes_and_lists(store: Any) -> None:
    await store.async_insert([node(str(number), "tea") for number in range(25)], "w")
    await store.async_delete([str(number) for number in range(5)] + ["missing"], "w")
    assert len(await store.async_list_workspace_nodes("w")) == 20
    assert len(await store.async_list_workspace_nodes("w", max_size=3)) == 3
    assert len(await store.async_list_workspace_nodes("w", max_size=2**63 - 1)) == 20


async def test_a_workspace_that_is_missing(store: Any) -> None:
    assert not await store.async_exist_workspace("none")
    assert await store.async_search("tea", "none") == []
    assert await store.async_list_workspace_nodes("none") == []
    await store.async_delete(["1"], "none")
    await store.async_insert(node("1", "tea"), "none")
    assert await store.async_exist_workspace("none")


async def test_two_stores_at_once(server: PostgresServer, store: Any) -> None:
    await store.async_insert([], "w")
    async with _store(server) as other:

        async def insert(one: Any, name: str) -> None:
            for number in range(10):
                await one.async_insert([node(f"{name}{number}", "tea")], "w")

        await asyncio.gather(insert(store, "s"), insert(other, "o"))
        assert len(await other.async_list_workspace_nodes("w")) == 20


async def test_one_store_does_one_thing_at_a_time(store: Any) -> None:
    from asyncpg import InterfaceError

    await store.async_insert(node("1", "tea"), "w")
    with pytest.raises(InterfaceError, match="another operation is in progress"):
        await asyncio.gather(*(store.async_exist_workspace("w") for _ in range(2)))


async def test_after_an_outage_a_store_is_lost_until_it_is_closed(
    server: PostgresServer, store: Any
) -> None:
    from asyncpg import InterfaceError, PostgresConnectionError

    await store.async_insert(node("1", "tea"), "w")
    server.stop()
    with pytest.raises(PostgresConnectionError):
        await store.async_exist_workspace("w")
    server.start()
    with pytest.raises(InterfaceError, match="connection is closed"):
        await store.async_exist_workspace("w")
    await store.async_close()
    assert ids(await store.async_list_workspace_nodes("w")) == ["1"]


@pytest.mark.parametrize(("name", "same"), [("a-b", "a_b"), ("团队", "测试")])
async def test_names_that_are_the_same_table(store: Any, name: str, same: str) -> None:
    await store.async_insert(node("1", "tea"), name)
    assert ids(await store.async_list_workspace_nodes(same)) == ["1"]


async def test_names_that_are_too_long(store: Any) -> None:
    from asyncpg import NameTooLongError

    await store.async_insert(node("1", "tea"), "n" * 53)
    with pytest.raises(NameTooLongError):
        await store.async_exist_workspace("n" * 54)


async def test_texts_that_do_not_go(store: Any) -> None:
    from asyncpg import DataError

    for bad in (node("1", "a\0b"), node("1", "x", key="a\0b"), node("1", "x", key="\ud800")):
        with pytest.raises(DataError):
            await store.async_insert(bad, "w")
    await store.async_insert(node("1", "x", message='{"text": "a\\u0000b"}'), "w")


async def test_the_index_hides_what_a_filter_wants(server: PostgresServer, store: Any) -> None:
    nodes = [
        node(str(number), f"w{number} tea", recallq_session="rare" if number % 500 == 0 else "many")
        for number in range(5000)
    ]
    await store.async_insert(nodes, "w")
    # Which way it searches is up to the planner; this is what it does with many rows.
    index_only = "?options=-c%20enable_seqscan%3Doff%20-c%20enable_bitmapscan%3Doff"
    rare = {"recallq_session": "rare"}
    async with vector_store("pgvector", connection_string=server.url + index_only) as usual:
        few = await usual.async_search("tea w1", "w", top_k=10, filter_dict=rare)
        assert len(few) < 10
    iterative = f"{index_only}%20-c%20hnsw.iterative_scan%3Dstrict_order"
    async with vector_store("pgvector", connection_string=server.url + iterative) as patient:
        found = await patient.async_search("tea w1", "w", top_k=10, filter_dict=rare)
        assert len(found) > len(few)  # an index of this kind promises no more


async def test_who_comes_first_may_be_refused(server: PostgresServer) -> None:
    """Of several that make the same table at once all but one may fail; then it is there."""
    from contextlib import AsyncExitStack

    from asyncpg import PostgresError

    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(_store(server)) for _ in range(5)]
        for number in range(3):
            results = await asyncio.gather(
                *(
                    each.async_insert(node(str(name), "tea"), f"w{number}")
                    for name, each in enumerate(stores)
                ),
                return_exceptions=True,
            )
            failed = [each for each in results if each is not None]
            assert all(isinstance(each, PostgresError) for each in failed), failed
            listed = await stores[0].async_list_workspace_nodes(f"w{number}")
            assert len(listed) == 5 - len(failed) >= 1


async def test_too_many_dimensions_fail_once(server: PostgresServer) -> None:
    from asyncpg import ProgramLimitExceededError

    async with _store(server, dimensions=2001) as store:
        with pytest.raises(ProgramLimitExceededError, match="more than 2000 dimensions"):
            await store.async_insert(node("1", "tea"), "w")
        await store.async_insert(node("1", "tea"), "w")  # the table is there now, and no index
        assert ids(await store.async_search("tea", "w")) == ["1"]


def test_it_is_cleared_of_tables(server: PostgresServer) -> None:
    server.execute('CREATE TABLE "Some Table" (number INT)')
    server.clear()
    server.clear()
    assert server.execute("SELECT FROM pg_tables WHERE schemaname = 'public'") == []


def test_it_runs_again_with_what_it_held(server: PostgresServer) -> None:
    url = server.url
    server.execute("CREATE TABLE kept AS SELECT 7 AS number")
    server.stop()
    server.stop()
    server.start()
    assert server.url == url
    assert server.execute("SELECT number FROM kept") == [(7,)]
    assert server.execute("SELECT 'vector'::regtype::text") == [("vector",)]
