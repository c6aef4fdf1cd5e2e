"""The slow lane, with an extractor that does what messages tell it, and workers that die of it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from recallq import (
    BackendError,
    JobCancelled,
    JobExpired,
    JobHandle,
    JobState,
    MemoryClient,
    WorkerLost,
)
from recallq.contract import AddJob, JobRef, decode_batch
from recallq.embedded import EmbeddedRedis
from recallq.keys import Keys
from recallq.redis_client import RedisClient
from recallq_worker.ledger import WorkerLedger
from recallq_worker.slow_ledger import Handover, SlowLedger, Turn
from tests.support import Worker, eventually, redis_at

StartWorker = Callable[..., Worker]
EXTRACTOR = "extractor"


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace, timeout=60) as memory:
        yield memory


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[RedisClient]:
    async with redis_at(redis_url) as redis:
        yield redis


@pytest.fixture
async def worker(start_worker: StartWorker) -> Worker:
    return await asyncio.to_thread(start_worker, backend=EXTRACTOR, retry_base=0.2)


@pytest.fixture
async def bulk(start_worker: StartWorker) -> Worker:
    """The only worker of the bulk lane, which is frozen. Another works on the others."""
    await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="live,slow")
    frozen = await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="bulk")
    frozen.signal(signal.SIGSTOP)
    return frozen


async def texts(client: MemoryClient, user: str, session: str | None = None) -> list[str]:
    filters = {"page_size": 1000} | ({"session_id": session} if session else {})
    return [each.text for each in await client.list_memory(user, filters)]


async def extractions(client: MemoryClient) -> list[dict[str, Any]]:
    """What each extraction was about, in the order in which they began."""
    async with redis_at(client.settings.redis_url) as redis:
        key = f"{client.settings.namespace}:extractions"
        return [orjson.loads(each) for each in await redis.lrange(key, 0, -1)]


async def begun(client: MemoryClient, count: int) -> None:
    """Waits until so many extractions have begun.

    That an add is running says less: it is so already while a worker takes it to the slow lane,
    where it is queued again.
    """

    async def enough() -> bool:
        return len(await extractions(client)) >= count

    await eventually(enough)


async def parked(client: MemoryClient, user: str, count: int) -> None:
    """Waits until so many of a user's jobs have come to the slow lane, and are not answered."""
    keys = client.transport.keys
    async with redis_at(client.settings.redis_url) as redis:

        async def there() -> bool:
            return await redis.zcard(keys.waiting(keys.user_tag("default", user))) >= count

        await eventually(there)


def place(client: MemoryClient, age: int) -> int:
    """The place of what is submitted so many seconds ago."""
    return client.next_order() - age * 1_000_000


async def release(client: MemoryClient) -> None:
    """Lets go on what lasts ``until released``."""
    async with redis_at(client.settings.redis_url) as redis:
        await redis.set(f"{client.settings.namespace}:released", 1)


async def until_settled(
    client: MemoryClient, handles: Sequence[JobHandle], worker: Worker, deaths: int
) -> None:
    """Starts `worker` again whenever it has died, until all jobs have settled.

    A dead worker's leases run out at once, instead of within seconds: nobody renews them.
    """
    async with redis_at(client.settings.redis_url) as redis:
        while not all([(await each.status()).settled for each in handles]):
            if not worker.is_alive():
                assert deaths > 0, worker.output
                deaths -= 1
                slow = client.transport.keys.slow
                for tag in await redis.zrange(slow, 0, -1):
                    await redis.zadd(slow, {cast("bytes", tag): 0}, xx=True)
                await asyncio.to_thread(worker.launch)
            await asyncio.sleep(0.1)


async def state(handle: JobHandle, wanted: JobState) -> None:
    async def reached() -> bool:
        return await handle.status() is wanted

    await eventually(reached)


async def nothing_is_left(client: MemoryClient) -> None:
    """The slow lane and the ledger hold nothing any more."""
    on_their_way = ("coming", "deleting", "queued", "held", "delayed", "batch")
    ours = ("waiting", "pending", "turn", "slow", *on_their_way)
    namespace = client.settings.namespace
    async with redis_at(client.settings.redis_url) as redis:

        async def clean() -> bool:
            keys = [key.decode() async for key in redis.scan_iter(f"{namespace}:*")]
            # What became of an interrupted turn is remembered for a while.
            keys = [key for key in keys if ":turn:" not in key or await redis.ttl(key) < 0]
            parts = {key.removeprefix(f"{namespace}:").partition(":")[0] for key in keys}
            return not parts.intersection((*ours, "outstanding"))

        await eventually(clean)


