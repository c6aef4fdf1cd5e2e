"""What RecallQ promises, with a worker that is killed, frozen or fooled at the wrong moment."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable

import pytest

from recallq import (
    AddResult,
    BackendError,
    BackendUnavailable,
    InternalError,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobHandle,
    JobState,
    MemoryClient,
    ResultWithdrawn,
    UnknownJob,
    WorkerLost,
)
from recallq.contract import JobRef
from recallq.embedded import EmbeddedRedis
from recallq.keys import Keys
from tests.support import Worker, eventually, redis_at

StartWorker = Callable[..., Worker]


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace, timeout=60) as memory:
        yield memory


async def state(handle: JobHandle, wanted: JobState) -> None:
    """Waits until a job is in a state."""

    async def reached() -> bool:
        return await handle.status() is wanted

    await eventually(reached)


async def release(client: MemoryClient) -> None:
    """Lets go on what lasts ``until released``."""
    async with redis_at(client.settings.redis_url) as redis:
        await redis.set(f"{client.settings.namespace}:released", 1)


async def texts(client: MemoryClient, user: str) -> list[str]:
    return [each.text for each in await client.list_memory(user, {"page_size": 1000})]


async def no_trace_of_work(client: MemoryClient, redis_url: str) -> None:
    """Whatever is outstanding has settled, and left nothing behind but results."""
    keys = client.transport.keys
    async with redis_at(redis_url) as redis:

        async def clean() -> bool:
            left = [
                key
                async for key in redis.scan_iter(f"{keys.namespace}:*")
                if key.startswith((keys.batch("").encode(), keys.queued_prefix.encode()))
                or key in (keys.held.encode(), keys.delayed.encode(), keys.outstanding.encode())
            ]
            return not left

        await eventually(clean)


class TestNothingIsLost:
    async def test_a_killed_workers_jobs_are_run_within_ten_seconds(
        self,
        client: MemoryClient,
        redis_url: str,
        namespace: str,
        start_worker: StartWorker,
        user: str,
    ) -> None:
        async def seconds_until_done() -> float:
            victim = await asyncio.to_thread(start_worker, backend="slow_redis")
            handles = [await client.submit_add(f"{user}-{n}", f"sleep 100 {n}") for n in range(4)]
            for handle in handles:
                await state(handle, JobState.RUNNING)
            # What it holds is fast for whoever takes it over: only what is said to it sleeps.
            survivor = await asyncio.to_thread(start_worker, backend="redis")
            await asyncio.sleep(3)  # the survivor has been there for a while, as in a fleet
            victim.kill()
            killed = time.monotonic()
            results = [await handle.result(30) for handle in handles]
            seconds = time.monotonic() - killed
            assert [each.added for each in results] == [1] * 4
            await no_trace_of_work(client, redis_url)
            await asyncio.to_thread(survivor.stop)
            return seconds

        # Where the machine stalls for a while, once is enough.
        took = [await seconds_until_done()]
        while took[-1] >= 10 and len(took) < 3:
            took.append(await seconds_until_done())
        assert took[-1] < 10, took

    async def test_a_message_that_vanished_on_its_way_is_sent_again(
        self, client: MemoryClient, redis_url: str, namespace: str, start_worker: StartWorker
    ) -> None:
        """As when a worker dies between taking a message and noting that it did."""
        handles = [await client.submit_add("ann", f"tea {n}") for n in range(3)]
        async with redis_at(redis_url) as redis:
            queue = f"{namespace}.live"
            assert await redis.rpop(queue)
            assert await redis.rpop(queue)
        await asyncio.to_thread(start_worker)
        assert [(await each.result(30)).added for each in handles] == [1, 1, 1]
        assert await texts(client, "ann") == ["tea 0", "tea 1", "tea 2"]
        await no_trace_of_work(client, redis_url)

    async def test_what_waits_in_a_queue_is_not_taken_for_lost(
        self, client: MemoryClient, redis_url: str, namespace: str, start_worker: StartWorker
    ) -> None:
        """One worker is busy; another sweeps past a queue that nobody empties."""
        await asyncio.to_thread(start_worker, lanes="bulk")
        for n in range(5):
            await client.submit_add("ann", f"tea {n}")
        await asyncio.sleep(9)
        async with redis_at(redis_url) as redis:
            assert await redis.llen(f"{namespace}.live") == 5

    async def test_a_stopped_worker_hands_back_what_it_cannot_finish(
        self, client: MemoryClient, namespace: str, start_worker: StartWorker, user: str
    ) -> None:
        first = await asyncio.to_thread(start_worker, backend="slow_redis")
        handle = await client.submit_add(user, "sleep 100")
        await state(handle, JobState.RUNNING)
        first.signal(signal.SIGQUIT)  # Celery's cold shutdown
        await asyncio.to_thread(start_worker, backend="redis")
        assert (await handle.result(25)).added == 1


class TestLeases:
    """Whoever holds a batch keeps it for as long as it lives, and no longer."""

    async def test_a_long_job_is_run_once_while_its_worker_lives(
        self, client: MemoryClient, namespace: str, start_worker: StartWorker, user: str
    ) -> None:
        for _ in range(2):
            await asyncio.to_thread(start_worker, backend="slow_redis", visibility_timeout=5)
        handle = await client.submit_add(user, "sleep 14")
        assert (await handle.result(30)).added == 1
        async with redis_at(client.settings.redis_url) as redis:
            assert await redis.get(f"{namespace}:calls") == b"1"

    async def test_a_frozen_worker_does_no_harm_when_it_thaws(
        self, client: MemoryClient, redis_url: str, start_worker: StartWorker, user: str
    ) -> None:
        frozen = await asyncio.to_thread(start_worker, backend="slow_redis")
        handle = await client.submit_add(user, "sleep 5 once")
        await state(handle, JobState.RUNNING)
        frozen.signal(signal.SIGSTOP)
        await asyncio.to_thread(start_worker, backend="redis")
        assert (await handle.result(30)).added == 1
        await client.delete_memory(user)
        frozen.signal(signal.SIGCONT)
        await asyncio.sleep(2)
        assert await texts(client, user) == []
        assert await handle.status() is JobState.SUCCEEDED
        await no_trace_of_work(client, redis_url)

    async def test_a_second_delivery_to_the_worker_that_runs_it_changes_nothing(
        self, client: MemoryClient, redis_url: str, namespace: str, start_worker: StartWorker
    ) -> None:
        """The lease is kept on, far beyond its length, and nothing is run twice."""
        await asyncio.to_thread(start_worker, backend="slow_redis", visibility_timeout=5)
        handle = await client.submit_add("ann", "sleep 12")
        await state(handle, JobState.RUNNING)
        async with redis_at(redis_url) as redis:
            message = await redis.hget(Keys(namespace).batch(JobRef.parse(handle.id).batch_id), "m")
            assert message is not None
            await redis.lpush(f"{namespace}.live", message)
            assert (await handle.result(30)).added == 1
            assert await redis.get(f"{namespace}:calls") == b"1"

    async def test_what_has_settled_stays_so_while_the_rest_of_its_batch_waits_long(
        self, client: MemoryClient, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="obedient", result_expires=1)
        first, last = await asyncio.gather(
            client.submit_search(user, "tea"), client.submit_search(user, "fail 1 times, wait 9")
        )
        assert JobRef.parse(first.id).batch_id == JobRef.parse(last.id).batch_id
        await state(first, JobState.SUCCEEDED)
        for _ in range(30):
            assert await first.status() is JobState.SUCCEEDED
            await asyncio.sleep(0.1)
        assert await first.cancel() is False
        assert await last.result(30) == []


class TestRetries:
    async def test_a_batch_mates_wait_is_not_ours(
        self, client: MemoryClient, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="obedient", retry_base=0.1)
        began = time.monotonic()
        for_ever, theirs, mine = await asyncio.gather(
            client.submit_search("third", "fail 1 times, wait 100"),
            client.submit_search("other", "fail 1 times, wait 3"),
            client.submit_search(user, "fail 1 times", timeout=30),
        )
        assert len({JobRef.parse(each.id).batch_id for each in (for_ever, theirs, mine)}) == 1
        assert await mine.result(30) == []
        assert await theirs.result(30) == []
        assert time.monotonic() - began >= 3
        assert not (await for_ever.status()).settled

    async def test_an_error_that_is_no_text_fails_nobody_else(
        self, client: MemoryClient, redis_url: str, start_worker: StartWorker, user: str
    ) -> None:
        """As a library's error may quote bytes of an answer."""
        await asyncio.to_thread(start_worker, backend="obedient", retry_attempts=2, retry_base=0.05)
        bad = [await client.submit_add("other", text) for text in ("garble", "garble for a while")]
        good, search, worse = await asyncio.gather(
            client.submit_add(user, "tea"),
            client.submit_search(user, "coffee"),
            client.submit_search(user, "answer garbage"),
        )
        for handle in bad:
            with pytest.raises(JobFailed):
                await handle.result(30)
            assert await handle.status() is JobState.DEAD
        assert (await good.result(30)).added == 1
        assert await search.result(30) == []
        with pytest.raises(InternalError):
            await worse.result(30)
        assert await client.dead_letters.count() == 2
        await no_trace_of_work(client, redis_url)

    async def test_what_is_unavailable_for_a_while_succeeds_in_the_end(
        self, client: MemoryClient, redis_url: str, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="obedient", retry_base=0.2)
        added = await client.add_memory(user, "fail 3 times: tea")
        assert added.added == 1
        assert await client.dead_letters.count() == 0
        await no_trace_of_work(client, redis_url)

    async def test_a_wait_that_the_backend_asks_for_is_kept(
        self, client: MemoryClient, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="obedient", retry_base=0.01)
        began = time.monotonic()
        await client.add_memory(user, "fail 1 times, wait 2: tea")
        assert time.monotonic() - began >= 2

    async def test_a_batch_mate_does_not_wait_for_the_retries(
        self, client: MemoryClient, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="obedient", retry_base=0.1, retry_attempts=5)
        bad = client.add_memory(f"{user}-bad", "unavailable for ever")
        good = [client.add_memory(user, f"tea {n}") for n in range(5)]
        failing = asyncio.create_task(bad)
        results = await asyncio.gather(*good)
        assert [each.added for each in results] == [1] * 5
        assert not failing.done()
        with pytest.raises(BackendUnavailable):
            await failing

    async def test_attempts_are_bounded_and_the_last_is_a_dead_letter(
        self, client: MemoryClient, redis_url: str, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="obedient", retry_attempts=3, retry_base=0.05)
        handle = await client.submit_add(user, "unavailable for ever", session_id="s")
        with pytest.raises(BackendUnavailable):
            await handle.result(30)
        assert await handle.status() is JobState.DEAD
        [letter] = await client.dead_letters.list(user, "s")
        assert letter.id == handle.id
        assert letter.code == "backend_unavailable"
        assert letter.attempts == 3
        assert len(letter.history) == 2
        assert letter.submitted_at is not None
        assert letter.submitted_at < letter.died_at
        await no_trace_of_work(client, redis_url)

    async def test_retries_end_before_the_deadline(
        self, client: MemoryClient, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="obedient", retry_base=0.2, retry_attempts=99)
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):  # the cause, not a timeout
            await client.add_memory(user, "fail 99 times, wait 4", timeout=7.5)
        assert time.monotonic() - began < 7.5
        [letter] = await client.dead_letters.list(user)
        assert letter.attempts == 2

    async def test_what_will_never_work_is_not_tried_again(
        self, client: MemoryClient, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="obedient")
        with pytest.raises(BackendError):
            await client.add_memory(user, "refuse this")
        [letter] = await client.dead_letters.list(user)
        assert letter.attempts == 1
        with pytest.raises(BackendError):
            await client.search_memory(user, "refuse this")
        assert await client.dead_letters.count() == 1  # of a read there is nothing to keep


