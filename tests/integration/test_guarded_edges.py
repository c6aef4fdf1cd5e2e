"""Edges at which jobs could be lost, doubled or told wrongly, each with what must hold there."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable

import orjson
import pytest
from celery import Celery

from recallq import ClientClosed, JobState, MemoryClient, UnknownJob
from recallq.contract import JobRef
from recallq.keys import Keys
from recallq_worker.app import celery_url
from recallq_worker.backends.redis import RedisStore
from recallq_worker.single_process import OwnerLease
from tests.contract.store_conformance import record
from tests.support import Worker, eventually, redis_at


@pytest.mark.parametrize("attempt", range(3))  # the order in which a worker's parts stop varies
async def test_a_worker_that_is_told_to_stop_finishes_its_job(
    redis_url: str,
    namespace: str,
    start_worker: Callable[..., Worker],
    user: str,
    attempt: int,
) -> None:
    worker = await asyncio.to_thread(start_worker, backend="obedient")
    async with MemoryClient(redis_url, namespace=namespace) as client:
        handle = await client.submit_add(user, f"sleep 1.{attempt}")

        async def begun() -> bool:  # or done already, on a machine that stalled meanwhile
            return await handle.status() in (JobState.RUNNING, JobState.SUCCEEDED)

        await eventually(begun)
        worker.signal(signal.SIGTERM)
        assert (await handle.result(30)).added == 1
        assert await asyncio.to_thread(worker.wait) == 0


async def test_a_settled_delete_that_comes_again_deletes_nothing(
    redis_url: str, namespace: str, start_worker: Callable[..., Worker], user: str
) -> None:
    """Even when its result has expired: the message says that the ledger knew it."""
    keys = Keys(namespace)
    async with MemoryClient(redis_url, namespace=namespace) as client:
        handle = await client.submit_delete(user)
        batch_id = JobRef.parse(handle.id).batch_id
        async with redis_at(redis_url) as redis:
            message = await redis.lindex(f"{namespace}.live", 0)
            await asyncio.to_thread(start_worker)
            await handle.result(30)
            await client.add_memory(user, "after the delete")
            await redis.delete(keys.result(batch_id))
            assert message is not None
            await redis.lpush(f"{namespace}.live", message)

            async def taken() -> bool:
                return not await redis.llen(f"{namespace}.live")

            await eventually(taken)
        assert await client.health(timeout=30)  # behind it in the queue
        assert len(await client.list_memory(user)) == 1


def test_a_late_part_of_an_answer_replaces_no_answer(redis_url: str, namespace: str) -> None:
    """Two workers that ran the same batch: the first to finish has answered it."""
    app = Celery(set_as_current=False)
    app.conf.update(
        result_backend="recallq_worker.results:ResultBackend+" + redis_url,
        result_backend_transport_options={"global_keyprefix": "recallq:"},
    )
    backend = app.backend
    task_id = f"0123456789abcdef-{int(time.time()):x}"
    for state, answer in (("PARTIAL", 1), ("SUCCESS", 2), ("PARTIAL", 3), ("SUCCESS", 4)):
        backend.store_result(task_id, {"answer": answer}, state)
    assert backend.get_result(task_id) == {"answer": 2}
    app.close()


async def test_a_lease_that_another_machine_has_taken_is_lost_at_once(
    redis_url: str, namespace: str
) -> None:
    key = Keys(namespace).backend_owner("in_memory")
    async with redis_at(redis_url) as redis:
        mine = OwnerLease(redis, key, "in_memory", "me")
        await mine.acquire()
        assert await mine.renew()
        await redis.set(key, orjson.dumps({"worker": "w", "host": "elsewhere", "pid": 1}))
        assert not await mine.renew()
        began = time.monotonic()
        with pytest.raises(Exception, match="elsewhere"):
            await mine.acquire(patience=0)
        assert time.monotonic() - began < 5


async def test_without_a_ttl_memories_stay_that_were_to_expire(
    redis_url: str, namespace: str, user: str
) -> None:
    expiring = RedisStore(redis_url, namespace=namespace, ttl=100)
    lasting = RedisStore(redis_url, namespace=namespace)
    for store in (expiring, lasting):
        await store.start()
        await store.add([record(user)])
        await store.stop()
    async with redis_at(redis_url) as redis:
        async for key in redis.scan_iter(f"{namespace}:m:*"):
            assert await redis.ttl(key) == -1, key


async def test_cancelling_a_job_that_its_batch_does_not_have_is_an_error(
    redis_url: str, namespace: str, user: str
) -> None:
    async with MemoryClient(redis_url, namespace=namespace) as client:
        handle = await client.submit_add(user, "tea")
        stranger = client.handle(handle.id.rpartition("-")[0] + "-777")
        with pytest.raises(UnknownJob):
            await stranger.cancel()


async def test_waiting_for_anothers_job_ends_with_the_client(
    redis_url: str, namespace: str, user: str
) -> None:
    async with MemoryClient(redis_url, namespace=namespace) as submitter:
        handle = await submitter.submit_add(user, "tea")
        client = MemoryClient(redis_url, namespace=namespace)
        await client.start()
        waiting = asyncio.create_task(client.handle(handle.id).result())
        await asyncio.sleep(0.1)
        await client.stop()
        with pytest.raises(ClientClosed):
            async with asyncio.timeout(30):
                await waiting


async def test_a_start_that_is_cancelled_leaves_nothing_behind(redis_url: str) -> None:
    before = asyncio.all_tasks()
    for delay in (0.0, 0.001, 0.002, 0.004, 0.008):
        client = MemoryClient(redis_url)
        starting = asyncio.create_task(client.start())
        await asyncio.sleep(delay)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await client.stop()
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize(
    ("ours", "celerys"),
    [
        ("redis://h:6379/2", "redis://h:6379/2"),
        ("redis://h?db=3", "redis://h/3"),
        ("redis://:p%40w@h/1", "redis://:p%40w@h/1"),
        ("redis://h/0?username=u&password=p%2Fw", "redis://u:p%2Fw@h/0"),
        ("rediss://h/0", "rediss://h/0?ssl_cert_reqs=required"),
        ("rediss://h/0?ssl_cert_reqs=none", "rediss://h/0?ssl_cert_reqs=none"),
        ("unix:///run/r.sock", "redis+socket:///run/r.sock?virtual_host=0"),
        ("unix://u:p@/run/r.sock?db=2", "redis+socket://u:p@/run/r.sock?virtual_host=2"),
        ("unix:///r.sock?password=p", "redis+socket://:p@/r.sock?virtual_host=0"),
    ],
)
def test_celery_is_told_the_same_redis(ours: str, celerys: str) -> None:
    assert celery_url(ours) == celerys


def test_the_published_batch_says_that_the_ledger_knows_it(redis_url: str, namespace: str) -> None:
    async def publish() -> bytes | str | None:
        async with MemoryClient(redis_url, namespace=namespace) as client:
            await client.submit_add("u", "tea")
        async with redis_at(redis_url) as redis:
            return await redis.lindex(f"{namespace}.live", 0)

    message = json.loads(asyncio.run(publish()) or "{}")
    (payload,), _, _ = json.loads(message["body"])
    assert json.loads(payload)["listed"] is True
