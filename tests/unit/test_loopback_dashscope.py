"""DashScope's loopback server, driven by DashScope's own SDK."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import dashscope
import pytest
from dashscope.v2 import errors

from tests.loopback.dashscope_api import DashScopeServer, one_missing
from tests.loopback.text import embedding


@pytest.fixture(scope="module")
def _server() -> Iterator[DashScopeServer]:
    with DashScopeServer() as server:
        yield server


@pytest.fixture
def server(_server: DashScopeServer) -> DashScopeServer:
    _server.clear_faults()
    _server.reset_counts()
    return _server


@pytest.fixture
async def client(server: DashScopeServer) -> AsyncIterator[Any]:
    async with dashscope.AsyncClient(
        api_key=server.api_key, base_url=server.base_url, max_retries=0, timeout=10
    ) as client:
        yield client


async def test_texts_become_vectors(server: DashScopeServer, client: Any) -> None:
    answer = await client.embeddings.create(
        model="text-embedding-v4", input=["green tea", "tea"], dimension=256, text_type="query"
    )
    assert [each.index for each in answer.embeddings] == [0, 1]
    assert answer.embeddings[0].embedding == embedding("green tea", 256)
    assert answer.usage.total_tokens == 4
    assert answer.request_id
    assert server.embedded_texts == ["green tea", "tea"]
    assert server.text_types == ["query", "query"]
    answer = await client.embeddings.create(model="text-embedding-v1", input="tea")
    assert len(answer.embeddings[0].embedding) == 1536
    assert server.embedding_calls == 2
    server.reset_counts()
    assert server.embedded_texts == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input": ["x"] * 11}, "should not be larger than 10"),
        ({"model": "text-embedding-v2", "input": ["x"] * 26}, "should not be larger than 25"),
        ({"input": [""]}, r"Range of input length should be \[1, 8192\]"),
        ({"input": ["word " * 8000]}, r"Range of input length should be \[1, 8192\]"),
        ({"model": "text-embedding-v1", "input": ["word " * 2000]}, r"\[1, 2048\]"),
        ({"dimension": 1000}, "dimension should be in"),
        ({"text_type": "poem"}, "text_type"),
    ],
)
async def test_what_is_beyond_the_limits(
    server: DashScopeServer, client: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(errors.BadRequestError, match=words) as caught:
        await client.embeddings.create(**{"model": "text-embedding-v4", "input": ["x"], **options})
    assert (caught.value.status_code, caught.value.code) == (400, "InvalidParameter")
    assert caught.value.request_id
    assert server.embedded_texts == []


async def test_keys_models_and_moderation(server: DashScopeServer, client: Any) -> None:
    async with dashscope.AsyncClient(
        api_key="other", base_url=server.base_url, max_retries=0
    ) as other:
        with pytest.raises(errors.AuthenticationError) as caught:
            await other.embeddings.create(model="text-embedding-v4", input=["x"])
        assert caught.value.code == "InvalidApiKey"
    with pytest.raises(errors.NotFoundError):
        await client.embeddings.create(model="text-embedding-v9", input=["x"])
    server.inappropriate = lambda text: text == "bad"
    with pytest.raises(errors.ContentFilterError):
        await client.embeddings.create(model="text-embedding-v4", input=["x", "bad"])


async def test_faults_and_spoiled_answers(server: DashScopeServer, client: Any) -> None:
    async def ask() -> Any:
        return await client.embeddings.create(model="text-embedding-v4", input=["x", "y"])

    server.fail("embeddings", 429, times=1, headers={"Retry-After": "9"})
    with pytest.raises(errors.RateLimitError) as caught:
        await ask()
    assert caught.value.code == "Throttling.RateQuota"
    assert caught.value.headers["retry-after"] == "9"
    server.fail("embeddings", 503, times=1)
    with pytest.raises(errors.ServiceUnavailableError):
        await ask()
    server.spoil.append(one_missing)
    assert len((await ask()).embeddings) == 1
    assert len((await ask()).embeddings) == 2