class TestPoison:
    async def test_a_job_that_kills_its_worker_is_isolated(
        self, client: MemoryClient, redis_url: str, start_worker: StartWorker, user: str
    ) -> None:
        """Workers are started again and again, as a supervisor does."""
        handles = await asyncio.gather(
            *(client.submit_add(user, f"tea {n}") for n in range(10)),
            client.submit_add(f"{user}-bad", "exit"),
            *(client.submit_add(user, f"coffee {n}") for n in range(10)),
        )
        killer = handles.pop(10)
        assert len({JobRef.parse(each.id).batch_id for each in [*handles, killer]}) < 21
        # Batches of their own that run beside it whenever the worker dies, and are not to blame.
        handles += [await client.submit_add(user, f"sleep 0.5 {n}") for n in range(6)]
        deaths = 0

        async def supervise() -> None:
            nonlocal deaths
            while True:
                with contextlib.suppress(AssertionError):  # dead before it was ready
                    worker = await asyncio.to_thread(start_worker, backend="slow_redis")
                    while worker.is_alive():
                        await asyncio.sleep(0.1)
                deaths += 1

        supervisor = asyncio.create_task(supervise())
        try:
            with pytest.raises(WorkerLost):
                await killer.result(90)
            assert [(await each.result(60)).added for each in handles] == [1] * 26
        finally:
            supervisor.cancel()
        assert deaths <= 5
        assert await killer.status() is JobState.DEAD
        [letter] = await client.dead_letters.list()
        assert letter.id == killer.id
        await no_trace_of_work(client, redis_url)


