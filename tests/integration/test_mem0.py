"""The mem0 backend in a fleet: real workers, the real library, a loopback OpenAI server."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from recallq import (
    BackendError,
    BackendUnavailable,
    JobHandle,
    JobState,
    MemoryClient,
    Message,
)
from tests.conftest import no_blocking
from tests.loopback.mem0_api import Mem0Server
from tests.loopback.openai_api import OpenAIServer
from tests.support import Worker, eventually, redis_at

CHAT, EMBEDDINGS = "/v1/chat", "/v1/embeddings"

StartMem0 = Callable[..., Worker]


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=256) as server:
        yield server


@pytest.fixture
def platform() -> Iterator[Mem0Server]:
    with Mem0Server(processing_time=0.5) as platform:
        yield platform


@pytest.fixture
def start_mem0(
    server: OpenAIServer, redis_url: str, start_worker: Callable[..., Worker]
) -> StartMem0:
    def start(**options: Any) -> Worker:
        models = {
            f"{kind}_{name}": value
            for kind in ("llm", "embedding")
            for name, value in (("api_key", server.api_key), ("base_url", server.base_url))
        }
        return start_worker(
            **{"backend": "mem0", "embedding_dimensions": 256, "retry_base": 0.2, **models}
            | options
        )

    return start


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace, timeout=60) as memory:
        with no_blocking():
            yield memory


async def texts(client: MemoryClient, user: str) -> list[str]:
    return [each.text for each in await client.list_memory(user, {"page_size": 1000})]


async def state(handle: JobHandle, wanted: JobState) -> None:
    async def reached() -> bool:
        return await handle.status() is wanted

    await eventually(reached)


async def test_the_main_job(client: MemoryClient, start_mem0: StartMem0) -> None:
    await asyncio.to_thread(start_mem0)
    health = await client.check_backend()
    assert (health.ok, health.detail) == (True, "mem0 with redis")
    said = [
        Message.user("I am allergic to peanuts", metadata={"topic": "health"}),
        Message.assistant("Noted."),
    ]
    added = await client.add_memory("ann lee", said, "kitchen")
    assert added.added == 1
    (found,) = await client.search("ann lee", "peanuts", {"top_k": 3})
    assert found.message.text == "I am allergic to peanuts"
    assert found.message.metadata == {"topic": "health"}
    assert (found.session_id, [found.record_id]) == ("kitchen", added.record_ids)
    assert 0 < found.score <= 1
    assert abs(found.created_at.timestamp() - time.time()) < 60
    await client.add_memory("ann lee", ["我喜欢杭州的龙井茶"], "tea")
    assert [hit.session_id for hit in await client.search("ann lee", "龙井")] == ["tea"]
    assert await client.list_memory("ann lee", {"page_size": 1, "page_num": 2}) != []
    assert (await client.submit_delete("ann lee", "kitchen")).id
    assert await client.search("ann", "peanuts") == []
    await client.delete_memory("ann lee")
    assert await texts(client, "ann lee") == []


async def test_messages_as_they_are(
    client: MemoryClient, start_mem0: StartMem0, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_mem0, mem0_infer="false")
    said: list[Any] = [
        Message.user("tea", name="Ann"),
        {"role": "assistant", "content": "green?", "x": {"deep": [1]}},
        {"role": "tool", "content": [{"type": "text", "text": "42"}], "tool_call_id": "c1"},
    ]
    added = await client.add_memory("ann", said)
    assert added.added == 3
    listed = await client.list_records("ann")
    assert [each.record_id for each in listed] == added.record_ids
    assert listed[0].message == said[0]
    assert [each.message.model_dump(exclude_none=True) for each in listed[1:]] == [
        Message.model_validate(each).model_dump(exclude_none=True) for each in said[1:]
    ]
    assert (server.chats, server.embedding_calls) == (0, 1)
    await client.add_memory("ann", "and a fact", infer=True)
    assert server.chats == 1


async def test_five_hundred_adds_of_twenty_users(
    client: MemoryClient, start_mem0: StartMem0, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_mem0)
    keys = client.transport.keys
    with server.hold(CHAT):
        handles = await asyncio.gather(
            *(client.submit_add(f"user-{n % 20}", f"fact {n:03}") for n in range(500))
        )
        async with redis_at(client.settings.redis_url) as redis:

            async def all_wait() -> bool:
                tags = [keys.user_tag("default", f"user-{n}") for n in range(20)]
                return sum([await redis.zcard(keys.waiting(tag)) for tag in tags]) == 500

            await eventually(all_wait)
    server.latency[CHAT] = 0.5
    results = await asyncio.gather(*(each.result(60) for each in handles))
    assert sum(each.added for each in results) == 500
    assert server.chats <= 60
    for user in range(20):
        mine = [f"fact {n:03}" for n in range(user, 500, 20)]
        assert await texts(client, f"user-{user}") == mine


async def test_fifty_users_at_once_and_searches_beside_them(
    client: MemoryClient, start_mem0: StartMem0, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_mem0)
    await client.add_memory("reader", "green tea")
    with server.hold(CHAT):
        handles = [await client.submit_add(f"user-{n}", "x") for n in range(50)]
        await asyncio.to_thread(server.wait_for_request, CHAT, 51)
        for _ in range(10):  # before any of the extractions has come to its end
            assert len(await client.search("reader", "tea")) == 1
    await asyncio.gather(*(handle.result(30) for handle in handles))
    assert server.most_in_flight["/v1/chat/completions"] == 50


async def test_trouble_that_passes(
    client: MemoryClient, start_mem0: StartMem0, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_mem0)
    server.fail(CHAT, 429, times=1, headers={"Retry-After": "4"})
    began = time.monotonic()
    first = asyncio.create_task(client.add_memory("ann", "one"))
    await asyncio.to_thread(server.wait_for_request, CHAT)
    second = asyncio.create_task(client.add_memory("ann", "two"))
    await client.add_memory("bob", "unharmed")
    assert not first.done()
    assert not second.done()
    await asyncio.gather(first, second)
    assert time.monotonic() - began > 4
    server.answers.append("This is not JSON.")
    await client.add_memory("ann", "three")
    assert await texts(client, "ann") == ["one", "two", "three"]


async def test_trouble_that_stays_ends_as_a_dead_letter(
    client: MemoryClient, start_mem0: StartMem0, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_mem0, slow_attempts=3, retry_base=0.1)
    server.fail(CHAT, 500)
    with pytest.raises(BackendUnavailable, match="extracting memories with mem0: HTTP 500"):
        await client.add_memory("ann", "tea")
    assert server.chats == 3
    (letter,) = await client.dead_letters.list("ann")
    assert (letter.attempts, len(letter.history)) == (3, 2)
    server.clear_faults()
    replayed = await client.dead_letters.replay(letter)
    assert (await replayed.result(30)).added == 1
    assert await texts(client, "ann") == ["tea"]
    server.api_key = "sk-another"
    with pytest.raises(BackendError, match="check the key"):
        await client.add_memory("ann", "coffee")


async def test_a_user_who_is_deleted_while_the_llm_thinks(
    client: MemoryClient, start_mem0: StartMem0, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_mem0)
    with server.hold(CHAT):
        handle = await client.submit_add("ann", "old")
        await asyncio.to_thread(server.wait_for_request, CHAT)
        await client.delete_memory("ann")  # while it is held
        assert await texts(client, "ann") == []
        newer = await client.submit_add("ann", "new")
        await asyncio.to_thread(server.wait_for_request, CHAT, 2)
    assert (await handle.result(30)).added == 0
    assert (await newer.result(30)).added == 1
    await asyncio.sleep(1)
    assert await texts(client, "ann") == ["new"]


async def test_the_platform(
    platform: Mem0Server, client: MemoryClient, start_worker: Callable[..., Worker]
) -> None:
    await asyncio.to_thread(
        lambda: start_worker(
            backend="mem0",
            mem0_mode="platform",
            mem0_host=platform.url,
            mem0_api_key=platform.api_key,
        )
    )
    with platform.hold("/v3/memories/add"):
        handle = await client.submit_add("ann lee", ["I like tea", "and coffee"], "s")
        await state(handle, JobState.RUNNING)
    assert (await handle.result(30)).added == 2
    assert Counter(await texts(client, "ann lee")) == Counter(["I like tea", "and coffee"])
    (hit, *_) = await client.search("ann lee", "tea")
    assert (hit.message.text, hit.session_id) == ("I like tea", "s")
    await client.delete_memory("ann lee")
    assert await texts(client, "ann lee") == []
    platform.fail("/v3/memories/add", 429, times=1, headers={"Retry-After": "1"})
    assert (await client.add_memory("bob", "milk")).added == 1


class TestWorkersThatEnd:
    async def test_workers_that_are_killed_in_the_middle(
        self, client: MemoryClient, start_mem0: StartMem0, server: OpenAIServer
    ) -> None:
        """Every fact once and in order, whatever was killed when."""
        victim = await asyncio.to_thread(start_mem0)
        await asyncio.to_thread(start_mem0)
        server.latency[CHAT] = 0.3
        handles = []
        for round_ in range(3):
            handles += await asyncio.gather(
                *(client.submit_add(f"user-{n % 10}", f"{round_} {n:02}") for n in range(50))
            )
            await asyncio.to_thread(server.wait_for_request, CHAT, server.chats + 5)
            await asyncio.to_thread(victim.kill)
            await asyncio.to_thread(victim.start)
        results = await asyncio.gather(*(handle.result(90) for handle in handles))
        assert sum(each.added for each in results) == 150
        for user in range(10):
            wanted = [f"{round_} {n:02}" for round_ in range(3) for n in range(user, 50, 10)]
            assert await texts(client, f"user-{user}") == wanted

    async def test_a_worker_that_is_stopped_does_not_wait_for_the_llm(
        self, client: MemoryClient, start_mem0: StartMem0, server: OpenAIServer
    ) -> None:
        worker = await asyncio.to_thread(start_mem0, slow_patience=0.5)
        server.hang(CHAT, 100, times=1)
        handle = await client.submit_add("ann", "tea")
        await asyncio.to_thread(server.wait_for_request, CHAT)
        worker.signal(signal.SIGTERM)
        await asyncio.to_thread(worker.wait)
        await asyncio.to_thread(start_mem0)
        assert (await handle.result(30)).added == 1
        assert await texts(client, "ann") == ["tea"]
