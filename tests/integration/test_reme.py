"""The ReMe backends in a fleet: real workers, the real library, a loopback OpenAI server."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recallq import BackendError, BackendUnavailable, JobHandle, MemoryClient, Message
from tests.conftest import no_blocking
from tests.loopback.openai_api import OpenAIServer
from tests.loopback.reme_prompts import ReMeAnswers
from tests.support import Worker, eventually, redis_at

CHAT, EMBEDDINGS = "/v1/chat", "/v1/embeddings"

StartReme = Callable[..., Worker]


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        server.answer = ReMeAnswers()
        yield server


@pytest.fixture
def kind() -> str:
    return "personal"


both_kinds = pytest.mark.parametrize("kind", ["personal", "task"])


def flow_variables(server: OpenAIServer) -> dict[str, str]:
    """As ReMe's users set them."""
    return {
        f"FLOW_{model}_{name}": value
        for model in ("LLM", "EMBEDDING")
        for name, value in (("API_KEY", server.api_key), ("BASE_URL", server.base_url))
    }


@pytest.fixture
def start_reme(
    kind: str, server: OpenAIServer, tmp_path: Path, start_worker: Callable[..., Worker]
) -> StartReme:
    def start(**options: Any) -> Worker:
        return start_worker(
            backend=f"reme_{kind}",
            environment=flow_variables(server),
            directory=tmp_path,
            **{"embedding_dimensions": 256, "retry_base": 0.2} | options,
        )

    return start


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace, timeout=60) as memory:
        with no_blocking():
            yield memory


async def texts(client: MemoryClient, user: str, session: str | None = None) -> list[str]:
    filters = {"page_size": 1000} | ({"session_id": session} if session else {})
    return [each.text for each in await client.list_memory(user, filters)]


@both_kinds
async def test_one_worker_adds_and_another_reads(
    client: MemoryClient, start_reme: StartReme, tmp_path: Path
) -> None:
    """What one process has stored, another finds, lists and deletes, and a third after them."""
    adder = await asyncio.to_thread(start_reme)
    health = await client.check_backend()
    assert health.ok
    assert "ReMe 0.3.1.10, imported in" in health.detail
    assert "vectors in Redis, text-embedding-v4, 256 dimensions" in health.detail
    said = [
        Message.user("I am allergic to peanuts", metadata={"topic": "health"}),
        Message.assistant("Noted."),
    ]
    added = await client.add_memory("ann lee", said, "kitchen")
    assert added.added == 1
    await client.add_memory("ann lee", ["我喜欢杭州的龙井茶"], "tea")
    await client.add_memory("ann lee", [f"item {n} is blue" for n in range(3)], "list")
    everything = await texts(client, "ann lee")
    await asyncio.to_thread(adder.kill)

    reader = await asyncio.to_thread(start_reme)
    (found, *_) = await client.search("ann lee", "peanuts", {"top_k": 3})
    assert found.message.text == "I am allergic to peanuts"
    assert found.message.metadata == {"topic": "health"}
    assert (found.session_id, [found.record_id]) == ("kitchen", added.record_ids)
    assert 0 < found.score <= 1
    assert abs(found.created_at.timestamp() - time.time()) < 60
    best, *_ = await client.search("ann lee", "龙井")
    assert best.session_id == "tea"
    assert everything[:2] == ["I am allergic to peanuts", "我喜欢杭州的龙井茶"]
    pages = [
        each.text
        for number in range(1, 6)
        for each in await client.list_memory("ann lee", {"page_size": 1, "page_num": number})
    ]
    assert pages == everything
    assert await client.search("ann", "peanuts") == []
    await client.delete_memory("ann lee", "kitchen")
    assert await texts(client, "ann lee", "kitchen") == []
    await asyncio.to_thread(reader.kill)

    await asyncio.to_thread(start_reme)
    assert await texts(client, "ann lee") == everything[1:]
    await client.delete_memory("ann lee")
    assert await texts(client, "ann lee") == []
    written = await asyncio.to_thread(lambda: list(tmp_path.iterdir()))
    assert written == [], "somebody wrote into the working directory"


async def test_the_other_kind_is_not_disturbed(
    redis_url: str, namespace: str, start_worker: Callable[..., Worker], server: OpenAIServer
) -> None:
    """Side by side on one Redis, with the same users."""
    for kind in ("personal", "task"):
        await asyncio.to_thread(
            start_worker,
            backend=f"reme_{kind}",
            namespace=f"{namespace}-{kind}",
            environment=flow_variables(server),
        )
    async with (
        MemoryClient(redis_url, namespace=f"{namespace}-personal", timeout=60) as personal,
        MemoryClient(redis_url, namespace=f"{namespace}-task", timeout=60) as task,
    ):
        await asyncio.gather(
            personal.add_memory("ann", "I like green tea"),
            task.add_memory("ann", "Boil the water before you pour it"),
        )
        assert await texts(personal, "ann") == ["I like green tea"]
        assert await texts(task, "ann") == ["Boil the water before you pour it"]
        await personal.delete_memory("ann")
        assert await texts(personal, "ann") == []
        assert len(await task.search("ann", "water")) == 1