class TestDeletion:
    @pytest.mark.parametrize("session", [None, "s"])
    async def test_what_is_queued_running_or_to_be_tried_again_stays_away(
        self,
        client: MemoryClient,
        start_worker: StartWorker,
        user: str,
        session: str | None,
    ) -> None:
        await asyncio.to_thread(start_worker, backend="slow_redis", retry_base=3.0, retry_cap=3.0)
        before = [
            await client.submit_add(user, text, session_id="s")
            for text in (
                "at once",
                "until released: running",
                "fail 2 times: again",
                "refuse: dead",
            )
        ]
        other = await client.submit_add(user, "other session", session_id="t")
        await state(before[0], JobState.SUCCEEDED)
        await state(before[3], JobState.DEAD)
        await client.submit_add(user, "sleep 1 queued", session_id="s")
        deleted = await client.delete_memory(user, session)
        assert deleted.removed >= 1
        assert await client.dead_letters.list(user) == []
        after = await client.add_memory(user, "afterwards", session_id="s")
        assert after.added == 1
        await release(client)
        for handle in before[1:3]:
            assert (await handle.result(30)).added == 0
        await other.result(30)
        wanted = ["afterwards"] if session is None else ["other session", "afterwards"]
        assert await texts(client, user) == wanted

    async def test_a_delete_repeated_under_its_key_spares_what_came_after_it(
        self, client: MemoryClient, redis_url: str, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker)
        for session in ("s", "t"):
            await client.add_memory(user, "before", session)
        deleted = await asyncio.gather(
            client.delete_memory(user, "s", idempotency_key="k"),
            client.delete_memory(user, "s"),
            client.delete_memory(user, "t", idempotency_key="k"),
        )
        assert sum(each.removed for each in deleted) == 2
        await client.add_memory(user, "after", "s")
        assert (await client.delete_memory(user, "s", idempotency_key="k")).removed == 0
        assert await texts(client, user) == ["after"]
        assert (await client.delete_memory(user, "s", idempotency_key="l")).removed == 1
        async with redis_at(redis_url) as redis:
            remembered = [
                key async for key in redis.scan_iter(f"{client.settings.namespace}:epoch:*:*")
            ]
            assert len(remembered) == 3
            assert all([await redis.ttl(key) > 0 for key in remembered])

    async def test_a_job_that_dies_after_a_delete_leaves_no_letter(
        self, client: MemoryClient, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="slow_redis")
        dying = await client.submit_add(user, "until released, then refuse")
        await state(dying, JobState.RUNNING)
        await client.delete_memory(user)
        await release(client)
        with pytest.raises(BackendError):
            await dying.result(30)
        assert await client.dead_letters.count() == 0

    async def test_the_stored_answer_of_a_read_is_not_shown_after_a_delete(
        self, client: MemoryClient, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker)
        await client.add_memory(user, "secret tea")
        search = await client.submit_search(user, "tea")
        listing = await client.submit_list(user)
        await client.add_memory("other", "tea")
        others = await client.submit_search("other", "tea")
        assert len(await search.result(30)) == 1
        assert len(await listing.result(30)) == 1
        await others.result(30)
        await client.delete_memory(user)
        for handle in (search, listing):
            with pytest.raises(ResultWithdrawn):
                await handle.result(30)
            assert await handle.status() is JobState.EXPIRED
        assert len(await others.result(30)) == 1

    async def test_a_replayed_add_from_before_a_delete_stays_away(
        self, client: MemoryClient, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="slow_redis")
        with pytest.raises(BackendError):
            await client.add_memory(user, "refuse unless told")
        [letter] = await client.dead_letters.list(user)
        await client.delete_memory(user)
        # Somebody read the letter before the delete took it along.
        with pytest.raises(UnknownJob, match="deleted since"):
            await client.dead_letters.replay(letter)
        assert await client.dead_letters.count() == 0

    async def test_epochs_go_on_rising_where_redis_forgot_and_the_store_did_not(
        self, namespace: str, user: str
    ) -> None:
        with EmbeddedRedis() as queues, EmbeddedRedis() as store, contextlib.ExitStack() as stack:
            with_both = Worker(queues.url, namespace=namespace, store_url=store.url)
            await asyncio.to_thread(with_both.start)
            stack.callback(with_both.close)
            async with MemoryClient(queues.url, namespace=namespace) as client:
                await client.add_memory(user, "before")
                await client.delete_memory(user)
                await client.add_memory(user, "kept")
                async with redis_at(queues.url) as redis:
                    await redis.flushall()
                assert (await client.add_memory(user, "afterwards")).added == 1
                assert await texts(client, user) == ["kept", "afterwards"]
                assert (await client.delete_memory(user)).removed == 2