class TestMerging:
    async def test_what_waits_for_a_user_is_extracted_together_and_in_order(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        # Batches that are submitted at once come one after the other.
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, slow_pause=1)
        handles = await asyncio.gather(
            *(client.submit_add(f"user-{n % 4}", f"text {n:03}", "s") for n in range(200))
        )
        results = await asyncio.gather(*(each.result(60) for each in handles))
        assert sum(each.added for each in results) == 200
        assert all(each.added <= len(each.record_ids) for each in results)
        for user in range(4):
            mine = [f"text {n:03}" for n in range(user, 200, 4)]
            assert await texts(client, f"user-{user}") == mine
            said = [
                text
                for each in await extractions(client)
                if each["user"] == f"user-{user}"
                for text in each["texts"]
            ]
            assert said == mine
        assert len(await extractions(client)) <= 12
        await nothing_is_left(client)

    async def test_sessions_are_extracted_apart(self, client: MemoryClient, worker: Worker) -> None:
        handles = [await client.submit_add("ann", f"{n}", f"s{n % 2}") for n in range(10)]
        for handle in handles:
            await handle.result(30)
        for each in await extractions(client):
            assert len({int(text) % 2 for text in each["texts"]}) == 1
        assert await texts(client, "ann") == [str(n) for n in range(10)]
        assert await texts(client, "ann", "s1") == ["1", "3", "5", "7", "9"]

    async def test_the_token_budget_bounds_an_extraction(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="live")
        sizes = ["x" * 10, "y" * 10, "z" * 10, "large " * 20, "tail"]
        handles = [await client.submit_add("ann", text) for text in sizes]
        await parked(client, "ann", 5)
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="slow", slow_tokens=25)
        results = [await handle.result(30) for handle in handles]
        assert [len(each["texts"]) for each in await extractions(client)] == [2, 1, 1, 1]
        assert [each.merged for each in results] == [2, 2, 1, 1, 1]
        assert [each.added for each in results] == [1 + 1, 0, 1, 1, 1]

    async def test_a_pause_lets_others_join(
        self, client: MemoryClient, redis: RedisClient, start_worker: StartWorker
    ) -> None:
        """It is long here, and ends early; that it ends by itself, other tests show."""
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, slow_pause=120)
        keys = client.transport.keys
        ann = keys.user_tag("default", "ann")
        first = await client.submit_add("ann", "one")
        await parked(client, "ann", 1)
        due = await redis.zscore(keys.slow, ann)
        second = await client.submit_add("ann", "two")
        await parked(client, "ann", 2)
        assert await redis.zscore(keys.slow, ann) == due, "who joins puts it off"
        await client.add_memory("bob", "as it is", infer=False)  # nothing to wait for
        assert [each["user"] for each in await extractions(client)] == ["bob"]
        assert due is not None
        assert due / 1000 - time.time() <= 120
        await redis.zadd(keys.slow, {ann: 0})
        assert (await first.result(30)).merged == (await second.result(30)).merged == 2


