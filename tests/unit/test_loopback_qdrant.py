"""Qdrant's loopback server, driven by ReMe's Qdrant store and Qdrant's own client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from tests.loopback.qdrant_api import QdrantServer
from tests.loopback.text import embedding
from tests.reme_stores import ids, node, vector_store

SESSION = 'S 1/"团队" - 2024-01-01'
ORDER = 1_800_000_000_000_001


@pytest.fixture(scope="module")
def _server() -> Iterator[QdrantServer]:
    with QdrantServer() as server:
        yield server


@pytest.fixture
def server(_server: QdrantServer) -> QdrantServer:
    _server.clear_faults()
    _server.reset_counts()
    _server.clear()
    return _server


@pytest.fixture
async def store(server: QdrantServer) -> AsyncIterator[Any]:
    async with vector_store("qdrant", url=server.url) as store:
        # Each of its two clients asks for the server's version on a thread of its own, which warns
        # if nobody is there any more.
        await asyncio.to_thread(server.wait_for_request, "GET /$", 2)
        yield store


@pytest.fixture
async def client(server: QdrantServer) -> AsyncIterator[AsyncQdrantClient]:
    client = AsyncQdrantClient(url=server.url, check_compatibility=False)
    yield client
    await client.close()


async def test_nodes_are_kept_and_found(store: Any, server: QdrantServer) -> None:
    tea = node("tea", "green tea", recallq_session=SESSION, recallq_order=ORDER, score=0.25)
    await store.async_insert([tea, node("a" * 32, "black coffee", author="x")], "w")
    found = await store.async_search("green tea leaves", "w", top_k=2)
    assert ids(found) == ["tea", "a" * 32]
    assert found[0].content == "green tea"
    assert found[0].metadata["score"] == pytest.approx(0.8165, abs=1e-3)  # ReMe's own is hidden
    assert found[0].metadata["recallq_order"] == ORDER
    assert found[0].vector == pytest.approx(embedding("green tea", 64))
    listed = await store.async_list_workspace_nodes("w")
    assert {each.unique_id: each.metadata.get("score") for each in listed} == {
        "tea": 0.25,
        "a" * 32: None,
    }
    assert {payload["original_id"] for payload in server.payloads("w")} == {"tea", "a" * 32}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"recallq_session": SESSION}, ["1"]),
        ({"recallq_session": "s"}, []),
        ({"recallq_session": ["other", "x"]}, ["2"]),
        ({"recallq_session": []}, []),
        ({"recallq_order": ORDER}, ["1"]),
        ({"recallq_order": str(ORDER)}, []),
        ({"recallq_order": {"gt": ORDER}}, ["2"]),
        ({"recallq_order": {"gte": ORDER, "lt": ORDER + 1}}, ["1"]),
        ({"recallq_session": SESSION, "recallq_order": ORDER + 1}, []),
        ({"flag": True}, ["1"]),
        ({"flag": 1}, []),
        ({"tags": "b"}, ["1"]),
        ({"unique_id": "2"}, ["2"]),
        ({"nothing": "x"}, []),
    ],
)
@pytest.mark.parametrize("query", ["tea", ""])
async def test_filters(store: Any, query: str, conditions: Any, expected: list[str]) -> None:
    first = node(
        "1", "tea", recallq_session=SESSION, recallq_order=ORDER, flag=True, tags=["a", "b"]
    )
    await store.async_insert(
        [first, node("2", "tea", recallq_session="other", recallq_order=ORDER + 1)], "w"
    )
    found = await store.async_search(query, "w", top_k=5, filter_dict=conditions)
    assert ids(found) == expected


async def test_an_insert_embeds_again_replaces_and_normalizes(
    store: Any, client: AsyncQdrantClient
) -> None:
    await store.async_insert([node("1", "old")], "w")
    await store.async_insert([node("1", "new", vector=[3.0] + [0.0] * 63)], "w")
    assert store.embedding_model.embedded == ["old", "new"]  # also what had a vector
    assert [each.content for each in await store.async_list_workspace_nodes("w")] == ["new"]
    await client.upsert("w", [models.PointStruct(id=7, vector=[3.0] + [0.0] * 63, payload={})])
    (point,) = await client.retrieve("w", [7], with_vectors=True)
    assert point.vector == [1.0] + [0.0] * 63


async def test_deletes(store: Any) -> None:
    await store.async_insert([node(each, each) for each in ("a", "b", "c")], "w")
    await store.async_delete(["a", "missing"], "w")
    await store.async_delete("b", "w")
    assert ids(await store.async_list_workspace_nodes("w")) == ["c"]


async def test_a_list_is_complete(store: Any, server: QdrantServer) -> None:
    await store.async_insert([node(str(number), "tea") for number in range(25)], "w")
    listed = await store.async_list_workspace_nodes("w", limit=10)
    assert sorted(ids(listed), key=int) == [str(number) for number in range(25)]
    assert server.count("/points/scroll") == 3


async def test_a_workspace_that_is_missing(store: Any) -> None:
    assert not await store.async_exist_workspace("none")
    assert await store.async_search("tea", "none") == []
    await store.async_delete(["1"], "none")
    with pytest.raises(UnexpectedResponse, match="Not found: Collection `none`") as caught:
        await store.async_list_workspace_nodes("none")
    assert caught.value.status_code == 404
    await store.async_insert(node("1", "tea"), "none")
    assert await store.async_exist_workspace("none")
    await store.async_delete_workspace("none")
    assert not await store.async_exist_workspace("none")


async def test_two_who_insert_first_get_into_each_others_way(
    store: Any, server: QdrantServer
) -> None:
    async with vector_store("qdrant", url=server.url) as other:
        with server.hold("PUT /collections/w$") as held:
            inserts = [
                asyncio.create_task(each.async_insert([node(name, "tea")], "w"))
                for name, each in (("1", store), ("2", other))
            ]
            while held.waiting < 2:
                await asyncio.sleep(0.001)
        results = await asyncio.gather(*inserts, return_exceptions=True)
        (error,) = [each for each in results if each is not None]
        assert isinstance(error, UnexpectedResponse)
        assert error.status_code == 409
        assert "already exists" in str(error)
        assert len(await other.async_list_workspace_nodes("w")) == 1
        await asyncio.gather(
            *(store.async_insert([node(f"s{each}", "tea")], "w") for each in range(5)),
            *(other.async_insert([node(f"o{each}", "tea")], "w") for each in range(5)),
        )
        assert len(await store.async_list_workspace_nodes("w")) == 11


@pytest.mark.parametrize("name", ["团队 7", "A%2Fb", "x#y", "n" * 255])
async def test_names_that_go(store: Any, server: QdrantServer, name: str) -> None:
    await store.async_insert([node("1", "tea")], name)
    assert list(server.collections) == [name]
    assert len(await store.async_list_workspace_nodes(name)) == 1


@pytest.mark.parametrize("name", ["a/b", "a:b", "a?b", "a*", "n" * 256])
async def test_names_that_do_not(store: Any, name: str) -> None:
    with pytest.raises(UnexpectedResponse, match="Validation error") as caught:
        await store.async_insert([node("1", "tea")], name)
    assert caught.value.status_code == 422


async def test_what_is_refused(store: Any, client: AsyncQdrantClient) -> None:
    await store.async_insert([node("1", "tea")], "w")
    with pytest.raises(UnexpectedResponse, match="expected dim: 64, got 3"):
        await client.upsert("w", [models.PointStruct(id=1, vector=[1.0] * 3)])
    with pytest.raises(UnexpectedResponse, match="not a valid point ID"):
        await client.upsert("w", [models.PointStruct(id="x", vector=[1.0] * 64)])
    with pytest.raises(UnexpectedResponse, match="limit"):
        await client.query_points("w", [1.0] * 64, limit=0)
    many = [node(f"n{number}", "x" * 2**20) for number in range(33)]
    with pytest.raises(UnexpectedResponse, match="larger than allowed"):
        await store.async_insert(many, "w")
    assert len(await store.async_list_workspace_nodes("w")) == 1


async def test_the_client_reads_more(store: Any, client: AsyncQdrantClient) -> None:
    await store.async_insert([node("1", "tea", kind="a"), node("2", "milk", kind="b")], "w")
    info = await client.get_collection("w")
    assert info.points_count == 2
    kind_b = models.Filter(
        must_not=[models.FieldCondition(key="metadata.kind", match=models.MatchValue(value="a"))]
    )
    points, _ = await client.scroll("w", scroll_filter=kind_b)
    assert [point.payload["original_id"] for point in points if point.payload] == ["2"]
    near = await client.query_points("w", embedding("tea", 64), score_threshold=0.9)
    assert [point.score for point in near.points] == [pytest.approx(1.0)]
    await client.delete("w", models.FilterSelector(filter=kind_b))
    assert ids(await store.async_list_workspace_nodes("w")) == ["1"]
    assert [each.name for each in (await client.get_collections()).collections] == ["w"]


async def test_what_goes_wrong_surfaces(store: Any, server: QdrantServer) -> None:
    await store.async_insert([node("1", "tea")], "w")
    server.fail("/points/query", 500, times=1)
    with pytest.raises(UnexpectedResponse, match="failure 500"):
        await store.async_search("tea", "w")
    server.cut("PUT ", 1, after=True)
    with pytest.raises(ResponseHandlingException):
        await store.async_insert([node("2", "tea")], "w")
    assert len(await store.async_list_workspace_nodes("w")) == 2


async def test_keys(server: QdrantServer) -> None:
    with QdrantServer(api_key="secret") as locked:
        client = AsyncQdrantClient(url=locked.url, check_compatibility=False)
        with pytest.raises(UnexpectedResponse) as caught:
            await client.collection_exists("w")
        assert caught.value.status_code == 401
        await client.close()