class TestDeadLetters:
    async def test_a_replay_takes_the_messages_old_place(
        self, client: MemoryClient, redis_url: str, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="slow_redis")
        first = await client.add_memory(user, "one")
        with pytest.raises(BackendError):
            await client.add_memory(user, ["two", "refuse until allowed"])
        await client.add_memory(user, "three")
        [letter] = await client.dead_letters.list()
        assert (await client.dead_letters.get(letter.id)).job == letter.job
        async with redis_at(redis_url) as redis:
            await redis.set(f"{client.settings.namespace}:allowed", 1)
        handle = await client.dead_letters.replay(letter.id)
        added = await handle.result(30)
        assert isinstance(added, AddResult)
        assert [each.rpartition("-")[0] for each in added.record_ids] == [letter.id] * 2
        assert await texts(client, user) == ["one", "two", "refuse until allowed", "three"]
        assert await client.dead_letters.count() == 0
        with pytest.raises(UnknownJob):
            await client.dead_letters.replay(letter.id)
        # The letter once more, as after a crash in the middle of a replay: nothing twice.
        again = await client.dead_letters.replay(letter)
        assert (await again.result(30)).added == 0
        assert first.added == 1

    async def test_they_are_listed_by_scope_and_purged(
        self, client: MemoryClient, redis_url: str, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="obedient")
        for session in ("s", "t", "t"):
            with pytest.raises(BackendError):
                await client.add_memory(user, "refuse", session)
        with pytest.raises(BackendError):
            await client.add_memory("other", "refuse")
        letters = client.dead_letters
        assert len(await letters.list()) == 4
        assert len(await letters.list(user)) == 3
        assert len(await letters.list(user, "t")) == 2
        assert len(await letters.list(limit=2)) == 2
        oldest = (await letters.list())[0]
        assert len(await letters.list(before=oldest.died_at)) == 0
        assert await letters.purge(oldest.id)
        assert not await letters.purge(oldest)
        assert await letters.count() == 3
        await client.delete_memory(user, "t")
        assert [each.scope.user_id for each in await letters.list() if each.scope] == ["other"]
        for letter in await letters.list():
            await letters.purge(letter)
        async with redis_at(redis_url) as redis:
            prefix = f"{client.settings.namespace}:dead*"
            assert [key async for key in redis.scan_iter(prefix)] == []