class TestSideBySide:
    async def test_fifty_slow_users_and_searches_beside_them(
        self, client: MemoryClient, worker: Worker, namespace: str
    ) -> None:
        await client.add_memory("reader", "green tea")
        handles = [await client.submit_add(f"user-{n}", f"until released {n}") for n in range(50)]
        await begun(client, 51)
        for _ in range(20):  # before any of the extractions has come to its end
            assert len(await client.search("reader", "tea")) == 1
        assert not any([(await handle.status()).settled for handle in handles])
        await release(client)
        for handle in handles:
            assert (await handle.result(30)).added == 1
        async with redis_at(client.settings.redis_url) as redis:
            assert await redis.zscore(f"{namespace}:most", "users") == 50

    async def test_one_extraction_at_a_time_of_a_user_across_workers(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        """The extractor itself would raise, and its log would show another order."""
        workers = [
            await asyncio.to_thread(start_worker, backend=EXTRACTOR, slow_pause=0) for _ in range(3)
        ]
        handles = []
        for n in range(30):
            handles.append(await client.submit_add("ann", f"sleep 0.05 {n:02}"))
            await asyncio.sleep(0.03)
        for handle in handles:
            await handle.result(60)
        said = [text for each in await extractions(client) for text in each["texts"]]
        assert said == [f"sleep 0.05 {n:02}" for n in range(30)]
        assert await texts(client, "ann") == said
        assert not any("two extractions" in each.output for each in workers)

    async def test_what_was_submitted_before_and_is_on_its_way_yet_is_waited_for(
        self, client: MemoryClient, worker: Worker, namespace: str
    ) -> None:
        """Its message is lost, say, and sent again after some seconds."""
        await client.add_memory("ann", "zero")
        worker.signal(signal.SIGSTOP)
        first = await client.submit_add("ann", "one")
        gone = await client.submit_add("ann", "cancelled")
        async with redis_at(client.settings.redis_url) as redis:
            assert await redis.ltrim(f"{namespace}.live", 1, -1)  # the newest, pushed at the left
            await gone.cancel()
            second = await client.submit_add("ann", "two")
            assert await redis.lrange(f"{namespace}.live", 0, -1)
        worker.signal(signal.SIGCONT)
        assert (await first.result(40)).added + (await second.result(40)).added == 2
        said = [text for each in await extractions(client) for text in each["texts"]]
        assert said == ["zero", "one", "two"]

    @pytest.mark.parametrize("age", [0, 3600], ids=["new", "long queued"])
    async def test_it_is_waited_for_by_workers_who_were_not_there_when_it_was_submitted(
        self, client: MemoryClient, namespace: str, start_worker: StartWorker, age: int
    ) -> None:
        """And however long ago that was: the whole lane may be behind."""
        first = await client.submit_add("ann", "one", order=place(client, age))
        async with redis_at(client.settings.redis_url) as redis:
            message = await redis.rpop(f"{namespace}.live")  # another worker has it, say
            keys = client.transport.keys
            coming = keys.coming(keys.user_tag("default", "ann"))
            assert await redis.ttl(coming) > 7 * 24 * 3600  # or all workers are away for days
            second = await client.submit_add("ann", "two", order=place(client, age))
            await asyncio.to_thread(start_worker, backend=EXTRACTOR)
            await parked(client, "ann", 1)
            await asyncio.sleep(1)
            assert await extractions(client) == []
            await redis.rpush(f"{namespace}.live", cast("bytes", message))
        assert (await first.result(40)).added + (await second.result(40)).added == 2
        assert await texts(client, "ann") == ["one", "two"]

    @pytest.mark.usefixtures("bulk")
    async def test_nobody_waits_for_what_another_lane_is_behind_with(
        self, client: MemoryClient, redis: RedisClient
    ) -> None:
        bulk = await client.submit_add("ann", "one", lane="bulk", order=place(client, 3600))
        keys = client.transport.keys
        assert await redis.zcard(keys.coming(keys.user_tag("default", "ann"))) == 1
        assert (await client.add_memory("ann", "two", timeout=10)).added == 1
        assert await bulk.status() is JobState.QUEUED

    async def test_it_is_not_waited_for_for_ever(
        self, client: MemoryClient, redis: RedisClient, start_worker: StartWorker
    ) -> None:
        """Of a batch that never comes, whatever is the matter with it."""
        await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        await client.add_memory("ann", "zero")
        keys = client.transport.keys
        tag = keys.user_tag("default", "ann")
        never = "0123456789abcdef-1"
        await redis.hset(keys.batch(never), mapping={"s": "queued", "l": "live", "n": "1"})
        await redis.zadd(keys.coming(tag), {f"{never}-0": place(client, 3600)})
        last = await client.submit_add("ann", "last")
        await parked(client, "ann", 1)

        async def is_awaited() -> bool:
            return await redis.hexists(keys.turn(tag), "o")

        await eventually(is_awaited)
        await asyncio.sleep(0.5)
        assert await last.status() is JobState.QUEUED
        awaited, since = cast("bytes", await redis.hget(keys.turn(tag), "o")).decode().split()
        assert awaited == never
        await redis.hset(keys.turn(tag), "o", f"{never} {int(since) - 16_000}")
        assert (await last.result(10)).added == 1
        assert await redis.zcard(keys.coming(tag)) == 0

    async def test_a_search_of_a_killed_worker_waits_for_no_extraction(
        self, client: MemoryClient, redis: RedisClient, namespace: str, start_worker: StartWorker
    ) -> None:
        """Though it may be what has killed the worker."""
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="live,slow")
        slow = await client.submit_add("ben", "until released")
        await begun(client, 1)
        search = await client.submit_search("ann", "tea", lane="bulk")
        batch_id = JobRef.parse(search.id).batch_id
        await redis.hset(client.transport.keys.batch(batch_id), "d", "1")
        await redis.lmove(f"{namespace}.bulk", f"{namespace}.live", "RIGHT", "LEFT")
        assert await search.result(10) == []
        assert await slow.status() is JobState.RUNNING
        await release(client)
        assert (await slow.result(30)).added == 1

    async def test_stores_say_that_nobody_extracts_and_extractors_that_somebody_does(
        self, client: MemoryClient, redis: RedisClient, start_worker: StartWorker
    ) -> None:
        """Whichever takes the place of the other: the word of one that is gone does not last."""
        extracts = client.transport.keys.extracts

        async def say(wanted: bytes) -> None:
            async def said() -> bool:
                return await redis.get(extracts) == wanted

            await eventually(said)

        store = await asyncio.to_thread(start_worker, backend="redis")
        await say(b"0")
        await client.add_memory("ann", "tea")
        keys = client.transport.keys
        assert not await redis.exists(keys.coming(keys.user_tag("default", "ann")))
        await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        await say(b"1")
        await asyncio.sleep(3)  # both give signs of life
        assert await redis.get(extracts) == b"1"
        assert 0 < await redis.ttl(extracts) <= 60
        assert store.is_alive()

    async def test_a_worker_without_the_slow_lane_leaves_it_to_others(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="live")
        handle = await client.submit_add("ann", "tea")
        await parked(client, "ann", 1)
        await asyncio.sleep(0.5)
        assert await handle.status() is JobState.QUEUED
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="slow")
        assert (await handle.result(30)).added == 1

    async def test_a_slow_user_does_not_hold_up_batch_mates(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        slow = asyncio.create_task(client.add_memory("slow", "until released"))
        await asyncio.gather(*(client.add_memory(f"u{n}", "tea") for n in range(20)))
        assert not slow.done()
        await release(client)
        assert (await slow).added == 1


class TestDeletion:
    @pytest.mark.parametrize("session", [None, "s"])
    async def test_a_delete_does_not_wait_for_an_extraction_and_leaves_nothing_of_it(
        self, client: MemoryClient, worker: Worker, session: str | None
    ) -> None:
        running = await client.submit_add("ann", "until released old", "s")
        waiting = await client.submit_add("ann", "old too", "s")
        await begun(client, 1)
        await client.delete_memory("ann", session)
        assert (await running.result(30)).added == 0
        assert (await waiting.result(30)).added == 0
        assert (await client.add_memory("ann", "new", "s")).added == 1
        assert await texts(client, "ann") == ["new"]
        await release(client)
        await asyncio.sleep(1)  # by now the extraction would have come to its end
        assert await texts(client, "ann") == ["new"]
        await nothing_is_left(client)

    async def test_a_delete_that_comes_while_memories_are_stored_removes_them(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, slow_timeout=3)
        handle = await client.submit_add("ann", "hang after storing")

        async def stored() -> bool:
            return await texts(client, "ann") != []

        await eventually(stored)
        await client.delete_memory("ann")
        assert await texts(client, "ann") == []
        await handle.result(30)
        await asyncio.sleep(1)
        assert await texts(client, "ann") == []
        await nothing_is_left(client)

    async def test_another_sessions_adds_survive_it(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        await client.submit_add("ann", "until released old", "s")
        other = await client.submit_add("ann", "sleep 1 other", "t")
        await begun(client, 1)
        await client.delete_memory("ann", "s")
        assert (await other.result(30)).added == 1
        assert await texts(client, "ann") == ["sleep 1 other"]

    async def test_what_was_deleted_while_it_waited_for_another_try(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        handle = await client.submit_add("ann", "fail 1 times, wait 200")
        await begun(client, 1)
        await client.delete_memory("ann")
        assert (await handle.result(30)).added == 0
        assert (await client.add_memory("ann", "new")).added == 1
        assert await texts(client, "ann") == ["new"]

    @pytest.mark.parametrize("how", ["cancelled", "expired"])
    async def test_a_delete_that_has_begun_its_work_comes_to_its_end(
        self, client: MemoryClient, start_worker: StartWorker, how: str
    ) -> None:
        """From the moment on that it reaches the slow lane, older adds are refused."""
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="live")
        old = await client.submit_add("ann", "old")
        await parked(client, "ann", 1)
        deadline = time.time() + 5
        delete = await client.submit_delete("ann", timeout=5 if how == "expired" else None)
        await state(delete, JobState.RUNNING)
        if how == "cancelled":
            assert not await delete.cancel()
        else:
            await asyncio.sleep(deadline + 0.5 - time.time())
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="slow")
        assert (await delete.result(30)).removed == 0
        assert (await old.result(30)).added == 0
        await nothing_is_left(client)

    async def test_a_delete_goes_before_the_rest_of_what_waits(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        first = await client.submit_add("ann", "slow store 1.5", "s0")
        await begun(client, 1)
        handles = [await client.submit_add("ann", f"until released {n}", f"s{n}") for n in range(8)]
        await client.delete_memory("ann", "s0")
        assert not any([(await handle.status()).settled for handle in handles[1:]])
        await release(client)
        for handle in (first, *handles):
            await handle.result(30)
        assert len(await texts(client, "ann")) == 7

    async def test_many_deletes_of_a_user_for_whom_much_waits(
        self, client: MemoryClient, redis: RedisClient, start_worker: StartWorker
    ) -> None:
        async def seconds_of_redis() -> float:
            info = await redis.info("cpu")
            return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="live")
        adds = await asyncio.gather(
            *(client.submit_add("ann", "x" * 500, f"s{n % 100}") for n in range(2000))
        )
        await parked(client, "ann", 2000)
        await redis.slowlog_reset()
        used = -await seconds_of_redis()
        deletes = await asyncio.gather(*(client.submit_delete("ann", f"s{n}") for n in range(64)))
        for delete in deletes:
            await state(delete, JobState.RUNNING)
        used += await seconds_of_redis()
        slowest = max([each["duration"] for each in await redis.slowlog_get(128)], default=0)
        # One that took long without using the processor was only interrupted.
        assert slowest < 300_000 or used < 0.3, "microseconds in one script"
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="slow")
        results = [await each.result(60) for each in adds]
        assert sum(each.added for each in results) == 2000 - 64 * 20
        await nothing_is_left(client)


