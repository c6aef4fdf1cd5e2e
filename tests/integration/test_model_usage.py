"""What models are asked for, as workers tell it, against what the provider counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from recallq import BackendUnavailable, MemoryClient
from tests.integration.test_reme import flow_variables
from tests.loopback.openai_api import CHAT, OpenAIServer
from tests.loopback.reme_prompts import ReMeAnswers
from tests.scraping import Samples, addresses, scraped, value
from tests.support import Worker

StartWorker = Callable[..., Worker]


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=256) as server:
        yield server


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace, timeout=60) as memory:
        yield memory


def models(server: OpenAIServer) -> dict[str, Any]:
    both = (("api_key", server.api_key), ("base_url", server.base_url))
    return {f"{kind}_{name}": value for kind in ("llm", "embedding") for name, value in both}


def told(samples: Samples, backend: str, server: OpenAIServer) -> None:
    """What the provider counted."""
    for kind, direction, name in (
        ("llm", "input", "prompt"),
        ("llm", "output", "completion"),
        ("embedding", "input", "embedding"),
    ):
        labels = {"backend": backend, "kind": kind, "direction": direction}
        assert value(samples, "recallq_model_tokens_total", **labels) == server.spent[name], labels


def calls(samples: Samples, backend: str, kind: str, outcome: str) -> float:
    labels = {"backend": backend, "kind": kind, "outcome": outcome}
    return value(samples, "recallq_model_calls_total", **labels)


@pytest.mark.parametrize("backend", ["mem0", "reme_personal"])
async def test_what_extractions_cost(
    backend: str,
    client: MemoryClient,
    server: OpenAIServer,
    start_worker: StartWorker,
    tmp_path: Any,
) -> None:
    given = models(server)
    if backend != "mem0":
        server.answer = ReMeAnswers()
        given = {"environment": flow_variables(server), "directory": tmp_path}
    await asyncio.to_thread(
        lambda: start_worker(
            backend=backend, http_port=0, embedding_dimensions=256, retry_base=0.1,
            slow_attempts=2, **given,
        )
    )  # fmt: skip
    await client.add_memory("ann", "I am allergic to peanuts")
    await client.add_memory("ann", "my cat is called Kitty")
    assert await client.search("ann", "peanuts") != []
    (address,) = await addresses(client)
    samples = await scraped(address)
    told(samples, backend, server)
    assert server.spent["prompt"] > 0
    assert server.spent["embedding"] > 0
    assert calls(samples, backend, "llm", "ok") == server.chats
    assert calls(samples, backend, "embedding", "ok") >= 2
    assert value(samples, "recallq_embedded_texts_total", backend=backend, source="model") >= 2
    server.fail(CHAT, 500)
    with pytest.raises(BackendUnavailable):
        await client.add_memory("ann", "this comes to nothing")
    samples = await scraped(address)
    told(samples, backend, server)
    assert calls(samples, backend, "llm", "error") == 2


async def test_a_server_that_does_not_count_streams(
    client: MemoryClient, server: OpenAIServer, start_worker: StartWorker, tmp_path: Any
) -> None:
    server.answer, server.counts_streams = ReMeAnswers(), False
    await asyncio.to_thread(
        lambda: start_worker(
            backend="reme_personal", http_port=0, embedding_dimensions=256,
            environment=flow_variables(server), directory=tmp_path,
        )
    )  # fmt: skip
    for text in ("tea is green", "Bob sings"):
        assert (await client.add_memory("ann", text)).added == 1
    refused = [each for each in server.requests_to(CHAT) if "stream_options" in each.body]
    assert len(refused) == 1
    (address,) = await addresses(client)
    assert calls(await scraped(address), "reme_personal", "llm", "ok") == server.chats - 1


async def test_what_searching_by_meaning_costs(
    client: MemoryClient, server: OpenAIServer, start_worker: StartWorker
) -> None:
    await asyncio.to_thread(
        lambda: start_worker(
            backend="redis", search_strategy="hybrid", http_port=0, embedding_dimensions=256,
            **models(server),
        )
    )  # fmt: skip
    for _ in range(3):
        await client.add_memory("ann", "tea is green", wait="searchable")
    (address,) = await addresses(client)
    samples = await scraped(address)
    told(samples, "redis", server)
    assert calls(samples, "redis", "embedding", "ok") == server.embedding_calls
    texts = {
        source: value(samples, "recallq_embedded_texts_total", backend="redis", source=source)
        for source in ("model", "cache")
    }
    assert texts == {"model": 1, "cache": 2}
