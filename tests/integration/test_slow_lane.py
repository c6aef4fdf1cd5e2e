"""The slow lane, with an extractor that does what messages tell it, and workers that die of it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

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
from recallq.embedded import EmbeddedRedis
from tests.support import Worker, eventually, redis_at

StartWorker = Callable[..., Worker]
EXTRACTOR = "extractor"


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace) as memory:
        yield memory


@pytest.fixture
async def worker(start_worker: StartWorker) -> Worker:
    return await asyncio.to_thread(start_worker, backend=EXTRACTOR, retry_base=0.2)


async def texts(client: MemoryClient, user: str, session: str | None = None) -> list[str]:
    filters = {"page_size": 1000} | ({"session_id": session} if session else {})
    return [each.text for each in await client.list_memory(user, filters)]


async def extractions(client: MemoryClient) -> list[dict[str, Any]]:
    """What each extraction was about, in the order in which they began."""
    async with redis_at(client.settings.redis_url) as redis:
        key = f"{client.settings.namespace}:extractions"
        return [orjson.loads(each) for each in await redis.lrange(key, 0, -1)]


async def begun(client: MemoryClient, count: int) -> None:
    """Waits until so many extractions have begun."""

    async def enough() -> bool:
        return len(await extractions(client)) >= count

    await eventually(enough)


async def state(handle: JobHandle, wanted: JobState) -> None:
    async def reached() -> bool:
        return await handle.status() is wanted

    await eventually(reached)


async def nothing_is_left(client: MemoryClient) -> None:
    """The slow lane and the ledger hold nothing any more."""
    ours = ("waiting", "pending", "turn", "slow", "batch", "queued", "held", "delayed")
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
        self, client: MemoryClient, worker: Worker
    ) -> None:
        handles = await asyncio.gather(
            *(client.submit_add(f"user-{n % 4}", f"text {n:03}", "s") for n in range(200))
        )
        results = await asyncio.gather(*(each.result(20) for each in handles))
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
            await handle.result(10)
        for each in await extractions(client):
            assert len({int(text) % 2 for text in each["texts"]}) == 1
        assert await texts(client, "ann") == [str(n) for n in range(10)]
        assert await texts(client, "ann", "s1") == ["1", "3", "5", "7", "9"]

    async def test_the_token_budget_bounds_an_extraction(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, slow_tokens=25)
        sizes = ["x" * 10, "y" * 10, "z" * 10, "large " * 20, "tail"]
        handles = [await client.submit_add("ann", text) for text in sizes]
        results = [await handle.result(10) for handle in handles]
        assert [len(each["texts"]) for each in await extractions(client)] == [2, 1, 1, 1]
        assert [each.merged for each in results] == [2, 2, 1, 1, 1]
        assert [each.added for each in results] == [1 + 1, 0, 1, 1, 1]

    async def test_a_pause_lets_others_join(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, slow_pause=1.0)
        first = await client.submit_add("ann", "one")
        await asyncio.sleep(0.5)
        second = await client.submit_add("ann", "two")
        assert (await first.result(10)).merged == (await second.result(10)).merged == 2
        began = time.monotonic()
        await client.add_memory("bob", "as it is", infer=False)  # nothing to wait for
        assert time.monotonic() - began < 0.7


class TestSideBySide:
    async def test_fifty_slow_users_and_searches_beside_them(
        self, client: MemoryClient, worker: Worker, namespace: str
    ) -> None:
        await client.add_memory("reader", "green tea")
        began = time.monotonic()
        handles = [await client.submit_add(f"user-{n}", f"sleep 2 {n}") for n in range(50)]
        await begun(client, 51)
        asked = time.monotonic()
        for _ in range(20):
            assert len(await client.search("reader", "tea", timeout=2)) == 1
        assert time.monotonic() - asked < 1.5, "searches wait for extractions"
        for handle in handles:
            await handle.result(20)
        assert time.monotonic() - began < 6
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
            await handle.result(20)
        said = [text for each in await extractions(client) for text in each["texts"]]
        assert said == [f"sleep 0.05 {n:02}" for n in range(30)]
        assert await texts(client, "ann") == said
        assert not any("two extractions" in each.output for each in workers)

    async def test_a_worker_without_the_slow_lane_leaves_it_to_others(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="live")
        handle = await client.submit_add("ann", "tea")
        await asyncio.sleep(1)
        assert await handle.status() is JobState.QUEUED
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, lanes="slow")
        assert (await handle.result(10)).added == 1

    async def test_a_slow_user_does_not_hold_up_batch_mates(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        slow = asyncio.create_task(client.add_memory("slow", "sleep 4"))
        began = time.monotonic()
        await asyncio.gather(*(client.add_memory(f"u{n}", "tea") for n in range(20)))
        assert time.monotonic() - began < 2
        await slow


class TestDeletion:
    @pytest.mark.parametrize("session", [None, "s"])
    async def test_a_delete_does_not_wait_for_an_extraction_and_leaves_nothing_of_it(
        self, client: MemoryClient, worker: Worker, session: str | None
    ) -> None:
        running = await client.submit_add("ann", "sleep 6 old", "s")
        waiting = await client.submit_add("ann", "old too", "s")
        await state(running, JobState.RUNNING)
        began = time.monotonic()
        await client.delete_memory("ann", session)
        assert time.monotonic() - began < 2
        assert (await running.result(2)).added == 0
        assert (await waiting.result(2)).added == 0
        assert (await client.add_memory("ann", "new", "s")).added == 1
        assert await texts(client, "ann") == ["new"]
        await asyncio.sleep(6)  # by now the extraction would have come to its end
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
        await client.delete_memory("ann", timeout=10)
        assert await texts(client, "ann") == []
        await handle.result(5)
        await asyncio.sleep(1)
        assert await texts(client, "ann") == []
        await nothing_is_left(client)

    async def test_another_sessions_adds_survive_it(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        old = await client.submit_add("ann", "sleep 1 old", "s")
        other = await client.submit_add("ann", "sleep 1 other", "t")
        await state(old, JobState.RUNNING)
        await client.delete_memory("ann", "s")
        assert (await other.result(10)).added == 1
        assert await texts(client, "ann") == ["sleep 1 other"]

    async def test_what_was_deleted_while_it_waited_for_another_try(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        handle = await client.submit_add("ann", "fail 1 times, wait 30")
        await begun(client, 1)
        await client.delete_memory("ann", timeout=5)
        assert (await handle.result(2)).added == 0
        assert (await client.add_memory("ann", "new", timeout=5)).added == 1
        assert await texts(client, "ann") == ["new"]


class TestFailing:
    async def test_tried_again_and_in_order(self, client: MemoryClient, worker: Worker) -> None:
        first = await client.submit_add("ann", "fail 3 times")
        await begun(client, 1)
        second = await client.submit_add("ann", "after it")
        assert (await first.result(20)).added + (await second.result(20)).added == 2
        assert await texts(client, "ann") == ["fail 3 times", "after it"]

    async def test_one_that_fails_for_good_does_not_take_others_with_it(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        handles = [
            await client.submit_add("ann", text) for text in ("one", "please refuse", "three")
        ]
        assert (await handles[0].result(10)).added == 1
        with pytest.raises(BackendError, match="refused, as told"):
            await handles[1].result(10)
        assert await handles[1].status() is JobState.DEAD
        assert (await handles[2].result(10)).added == 1
        assert await texts(client, "ann") == ["one", "three"]
        (letter,) = await client.dead_letters.list("ann")
        assert letter.id == handles[1].id
        assert letter.error == "refused, as told"
        await nothing_is_left(client)

    async def test_attempts_run_out_and_are_told(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        await asyncio.to_thread(start_worker, backend=EXTRACTOR, retry_attempts=3, retry_base=0.05)
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
            start_worker, backend=EXTRACTOR, retry_attempts=1, retry_base=0.05
        )
        handle = await client.submit_add("ann", "fail 1 times")
        await state(handle, JobState.DEAD)
        (letter,) = await client.dead_letters.list("ann")
        once = await client.dead_letters.replay(letter)
        assert (await once.result(10)).added == 1
        twice = await client.dead_letters.replay(letter)
        assert (await twice.result(10)).added == 0
        assert await texts(client, "ann") == ["fail 1 times"]
        assert first.is_alive()

    async def test_a_job_that_kills_its_workers_is_found_and_given_up(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        worker = await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        handles = [await client.submit_add("ann", text) for text in ("one", "exit", "three")]
        deaths = 0
        while not all([(await each.status()).settled for each in handles]):
            assert deaths < 10
            if not worker.is_alive():
                deaths += 1
                await asyncio.to_thread(worker.start)
            await asyncio.sleep(0.2)
        with pytest.raises(WorkerLost):
            await handles[1].result(5)
        assert (await handles[0].result(5)).added == 1
        assert (await handles[2].result(5)).added == 1
        assert await texts(client, "ann") == ["one", "three"]
        await nothing_is_left(client)


class TestOnce:
    @pytest.mark.parametrize("moment", ["before storing", "half way", "after storing"])
    async def test_a_worker_that_dies(
        self, client: MemoryClient, start_worker: StartWorker, moment: str
    ) -> None:
        """Nothing is lost, nothing doubled, and the order kept, whenever it dies."""
        victim = await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        handles = [
            await client.submit_add("ann", text)
            for text in ("one", f"die {moment}", "three", "four")
        ]
        await asyncio.to_thread(victim.wait)
        killed = time.monotonic()
        later = await client.submit_add("ann", "five")
        await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        results = [await handle.result(20) for handle in handles]
        assert time.monotonic() - killed < 10
        assert sum(each.added for each in [*results, await later.result(10)]) == 5
        assert await texts(client, "ann") == ["one", f"die {moment}", "three", "four", "five"]
        calls = [each for each in await extractions(client) if "one" in each["texts"]]
        assert len(calls) == (1 if moment == "after storing" else 2)
        await nothing_is_left(client)

    async def test_a_frozen_worker_stores_nothing_twice(
        self, client: MemoryClient, start_worker: StartWorker
    ) -> None:
        """By the time it goes on, somebody else has done its work."""
        victim = await asyncio.to_thread(start_worker, backend=EXTRACTOR)
        handle = await client.submit_add("ann", "sleep 1.5 once")
        await state(handle, JobState.RUNNING)
        victim.signal(signal.SIGSTOP)
        try:
            await asyncio.to_thread(start_worker, backend=EXTRACTOR)
            assert (await handle.result(20)).added == 1
        finally:
            victim.signal(signal.SIGCONT)
        await asyncio.sleep(3)
        assert await texts(client, "ann") == ["sleep 1.5 once"]
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

    @pytest.mark.parametrize(("patience", "calls"), [(10, 1), (0.5, 2)])
    async def test_a_worker_that_is_stopped_finishes_or_hands_back_what_it_extracts(
        self, client: MemoryClient, start_worker: StartWorker, patience: float, calls: int
    ) -> None:
        options = {"backend": EXTRACTOR, "slow_patience": patience}
        victim = await asyncio.to_thread(lambda: start_worker(**options))
        handle = await client.submit_add("ann", "sleep 3")
        await state(handle, JobState.RUNNING)
        await asyncio.to_thread(lambda: start_worker(**options))
        began = time.monotonic()
        await asyncio.to_thread(victim.stop)
        assert time.monotonic() - began < 8
        assert (await handle.result(10)).added == 1
        assert await texts(client, "ann") == ["sleep 3"]
        assert len(await extractions(client)) == calls
        await nothing_is_left(client)


class TestHandles:
    async def test_waiting_is_queued_and_extracting_is_running(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        first = await client.submit_add("ann", "sleep 2")
        await state(first, JobState.RUNNING)
        second = await client.submit_add("ann", "behind it")
        await asyncio.sleep(0.5)
        assert await second.status() is JobState.QUEUED
        await second.result(10)
        assert await second.status() is JobState.SUCCEEDED

    async def test_cancelled_while_it_waits(self, client: MemoryClient, worker: Worker) -> None:
        first = await client.submit_add("ann", "sleep 2")
        await state(first, JobState.RUNNING)
        second = await client.submit_add("ann", "not this")
        await asyncio.sleep(0.3)
        assert await second.cancel()
        with pytest.raises(JobCancelled):
            await second.result(5)
        await first.result(10)
        assert await texts(client, "ann") == ["sleep 2"]
        await nothing_is_left(client)

    async def test_cancelled_while_it_is_extracted(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        handle = await client.submit_add("ann", "sleep 20")
        await state(handle, JobState.RUNNING)
        assert not await handle.cancel()
        with pytest.raises(JobCancelled):
            await handle.result(5)
        assert await texts(client, "ann") == []
        await nothing_is_left(client)

    async def test_a_deadline_that_passes_while_it_waits(
        self, client: MemoryClient, worker: Worker
    ) -> None:
        first = await client.submit_add("ann", "sleep 3")
        await state(first, JobState.RUNNING)
        late = await client.submit_add("ann", "too late", timeout=1)
        with pytest.raises(JobExpired):
            await late.result(10)
        await first.result(10)
        await asyncio.sleep(0.5)
        assert await texts(client, "ann") == ["sleep 3"]
        await nothing_is_left(client)


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
                    await handle.result(10)
                assert await texts(client, "ann") == [str(n) for n in range(30)]
                await client.delete_memory("ann")
                assert await texts(client, "ann") == []