@both_kinds
async def test_what_waits_is_merged(
    client: MemoryClient, start_reme: StartReme, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_reme)
    facts = ["tea is green", "Kitty purrs", "trains run late", "snow fell", "Bob sings"]
    with server.hold(CHAT):
        first = await client.submit_add("ann", "hold the door")
        await asyncio.to_thread(server.wait_for_request, CHAT)
        handles = [await client.submit_add("ann", text) for text in facts]
        keys = client.transport.keys

        async with redis_at(client.settings.redis_url) as redis:

            async def all_wait() -> bool:
                waiting = keys.waiting(keys.user_tag("default", "ann"))
                return bool(await redis.zcard(waiting) == 1 + len(facts))

            await eventually(all_wait)
    assert (await first.result(30)).added == 1
    results = [await handle.result(30) for handle in handles]
    assert [each.merged for each in results] == [len(facts)] * len(facts)
    assert sorted(await texts(client, "ann")) == sorted(["hold the door", *facts])


async def test_trouble_that_passes(
    client: MemoryClient, start_reme: StartReme, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_reme)
    server.fail(CHAT, 429, times=1, headers={"Retry-After": "2"})
    began = time.monotonic()
    await client.add_memory("ann", "one is red")
    assert time.monotonic() - began > 2
    server.fail(EMBEDDINGS, 500, times=4)
    await client.add_memory("ann", "two is blue")
    server.answers.append("")
    await client.add_memory("ann", "three is green")
    assert await texts(client, "ann") == ["one is red", "two is blue", "three is green"]


async def test_trouble_that_stays_ends_as_a_dead_letter(
    client: MemoryClient, start_reme: StartReme, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_reme, slow_attempts=3, retry_attempts=3, retry_base=0.1)
    server.fail(CHAT, 500)
    with pytest.raises(BackendUnavailable, match=r"the LLM qwen3\S+ at 127\.0\.0\.1:\d+: HTTP 500"):
        await client.add_memory("ann", "tea is green")
    assert server.chats == 3
    (letter,) = await client.dead_letters.list("ann")
    assert (letter.attempts, len(letter.history)) == (3, 2)
    server.clear_faults()
    replayed = await client.dead_letters.replay(letter)
    assert (await replayed.result(30)).added == 1
    assert await texts(client, "ann") == ["tea is green"]
    server.fail(EMBEDDINGS, 500)
    with pytest.raises(BackendUnavailable, match="embedding with"):
        await client.search("ann", "water", timeout=30)
    server.clear_faults()
    server.api_key = "sk-another"
    with pytest.raises(BackendError, match="check the key"):
        await client.add_memory("ann", "coffee is black")


async def test_a_user_who_is_deleted_while_the_llm_thinks(
    client: MemoryClient, start_reme: StartReme, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_reme)
    with server.hold(CHAT):
        handle = await client.submit_add("ann", "old is gold")
        await asyncio.to_thread(server.wait_for_request, CHAT)
        await client.delete_memory("ann")  # while it is held
        assert await texts(client, "ann") == []
        newer = await client.submit_add("ann", "new is blue")
        await asyncio.to_thread(server.wait_for_request, CHAT, 2)
    assert (await handle.result(30)).added == 0
    assert (await newer.result(30)).added == 1
    assert await texts(client, "ann") == ["new is blue"]


async def test_messages_as_they_are(
    client: MemoryClient, start_reme: StartReme, server: OpenAIServer
) -> None:
    await asyncio.to_thread(start_reme, reme_infer="false")
    said: list[Any] = [
        Message.user("tea", name="Ann"),
        {"role": "assistant", "content": "green?", "x": {"deep": [1]}},
    ]
    added = await client.add_memory("ann", said)
    assert added.added == 2
    listed = await client.list_records("ann")
    assert [each.record_id for each in listed] == added.record_ids
    assert listed[0].message == said[0]
    assert (server.chats, server.embedding_calls) == (0, 1)
    with pytest.raises(BackendError, match="RECALLQ_REME_INFER is off"):
        await client.add_memory("ann", "and a fact", infer=True)


class TestWorkersThatEnd:
    async def test_workers_that_are_killed_in_the_middle(
        self, client: MemoryClient, start_reme: StartReme, server: OpenAIServer
    ) -> None:
        """Every fact once and in order, whatever was killed when."""
        victim = await asyncio.to_thread(start_reme)
        await asyncio.to_thread(start_reme)
        server.latency[CHAT] = 0.2
        handles: list[JobHandle] = []
        for round_ in range(2):
            handles += await asyncio.gather(
                *(client.submit_add(f"user-{n}", f"fact{round_} of{n}") for n in range(10))
            )
            await asyncio.to_thread(server.wait_for_request, CHAT, server.chats + 5)
            await asyncio.to_thread(victim.kill)
            await asyncio.to_thread(victim.start)
        results = await asyncio.gather(*(handle.result(90) for handle in handles))
        assert sum(each.added for each in results) == 20
        for user in range(10):
            assert await texts(client, f"user-{user}") == [f"fact{n} of{user}" for n in range(2)]

    async def test_a_worker_that_is_stopped_does_not_wait_for_the_llm(
        self, client: MemoryClient, start_reme: StartReme, server: OpenAIServer
    ) -> None:
        worker = await asyncio.to_thread(start_reme, slow_patience=0.5)
        server.hang(CHAT, 100, times=1)
        handle = await client.submit_add("ann", "tea is green")
        await asyncio.to_thread(server.wait_for_request, CHAT)
        worker.signal(signal.SIGTERM)
        await asyncio.to_thread(worker.wait)
        await asyncio.to_thread(start_reme)
        assert (await handle.result(30)).added == 1
        assert await texts(client, "ann") == ["tea is green"]