class TestHandles:
    async def test_a_running_job_can_be_asked_to_stop(
        self, client: MemoryClient, redis_url: str, start_worker: StartWorker, user: str
    ) -> None:
        worker = await asyncio.to_thread(start_worker, backend="slow_redis")
        for handle in (
            await client.submit_search(user, "sleep 100"),
            await client.submit_add(user, "sleep 100"),
        ):
            await state(handle, JobState.RUNNING)
            worker.signal(signal.SIGSTOP)  # so that it has not heard of it yet
            assert await handle.cancel() is False
            assert await handle.status() is JobState.RUNNING
            worker.signal(signal.SIGCONT)
            with pytest.raises(JobCancelled, match="while it ran"):
                await handle.result(30)
            assert await handle.status() is JobState.CANCELLED
            assert await handle.cancel() is True
        assert await texts(client, user) == []
        await no_trace_of_work(client, redis_url)

    async def test_cancelling_a_settled_job_changes_nothing(
        self, client: MemoryClient, start_worker: StartWorker, user: str
    ) -> None:
        await asyncio.to_thread(start_worker)
        handle = await client.submit_add(user, "tea")
        await handle.result(30)
        assert await handle.cancel() is False
        assert await handle.status() is JobState.SUCCEEDED

    async def test_cancelled_jobs_leave_their_places_to_others(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with MemoryClient(redis_url, namespace=namespace, high_water_mark=2) as client:
            for _ in range(5):
                handles = [await client.submit_add(user, "tea") for _ in range(2)]
                for handle in handles:
                    assert await handle.cancel()
                    assert await handle.cancel()
            assert not (await client.transport.fleet()).outstanding

    async def test_a_batch_of_nothing_but_cancelled_jobs_settles(
        self, client: MemoryClient, redis_url: str, start_worker: StartWorker, user: str
    ) -> None:
        handles = [await client.submit_add(user, "tea") for _ in range(3)]
        for handle in handles:
            assert await handle.cancel()
        await asyncio.to_thread(start_worker)
        for handle in handles:
            with pytest.raises(JobCancelled):
                await handle.result(30)
        await no_trace_of_work(client, redis_url)
        for handle in handles:
            assert await handle.status() is JobState.CANCELLED
        assert await texts(client, user) == []

    async def test_a_job_that_expires_where_nobody_works_says_so(
        self, client: MemoryClient, user: str
    ) -> None:
        handle = await client.submit_add(user, "tea", timeout=3)
        assert await handle.status() is JobState.QUEUED
        with pytest.raises(JobExpired):
            await handle.result(30)
        assert await handle.status() is JobState.EXPIRED
        lasting = await client.submit_add(user, "tea")
        await asyncio.sleep(0.1)
        assert await lasting.status() is JobState.QUEUED


class TestEffectsHappenOnce:
    async def test_a_duplicate_message_is_dropped_in_whatever_state(
        self, client: MemoryClient, redis_url: str, namespace: str, start_worker: StartWorker
    ) -> None:
        """Queued, running, waiting for another attempt, and settled."""
        keys = Keys(namespace)
        async with redis_at(redis_url) as redis:
            handles = [
                await client.submit_add("ann", "sleep 2 slow"),
                await client.submit_add("ann", "fail 1 times, wait 2: again"),
                await client.submit_add("ann", "plain"),
            ]
            batches = [JobRef.parse(each.id).batch_id for each in handles]
            messages = [await redis.hget(keys.batch(each), "m") for each in batches]
            await asyncio.to_thread(start_worker, backend="slow_redis")
            for _ in range(20):
                for message in messages:
                    assert message is not None
                    await redis.lpush(f"{namespace}.live", message)
                await asyncio.sleep(0.15)
            assert [(await each.result(30)).added for each in handles] == [1, 1, 1]
            assert await redis.get(f"{namespace}:calls") == b"4"  # one failed, and came again
        assert sorted(await texts(client, "ann")) == [
            "fail 1 times, wait 2: again",
            "plain",
            "sleep 2 slow",
        ]
        await no_trace_of_work(client, redis_url)