class TestFailing:
    async def test_tried_again_and_in_order(self, client: MemoryClient, worker: Worker) -> None:
        first = await client.submit_add("ann", "fail 3 times")
        await begun(client, 1)
        second = await client.submit_add("ann", "after it")
        assert (await first.result(30)).added + (await second.result(30)).added == 2
        assert await texts(client, "ann") == ["fail 3 times", "after it"]

    async def test_one_that_fails_for_good_does_not_take_others_with_it(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        handles = [
            await client.submit_add("ann", text) for text in ("one", "please refuse", "three")
        ]
        assert (await handles[0].result(30)).added == 1
        with pytest.raises(BackendError, match="refused, as told"):
            await handles[1].result(30)
        assert await handles[1].status() is JobState.DEAD
        assert (await handles[2].result(30)).added == 1
        assert await texts(client, "ann") == ["one", "three"]
        (letter,) = await client.dead_letters.list("ann")
        assert letter.id == handles[1].id
        assert letter.error == "refused, as told"
        await nothing_is_left(client)

    async def test_a_failure_is_told_while_others_wait_for_what_is_on_its_way(
        self, client: MemoryClient, redis: RedisClient, start_worker: StartWorker
    ) -> None:
        """What was extracted together is told, and not tried for as long as the others wait."""
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="live")
        bad = await client.submit_add("ann", "please refuse")
        good = await client.submit_add("ann", "fine")
        # An add that does not come, submitted before the last: late enough to be waited for as
        # long as the test likes.
        place = client.next_order() + 600_000_000
        keys = client.transport.keys
        coming = keys.coming(keys.user_tag("default", "ann"))
        await redis.zadd(coming, {"0123456789abcdef-1-0": place})
        last = await client.submit_add("ann", "last", order=place + 1)
        await parked(client, "ann", 3)
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="slow", retry_base=0.2)
        with pytest.raises(BackendError, match="refused, as told"):
            await bad.result(20)
        assert await bad.status() is JobState.DEAD
        assert (await good.result(20)).added == 1
        await asyncio.sleep(0.5)  # it is looked again and again whether the other has come
        assert await last.status() is JobState.QUEUED
        said = [each["texts"] for each in await extractions(client)]
        assert said == [["please refuse", "fine"], ["please refuse"], ["fine"]]
        await redis.zrem(coming, "0123456789abcdef-1-0")
        assert (await last.result(30)).added == 1
        assert await texts(client, "ann") == ["fine", "last"]
        assert len(await extractions(client)) == 4
        await nothing_is_left(client)

    async def test_one_by_one_keeps_the_order_too(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        said = ["please refuse", "fail 1 times", "last"]
        handles = await asyncio.gather(*(client.submit_add("ann", text) for text in said))
        with pytest.raises(BackendError):
            await handles[0].result(30)
        for handle in handles[1:]:
            await handle.result(30)
        assert await texts(client, "ann") == said[1:]
        order = [text for each in await extractions(client) for text in each["texts"]]
        assert order[-2:] == ["fail 1 times", "last"]

    async def test_a_wait_that_was_asked_for_is_kept_whatever_is_deleted(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        handle = await client.submit_add("ann", "fail 9 times, wait 4")
        await begun(client, 1)
        for n in range(3):
            await client.delete_memory("ann", f"other {n}")
        assert not (await handle.status()).settled
        await begun(client, 2)
        first, second, *_ = [each["at"] for each in await extractions(client)]
        assert second - first >= 3.9  # it asks for the wait a moment after it began

    async def test_what_can_neither_be_stored_nor_found_is_given_up(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, retry_base=0.05)
        handle = await client.submit_add("ann", "bad store bad recover")
        with pytest.raises(BackendError, match="as told"):
            await handle.result(30)
        assert len(await extractions(client)) == 1
        assert await handle.status() is JobState.DEAD
        await nothing_is_left(client)

    async def test_a_worker_that_dies_of_looking_what_was_stored(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        worker = await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        handle = await client.submit_add("ann", "die half way, die in recover")
        other = await client.submit_add("ann", "behind it")
        await until_settled(client, [handle], worker, deaths=8)
        # Looking is given up. What was half stored may be there twice; nobody's message is lost.
        assert (await handle.result(30)).record_ids
        assert (await other.result(30)).record_ids
        assert "not looked" in worker.output

    async def test_it_is_more_patient_than_other_lanes(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        await asyncio.to_thread(
            start_worker, backend=EXTRACTOR, retry_attempts=2, retry_base=0.05, retry_cap=0.1
        )
        assert (await client.add_memory("ann", "fail 12 times")).added == 1

    async def test_attempts_run_out_and_are_told(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, slow_attempts=3, retry_base=0.05)
        handle = await client.submit_add("ann", "fail 9 times")
        await state(handle, JobState.DEAD)
        (letter,) = await client.dead_letters.list("ann")
        assert letter.attempts == 3
        assert [each["error"] for each in letter.history] == ["backend_unavailable: not yet"] * 2
        assert len(await extractions(client)) == 3

    async def test_a_dead_letter_is_replayed_once(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        first = await asyncio.to_thread(
            start_worker, backend=EXTRACTOR, slow_attempts=1, retry_base=0.05
        )
        handle = await client.submit_add("ann", "fail 1 times")
        await state(handle, JobState.DEAD)
        (letter,) = await client.dead_letters.list("ann")
        once = await client.dead_letters.replay(letter)
        assert (await once.result(30)).added == 1
        twice = await client.dead_letters.replay(letter)
        assert (await twice.result(30)).added == 0
        assert await texts(client, "ann") == ["fail 1 times"]
        assert first.is_alive()

    async def test_a_job_that_kills_its_workers_is_found_and_given_up(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        worker = await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        handles = [await client.submit_add("ann", text) for text in ("one", "exit", "three")]
        await until_settled(client, handles, worker, deaths=10)
        with pytest.raises(WorkerLost):
            await handles[1].result(30)
        assert (await handles[0].result(30)).added == 1
        assert (await handles[2].result(30)).added == 1
        assert await texts(client, "ann") == ["one", "three"]
        await nothing_is_left(client)

    async def test_who_is_beside_it_is_not_blamed(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        """However often their worker dies: once suspected, jobs run with nothing beside them."""
        worker = await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        culprit = await client.submit_add("culprit", "exit")
        others = [await client.submit_add(f"user {n}", "sleep 0.5") for n in range(8)]
        removed = await client.submit_delete("user of a delete", "s")
        await until_settled(client, [culprit, *others, removed], worker, deaths=20)
        with pytest.raises(WorkerLost):
            await culprit.result(30)
        for handle in others:
            assert (await handle.result(30)).added == 1
        assert (await removed.result(30)).removed == 0
        await nothing_is_left(client)


class TestOnce:
    @pytest.mark.parametrize("moment", ["before storing", "half way", "after storing"])
    async def test_a_worker_that_dies(
        self, client: MemoryClient, start_worker: StartWorker, moment: str
    ) -> None:
        """Nothing is lost, nothing doubled, and the order kept, whenever it dies."""
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="live")
        said = ["one", f"until released die {moment}", "three", "four"]
        handles = [await client.submit_add("ann", text) for text in said]
        await parked(client, "ann", 4)  # to be extracted together
        victim = await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="slow")
        await begun(client, 1)
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="slow")
        await release(client)
        await asyncio.to_thread(victim.wait)
        killed = time.monotonic()
        later = await client.submit_add("ann", "five")
        results = [await handle.result(60) for handle in handles]
        assert time.monotonic() - killed < 20  # what is idle takes it up after 5
        assert sum(each.added for each in [*results, await later.result(30)]) == 5
        assert await texts(client, "ann") == [*said, "five"]
        calls = [each for each in await extractions(client) if "one" in each["texts"]]
        assert len(calls) == (1 if moment == "after storing" else 2)
        await nothing_is_left(client)

    async def test_a_frozen_worker_stores_nothing_twice(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        """By the time it goes on, somebody else has done its work."""
        victim = await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        handle = await client.submit_add("ann", "until released once")
        await begun(client, 1)
        victim.signal(signal.SIGSTOP)
        try:
            await asyncio.to_thread(start_worker, backend=EXTRACTOR)
            await begun(client, 2)
            await release(client)
            assert (await handle.result(30)).added == 1
        finally:
            victim.signal(signal.SIGCONT)
        await asyncio.sleep(3)
        assert await texts(client, "ann") == ["until released once"]
        assert victim.is_alive()
        await nothing_is_left(client)

    @pytest.mark.parametrize("ids", ["", "same ids, "])
    async def test_a_worker_frozen_while_it_stores_takes_nothing_back_from_others(
        self, client: MemoryClient, start_worker: StartWorker, redis: RedisClient, ids: str
    ) -> None:
        """What it stores late is undone if it is there twice, and left if it is the same."""
        victim = await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        handle = await client.submit_add("ann", f"{ids}store later")
        keys = client.transport.keys
        turn = keys.turn(keys.user_tag("default", "ann"))

        async def journaled() -> bool:
            return bool(await redis.hexists(turn, "j"))

        await eventually(journaled)
        victim.signal(signal.SIGSTOP)
        try:
            await asyncio.to_thread(start_worker, backend=EXTRACTOR)
            await begun(client, 2)
            await release(client)
            assert (await handle.result(30)).added == 1
        finally:
            victim.signal(signal.SIGCONT)
        await asyncio.sleep(3)
        assert await texts(client, "ann") == [f"{ids}store later"]
        assert victim.is_alive()
        await nothing_is_left(client)

    async def test_an_idempotency_key_acts_once_however_it_is_used(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        together = await asyncio.gather(
            *(client.add_memory("ann", "tea", idempotency_key="k") for _ in range(5))
        )
        assert sum(each.added for each in together) == 1
        assert (await client.add_memory("ann", "tea", idempotency_key="k")).added == 0
        assert await texts(client, "ann") == ["tea"]
        assert (await client.add_memory("ann", "tea", "t", idempotency_key="k")).added == 1
        await client.delete_memory("ann", "default")
        assert (await client.add_memory("ann", "tea", idempotency_key="k")).added == 1
        assert await texts(client, "ann") == ["tea", "tea"]

    @pytest.mark.parametrize("other", ["two", None])
    async def test_a_key_used_again_waits_for_each_delete_on_its_way(
        self, client: MemoryClient, bulk: Worker, other: str | None
    ) -> None:
        """Also for one that a later delete, of something else, has overtaken."""
        await client.add_memory("ann", "tea", "one", idempotency_key="k")
        slow = await client.submit_delete("ann", "one", lane="bulk")
        overtaking = await client.submit_delete("ann" if other else "bob", other)
        await overtaking.result(30)
        again = await client.submit_add("ann", "tea", "one", idempotency_key="k")
        await parked(client, "ann", 1)
        assert await again.status() is JobState.QUEUED
        bulk.signal(signal.SIGCONT)
        await slow.result(30)
        assert (await again.result(30)).added == 1
        assert await texts(client, "ann", "one") == ["tea"]
        await nothing_is_left(client)

    async def test_no_key_waits_for_a_delete_that_was_submitted_later(
        self, client: MemoryClient, bulk: Worker
    ) -> None:
        await client.add_memory("ann", "tea", idempotency_key="k")
        again = await client.submit_add("ann", "tea", idempotency_key="k", lane="bulk")
        late = await client.submit_delete("ann", lane="bulk")
        bulk.signal(signal.SIGCONT)
        assert (await again.result(30)).added == 0
        await late.result(30)
        assert await texts(client, "ann") == []
        assert len(await extractions(client)) == 1
        await nothing_is_left(client)

    async def test_what_was_settled_elsewhere_is_not_on_its_way(
        self, client: MemoryClient, redis: RedisClient, worker: Worker
    ) -> None:
        """A delete that was buried, say, before anybody could read it."""
        await client.add_memory("ann", "tea", idempotency_key="k")
        keys = client.transport.keys
        deleting = keys.deleting(keys.user_tag("default", "ann"))
        seconds, micros = await redis.time()
        later = seconds * 1000 + micros // 1000 + 1
        await redis.zadd(deleting, {"0123456789abcdef-1-0|": later})
        await asyncio.sleep(0.1)  # so that what comes now was submitted after it
        began = time.monotonic()
        assert (await client.add_memory("ann", "tea", idempotency_key="k")).added == 0
        assert time.monotonic() - began < 8
        assert len(await extractions(client)) == 1
        assert not await redis.exists(deleting)

    async def test_no_key_waits_for_a_delete_that_is_not_run(
        self, client: MemoryClient, bulk: Worker
    ) -> None:
        await client.add_memory("ann", "tea", idempotency_key="k")
        late = await client.submit_delete("ann", lane="bulk")
        await late.cancel()
        again = await client.submit_add("ann", "tea", idempotency_key="k")
        await parked(client, "ann", 1)
        bulk.signal(signal.SIGCONT)
        with pytest.raises(JobCancelled):
            await late.result(30)
        assert (await again.result(30)).added == 0
        assert len(await extractions(client)) == 1
        await nothing_is_left(client)

    @pytest.mark.parametrize(("patience", "calls"), [(10, 1), (0.5, 2)])
    async def test_a_worker_that_is_stopped_finishes_or_hands_back_what_it_extracts(
        self, client: MemoryClient, start_worker: StartWorker, patience: float, calls: int
    ) -> None:
        options = {"backend": EXTRACTOR, "slow_patience": patience}
        victim = await asyncio.to_thread(lambda: start_worker(**options))
        handle = await client.submit_add("ann", "until released")
        await begun(client, 1)
        await asyncio.to_thread(lambda: start_worker(**options))
        victim.signal(signal.SIGTERM)
        if calls == 1:
            await asyncio.sleep(1)
            await release(client)
        await asyncio.to_thread(victim.wait)
        await begun(client, calls)
        await release(client)
        assert (await handle.result(30)).added == 1
        assert await texts(client, "ann") == ["until released"]
        assert len(await extractions(client)) == calls
        await nothing_is_left(client)


class TestHandles:
    async def test_waiting_is_queued_and_extracting_is_running(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        first = await client.submit_add("ann", "until released")
        await begun(client, 1)
        assert await first.status() is JobState.RUNNING
        second = await client.submit_add("ann", "behind it")
        await parked(client, "ann", 2)
        assert await second.status() is JobState.QUEUED
        await release(client)
        await second.result(30)
        assert await second.status() is JobState.SUCCEEDED

    async def test_cancelled_while_it_waits(self, client: MemoryClient, worker: Worker) -> None:
        first = await client.submit_add("ann", "until released")
        await begun(client, 1)
        second = await client.submit_add("ann", "not this")
        await parked(client, "ann", 2)
        assert await second.cancel()
        with pytest.raises(JobCancelled):
            await second.result(30)
        await release(client)
        await first.result(30)
        assert await texts(client, "ann") == ["until released"]
        await nothing_is_left(client)

    async def test_cancelled_while_it_is_extracted(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        handle = await client.submit_add("ann", "until released")  # never, that is
        await begun(client, 1)
        assert not await handle.cancel()
        with pytest.raises(JobCancelled):
            await handle.result(30)
        assert await texts(client, "ann") == []
        await nothing_is_left(client)

    async def test_cancelled_between_two_attempts_it_is_not_tried_again(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        handle = await client.submit_add("ann", "until released fail 9 times, wait 1")
        await begun(client, 1)
        await handle.cancel()
        await release(client)
        with pytest.raises(JobCancelled):
            await handle.result(30)
        assert len(await extractions(client)) == 1
        await nothing_is_left(client)

    async def test_cancelled_while_it_is_looked_for_it_is_stored_once(
        self, client: MemoryClient, redis: RedisClient, namespace: str, start_worker: StartWorker
    ) -> None:
        victim = await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        handle = await client.submit_add("ann", "die after storing, recover later")
        await asyncio.to_thread(victim.wait)
        await asyncio.to_thread(start_worker, backend=EXTRACTOR)

        async def looking() -> bool:
            return await redis.get(f"{namespace}:recoveries") is not None

        await eventually(looking)
        assert not await handle.cancel()
        await asyncio.sleep(2)  # long enough for the worker to hear of it
        assert not (await handle.status()).settled
        await release(client)
        assert (await handle.result(30)).added == 1
        assert len(await texts(client, "ann")) == 1
        await nothing_is_left(client)

    async def test_a_deadline_that_passes_while_it_waits(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        first = await client.submit_add("ann", "until released")
        await begun(client, 1)
        late = await client.submit_add("ann", "too late", timeout=1)
        with pytest.raises(JobExpired):
            await late.result(30)
        await release(client)
        await first.result(30)
        await asyncio.sleep(0.5)
        assert await texts(client, "ann") == ["until released"]
        await nothing_is_left(client)


class TestLostReplies:
    """What a script does that is called again, because nobody heard what it said."""

    @pytest.fixture
    async def ledger(self, redis: RedisClient, namespace: str) -> SlowLedger:
        return self.ledger_of(redis, namespace, "w1")

    @staticmethod
    def ledger_of(redis: RedisClient, namespace: str, worker: str) -> SlowLedger:
        keys = Keys(namespace)
        return SlowLedger(
            redis, keys, WorkerLedger(redis, redis, redis, keys, worker, one_step=True)
        )

    @pytest.fixture
    async def turn(self, client: MemoryClient, redis: RedisClient, ledger: SlowLedger) -> Turn:
        """A user with one add, taken up."""
        await self.park(client, redis, "tea")
        (turn,) = (await ledger.take(5, 200)).turns
        return turn

    async def park(self, client: MemoryClient, redis: RedisClient, text: str) -> None:
        """Submits an add and hands it over, as a worker of the live lane does."""
        namespace = client.settings.namespace
        await client.submit_add("ann", text)
        while True:
            message = orjson.loads(cast("bytes", await redis.rpop(f"{namespace}.live")))
            if text in message["body"]:
                break
        await self.hand_over(redis, namespace, message)

    @staticmethod
    async def hand_over(redis: RedisClient, namespace: str, message: dict[str, Any]) -> None:
        batch = decode_batch(orjson.loads(message["body"])[0][0])
        keys = Keys(namespace)
        worker = WorkerLedger(redis, redis, redis, keys, "w1", one_step=True)
        claim = await worker.claim(batch)
        assert claim is not None
        job = batch.jobs[0]
        assert isinstance(job, AddJob)
        handover = Handover(0, job, claim.epochs[0], 0.0)
        assert await SlowLedger(redis, keys, worker).park(batch, [handover])

    async def test_an_answer_is_given_once(
        self, client: MemoryClient, redis: RedisClient, ledger: SlowLedger, turn: Turn
    ) -> None:
        """Even if somebody else has taken up the user meanwhile: it was written all the same."""
        (job,) = turn.jobs
        await ledger.begin(turn, [job])
        assert await ledger.journal(turn, {"jobs": [job.id], "intent": {}})
        answered = [(job, b'{"result":{"record_ids":["r"],"added":1}}', None)]
        assert await ledger.finish(turn, 1, answered) is None
        await self.park(client, redis, "coffee")
        await redis.zadd(Keys(client.settings.namespace).slow, {turn.tag: 0})
        (other,) = (await ledger.take(5, 200)).turns
        assert other.token != turn.token
        assert await ledger.finish(turn, 1, answered) is None
        assert await ledger.finish(turn, 2, answered) == ""

    async def test_dying_is_counted_once_in_a_turn(self, ledger: SlowLedger, turn: Turn) -> None:
        for _ in range(5):
            (verdict,) = await ledger.begin(turn, turn.jobs, alone=True)
            assert verdict.deaths == 0

    async def test_what_was_answered_is_not_cancelled_any_more(
        self, client: MemoryClient, ledger: SlowLedger, turn: Turn
    ) -> None:
        """It may be stored, though nobody has collected the answer yet."""
        (job,) = turn.jobs
        handle = client.handle(job.id)
        await ledger.begin(turn, [job])
        await ledger.finish(turn, 1, [(job, b'{"result":{"record_ids":[],"added":1}}', None)])
        assert await handle.status() is JobState.RUNNING
        assert not await handle.cancel()


class TestOrder:
    """Which adds may be begun, as the scripts see it."""

    @pytest.fixture
    async def ledger(self, redis: RedisClient, namespace: str) -> SlowLedger:
        return TestLostReplies.ledger_of(redis, namespace, "w1")

    hand_over = staticmethod(TestLostReplies.hand_over)

    async def pop(self, redis: RedisClient, namespace: str) -> dict[str, Any]:
        """The message of a batch that another worker has taken."""
        message = await redis.rpop(f"{namespace}.live")
        found: dict[str, Any] = orjson.loads(cast("bytes", message))
        return found

    async def test_one_that_comes_during_the_turn_is_not_overtaken(
        self, client: MemoryClient, redis: RedisClient, namespace: str, ledger: SlowLedger
    ) -> None:
        await client.submit_add("ann", "one")
        other = await self.pop(redis, namespace)
        for text in ("two", "three"):
            await client.submit_add("ann", text)
            await self.hand_over(redis, namespace, await self.pop(redis, namespace))
        (turn,) = (await ledger.take(5, 200)).turns
        assert [each.what for each in await ledger.begin(turn, turn.jobs)] == ["wait", "wait"]
        await self.hand_over(redis, namespace, other)
        assert [each.what for each in await ledger.begin(turn, turn.jobs)] == ["wait", "wait"]
        await ledger.postpone(turn, 0.0, [])
        (turn,) = (await ledger.take(5, 200)).turns
        assert [each.what for each in await ledger.begin(turn, turn.jobs)] == ["go"] * 3

    async def test_one_that_comes_later_holds_up_nobody(
        self, client: MemoryClient, redis: RedisClient, namespace: str, ledger: SlowLedger
    ) -> None:
        for text in ("one", "two"):
            await client.submit_add("ann", text)
            await self.hand_over(redis, namespace, await self.pop(redis, namespace))
            if text == "one":
                (turn,) = (await ledger.take(5, 200)).turns
        assert [each.what for each in await ledger.begin(turn, turn.jobs)] == ["go"]

    async def test_however_much_waits_in_another_lane(
        self, client: MemoryClient, redis: RedisClient, namespace: str, ledger: SlowLedger
    ) -> None:
        """It is not what is waited for, and does not hide what is."""

        async def submit(text: str, lane: str, age: int) -> None:
            await client.submit_add("ann", text, lane=lane, order=place(client, age))

        await asyncio.gather(*(submit(f"bulk {n}", "bulk", 7200) for n in range(300)))
        await submit("one", "live", 3600)
        other = await self.pop(redis, namespace)
        await submit("two", "live", 3600)
        await self.hand_over(redis, namespace, await self.pop(redis, namespace))
        (turn,) = (await ledger.take(5, 200)).turns
        assert [each.what for each in await ledger.begin(turn, turn.jobs)] == ["wait"]
        await self.hand_over(redis, namespace, other)
        await ledger.postpone(turn, 0.0, [])
        (turn,) = (await ledger.take(5, 200)).turns
        assert [each.what for each in await ledger.begin(turn, turn.jobs)] == ["go", "go"]


class TestAnOutageOfRedis:
    async def test_an_extraction_goes_on(self, tmp_path: Path) -> None:
        """No lease runs out while nobody can renew one: it is not paid for twice."""
        with (
            EmbeddedRedis(tmp_path) as own,
            Worker(own.url, backend=EXTRACTOR, namespace="recallq"),
            Worker(own.url, backend=EXTRACTOR, namespace="recallq"),
        ):
            assert own.pid is not None
            async with MemoryClient(own.url) as client:
                handle = await client.submit_add("ann", "sleep 12")
                await begun(client, 1)
                for _ in range(2):
                    await asyncio.sleep(1)
                    os.kill(own.pid, signal.SIGSTOP)
                    await asyncio.sleep(6)
                    os.kill(own.pid, signal.SIGCONT)
                assert (await handle.result(60)).added == 1
                assert len(await extractions(client)) == 1


class TestElsewhere:
    async def test_with_queues_and_coordination_on_two_servers(
        self, redis_url: str, namespace: str, start_worker: StartWorker
    ) -> None:
        with EmbeddedRedis() as other:
            await asyncio.to_thread(
                start_worker, backend=EXTRACTOR, broker_url=other.url, result_url=other.url
            )
            async with MemoryClient(
                redis_url, namespace=namespace, broker_url=other.url, result_url=other.url
            ) as client:
                handles = [await client.submit_add("ann", f"{n}") for n in range(30)]
                for handle in handles:
                    await handle.result(30)
                assert await texts(client, "ann") == [str(n) for n in range(30)]
                await client.delete_memory("ann")
                assert await texts(client, "ann") == []
