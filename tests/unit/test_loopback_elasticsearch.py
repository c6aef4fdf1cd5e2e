"""Elasticsearch's loopback server, driven by ReMe's Elasticsearch store and the client under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from elasticsearch import (
    ApiError,
    AsyncElasticsearch,
    AuthenticationException,
    BadRequestError,
    ConnectionError,  # noqa: A004
    NotFoundError,
)
from elasticsearch.helpers import BulkIndexError, async_scan

from tests.loopback.elasticsearch_api import ElasticsearchServer
from tests.reme_stores import ids, node, vector_store

SESSION = "Team-A 2024/团队"
ORDER = 1_800_000_000_000_001


@pytest.fixture(scope="module")
def _server() -> Iterator[ElasticsearchServer]:
    with ElasticsearchServer() as server:
        yield server


@pytest.fixture
def server(_server: ElasticsearchServer) -> ElasticsearchServer:
    _server.clear_faults()
    _server.reset_counts()
    _server.clear()
    _server.refresh_interval = 1.0
    return _server


@pytest.fixture
async def store(server: ElasticsearchServer) -> AsyncIterator[Any]:
    async with vector_store("elasticsearch", hosts=server.url) as store:
        yield store


@pytest.fixture
async def client(server: ElasticsearchServer) -> AsyncIterator[AsyncElasticsearch]:
    async with AsyncElasticsearch(server.url, max_retries=0) as client:
        yield client


async def test_nodes_are_kept_and_found(store: Any, server: ElasticsearchServer) -> None:
    tea = node("tea", "green tea", recallq_session=SESSION, recallq_order=ORDER, score=0.25)
    await store.async_insert([tea, node("coffee", "black coffee", author="x")], "w")
    found = await store.async_search("green tea leaves", "w", top_k=2)
    assert ids(found) == ["tea", "coffee"]
    assert found[0].metadata["score"] == pytest.approx(0.8165, abs=1e-3)  # ReMe's own is hidden
    assert found[0].metadata["recallq_order"] == ORDER
    assert found[0].vector is None  # what is searched for is not shown
    listed = await store.async_list_workspace_nodes("w")
    assert {each.unique_id: each.metadata.get("score") for each in listed} == {
        "tea": 0.25,
        "coffee": None,
    }
    found = await store.async_search("green tea", "w", source_exclude_vectors=False)
    assert len(found[0].vector) == 64
    assert list(server.sources("w")) == ["tea", "coffee"]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"recallq_session": SESSION}, []),  # by words only, in lower case
        ({"recallq_session": "Team"}, []),
        ({"recallq_session": "team"}, ["1"]),
        ({"recallq_session": "alpha"}, ["2", "3"]),  # whoever has the word
        ({"recallq_session": ["team", "beta"]}, ["1", "3"]),
        ({"recallq_session": []}, []),
        ({"recallq_session.keyword": SESSION}, ["1"]),
        ({"recallq_session.keyword": "alpha"}, ["2"]),
        ({"recallq_session.keyword": "long " * 60}, []),  # not beyond 256 characters
        ({"recallq_session": "long"}, ["4"]),
        ({"digest": "s0123456789abcdef"}, ["1"]),
        ({"recallq_order": ORDER}, ["1"]),
        ({"recallq_order": str(ORDER)}, ["1"]),
        ({"recallq_order": {"gt": ORDER}}, ["2"]),
        ({"recallq_order": {"gte": ORDER, "lt": ORDER + 1}}, ["1"]),
        ({"flag": True}, ["1"]),
        ({"unique_id": ["1", "3"]}, ["1", "3"]),
        ({"unique_id": "3"}, ["3"]),
        ({"workspace_id": "w"}, ["1", "2", "3", "4"]),
        ({"nothing": "x"}, []),
    ],
)
@pytest.mark.parametrize("query", ["tea", ""])
async def test_filters(store: Any, query: str, conditions: Any, expected: list[str]) -> None:
    digest = "s0123456789abcdef"
    await store.async_insert(
        [
            node(
                "1", "tea", recallq_session=SESSION, recallq_order=ORDER, flag=True, digest=digest
            ),
            node("2", "tea", recallq_session="alpha", recallq_order=ORDER + 1, flag=False),
            node("3", "tea", recallq_session="Alpha, beta"),
            node("4", "tea", recallq_session="long " * 60),
        ],
        "w",
    )
    found = await store.async_search(query, "w", top_k=5, filter_dict=conditions)
    assert sorted(ids(found)) == expected


async def test_the_first_value_makes_the_type(store: Any) -> None:
    await store.async_insert(
        node("1", "tea", day="2024-01-01", number=1, time="2024-01-01 10:00:00"), "w"
    )
    for metadata in ({"day": "Monday"}, {"number": "one"}, {"day": {"of": "week"}}):
        with pytest.raises(BulkIndexError) as caught:
            await store.async_insert(node("2", "tea", **metadata), "w")
        (error,) = caught.value.errors
        assert error["index"]["error"]["type"] == "document_parsing_exception"
    await store.async_insert(node("2", "tea", day="2024-02", number=1.5, time="now"), "w")
    assert ids(await store.async_search("", "w", filter_dict={"day": "2024-01-01"})) == ["1"]
    assert ids(await store.async_search("", "w", filter_dict={"day": {"gt": "2024-01-15"}})) == [
        "2"
    ]
    with pytest.raises(BadRequestError, match="parse_exception"):
        await store.async_search("", "w", filter_dict={"day": "Monday"})
    with pytest.raises(BadRequestError, match="For input string"):
        await store.async_search("", "w", filter_dict={"number": "one"})


async def test_a_mapping_of_ones_own(client: AsyncElasticsearch, store: Any) -> None:
    exact = {"strings": {"match_mapping_type": "string", "mapping": {"type": "keyword"}}}
    await client.indices.create(
        index="w",
        mappings={
            "date_detection": False,
            "dynamic_templates": [exact],
            "properties": {"vector": {"type": "dense_vector", "dims": 64}},
        },
    )
    await store.async_insert([node("1", "tea", s="2024-01-01"), node("2", "tea", s="A, b")], "w")
    assert ids(await store.async_search("", "w", filter_dict={"s": "A, b"})) == ["2"]
    assert ids(await store.async_search("", "w", filter_dict={"s": "2024-01-01"})) == ["1"]
    assert await store.async_search("", "w", filter_dict={"s": "b"}) == []
    with pytest.raises(BulkIndexError, match="1 document"):
        await store.async_insert(node("3", "tea", s="x" * 40_000), "w")


async def test_an_insert_keeps_vectors_and_replaces(store: Any, client: AsyncElasticsearch) -> None:
    await store.async_insert([node("1", "old")], "w")
    await store.async_insert([node("1", "new", vector=[3.0] + [0.0] * 63)], "w")
    assert store.embedding_model.embedded == ["old"]
    assert [each.content for each in await store.async_list_workspace_nodes("w")] == ["new"]
    for bad in (
        node("2", "x", vector=[0.0] * 64),
        node("2", "x", vector=[1.0] * 3),
        node("2", "x", number=float("nan")),
        node("2", "x", number=2**63),
        node("2", "x", nested={" ": 1}),
    ):
        with pytest.raises(BulkIndexError):
            await store.async_insert(bad, "w")


async def test_what_was_written_is_seen_after_a_refresh(
    store: Any, server: ElasticsearchServer, client: AsyncElasticsearch
) -> None:
    server.refresh_interval = 0.3
    await store.async_insert(node("1", "tea"), "w")
    await store.async_insert(node("2", "tea"), "w", refresh=False)
    await store.async_delete("1", "w", refresh=False)
    assert ids(await store.async_list_workspace_nodes("w")) == ["1"]
    await store.async_refresh("w")
    assert ids(await store.async_list_workspace_nodes("w")) == ["2"]
    await store.async_delete("2", "w", refresh=False)
    await asyncio.sleep(0.3)
    assert ids(await store.async_list_workspace_nodes("w")) == []


async def test_deletes(store: Any) -> None:
    await store.async_insert([node(each, each) for each in ("a", "b", "c")], "w")
    await store.async_delete("b", "w")
    with pytest.raises(BulkIndexError) as caught:
        await store.async_delete(["a", "missing"], "w")
    (error,) = caught.value.errors
    assert error["delete"]["status"] == 404
    await store.async_delete(["missing"], "w", raise_on_error=False)
    assert ids(await store.async_list_workspace_nodes("w")) == ["c"]


async def test_a_list_ends_at_the_window(store: Any, client: AsyncElasticsearch) -> None:
    await store.async_insert([node(str(number), "tea") for number in range(25)], "w")
    assert len(await store.async_list_workspace_nodes("w")) == 25
    assert len(await store.async_list_workspace_nodes("w", max_size=3)) == 3
    with pytest.raises(BadRequestError, match="Result window is too large"):
        await store.async_list_workspace_nodes("w", max_size=10_001)
    scanned = [hit["_id"] async for hit in async_scan(client, index="w", size=10)]
    assert scanned == [str(number) for number in range(25)]


async def test_a_workspace_that_is_missing(store: Any, client: AsyncElasticsearch) -> None:
    assert not await store.async_exist_workspace("none")
    assert await store.async_search("tea", "none") == []
    assert await store.async_list_workspace_nodes("none") == []
    await store.async_delete(["1"], "none")
    with pytest.raises(NotFoundError, match="no such index"):
        await client.search(index="none")
    await store.async_insert(node("1", "tea"), "none")
    assert await store.async_exist_workspace("none")
    assert await store.async_list_workspace() == ["none"]
    await store.async_delete_workspace("none")
    assert not await store.async_exist_workspace("none")


async def test_two_who_insert_first_get_into_each_others_way(
    store: Any, server: ElasticsearchServer
) -> None:
    async with vector_store("elasticsearch", hosts=server.url) as other:
        with server.hold("PUT /w$") as held:
            inserts = [
                asyncio.create_task(each.async_insert([node(name, "tea")], "w"))
                for name, each in (("1", store), ("2", other))
            ]
            while held.waiting < 2:
                await asyncio.sleep(0.001)
        results = await asyncio.gather(*inserts, return_exceptions=True)
        (error,) = [each for each in results if each is not None]
        assert isinstance(error, BadRequestError)
        assert error.error == "resource_already_exists_exception"
        assert len(await other.async_list_workspace_nodes("w")) == 1
        await asyncio.gather(
            *(store.async_insert([node(f"s{each}", "tea")], "w") for each in range(5)),
            *(other.async_insert([node(f"o{each}", "tea")], "w") for each in range(5)),
        )
        assert len(await store.async_list_workspace_nodes("w")) == 11


@pytest.mark.parametrize("name", ["Upper", "a b", "a/b", "a:b", "-a", "n" * 256])
async def test_names_that_do_not_go(store: Any, name: str) -> None:
    with pytest.raises(BadRequestError, match="invalid_index_name_exception"):
        await store.async_insert([node("1", "tea")], name)


async def test_what_goes_wrong_surfaces(store: Any, server: ElasticsearchServer) -> None:
    await store.async_insert([node("1", "tea")], "w")
    server.fail("/_search", 500, times=1)
    with pytest.raises(ApiError, match="500"):
        await store.async_search("tea", "w")
    server.fail("/_search", 503)
    server.reset_counts()
    with pytest.raises(ApiError, match="503"):
        await store.async_search("tea", "w")
    assert server.count("/_search") == 4  # the client tried again, at once
    server.cut("/_bulk", after=True)
    with pytest.raises(ConnectionError):
        await store.async_insert([node("2", "tea")], "w")
    assert list(server.sources("w")) == ["1", "2"]


async def test_keys_and_versions() -> None:
    with ElasticsearchServer(basic_auth=("elastic", "secret"), shows_vectors=True) as locked:
        async with vector_store(
            "elasticsearch", hosts=locked.url, basic_auth=("elastic", "secret")
        ) as store:
            await store.async_insert(node("1", "tea"), "w")
            (found,) = await store.async_list_workspace_nodes("w")
            assert len(found.vector) == 64
        async with AsyncElasticsearch(locked.url) as stranger:
            with pytest.raises(AuthenticationException):
                await stranger.search(index="w")
        # Which version of the interface a client speaks is in the type of what it wants.
        accept = {"accept": "application/vnd.elasticsearch+json; compatible-with=7"}
        async with (
            aiohttp.ClientSession() as session,
            session.get(locked.url, headers=accept) as old,
        ):
            assert old.status == 400
            assert (await old.json(content_type=None))["error"]["type"] == (
                "media_type_header_exception"
            )
