"""The main job as its users live it, on pytest-celery's setup: broker, backend and worker nodes."""

from __future__ import annotations

import asyncio

from pytest_celery import CeleryTestSetup

from recallq import JobState, MemoryClient, Message
from tests.support import redis_at


async def test_ingest_search_list_delete(celery_setup: CeleryTestSetup, node_url: str) -> None:
    """Everything that an agent does with its memory, once."""
    assert celery_setup.ready()
    async with MemoryClient(node_url, timeout=60) as memory:
        await memory.add_memory("user1", [Message.user("hello world")], session_id="s1")
        found = await memory.search_memory("user1", [Message.user("hello")], filters={"top_k": 5})
        assert found == [Message.user("hello world")]
        page = await memory.list_memory("user1", filters={"page_size": 10, "page_num": 1})
        assert page == found
        assert (await memory.delete_memory("user1", "s1")).removed == 1
        assert await memory.list_memory("user1") == []


async def test_jobs_travel_on_celery_queues_and_settle_in_the_result_backend(
    celery_setup: CeleryTestSetup, node_url: str
) -> None:
    """Nothing but Celery carries them: with the worker gone they wait on the queue, as messages."""
    assert celery_setup.ready()
    celery_setup.worker.kill("SIGKILL")
    async with MemoryClient(node_url, timeout=60) as memory:
        handles = await asyncio.gather(
            *(memory.submit_add("user1", f"message {n}", lane="bulk") for n in range(10))
        )
        async with redis_at(node_url) as redis:
            assert await redis.llen("recallq.bulk") >= 1
        celery_setup.worker.restart()
        await asyncio.gather(*(handle.result(60) for handle in handles))
        async with redis_at(node_url) as redis:
            assert await redis.llen("recallq.bulk") == 0
            batch_id = handles[0].id.rpartition("-")[0]
            assert await redis.exists(f"recallq:celery-task-meta-{batch_id}")
            assert await redis.zcard("recallq:ledger") == 0
        assert len(await memory.list_memory("user1")) == 10


async def test_memories_survive_worker_and_redis(
    celery_setup: CeleryTestSetup, node_url: str
) -> None:
    """Restarting everything loses no memory that was stored."""
    assert celery_setup.ready()
    async with MemoryClient(node_url, timeout=60) as memory:
        handle = await memory.submit_add("user1", "kept", "s1")
        await handle.result(60)
    celery_setup.worker.kill("SIGTERM")
    celery_setup.broker.restart()
    celery_setup.worker.restart()
    async with MemoryClient(node_url, timeout=60) as memory:
        assert [message.text for message in await memory.list_memory("user1")] == ["kept"]
        assert await memory.handle(handle.id).status() is JobState.SUCCEEDED


async def test_a_worker_told_to_stop_finishes_what_it_holds(
    celery_setup: CeleryTestSetup, node_url: str
) -> None:
    """SIGTERM in the middle of work: what was begun is answered, the rest waits for the next."""
    assert celery_setup.ready()
    async with MemoryClient(node_url, timeout=60) as memory:
        calls = [
            asyncio.create_task(memory.add_memory(f"user{n % 20}", f"message {n}"))
            for n in range(500)
        ]
        await asyncio.sleep(0.01)
        await asyncio.to_thread(celery_setup.worker.kill, "SIGTERM")
        await asyncio.to_thread(celery_setup.worker.restart)
        outcomes = await asyncio.gather(*calls)
        assert sum(outcome.added for outcome in outcomes) == 500
