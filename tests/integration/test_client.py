"""The client, a real Redis and a real worker: the four calls and what surrounds them."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel, ConfigDict

from recallq import (
    BackendError,
    BackendUnavailable,
    ClientClosed,
    ConfigurationError,
    InternalError,
    InvalidInput,
    JobCancelled,
    JobExpired,
    JobHandle,
    JobState,
    JobTimeout,
    MemoryClient,
    Message,
    QueueFull,
    ServiceUnavailable,
    UnknownJob,
    WrongBackend,
)
from recallq.contract import AddJob, decode_batch
from recallq.embedded import EmbeddedRedis
from recallq.redis_client import COMMAND_TIMEOUT
from tests.conftest import no_blocking
from tests.support import Worker, clean_environment, eventually, redis_at


class TestTheFourCalls:
    async def test_what_is_added_is_found_listed_and_deleted(
        self, client: MemoryClient, user: str
    ) -> None:
        said = [Message.user("hello world"), Message.assistant("hello yourself")]
        added = await client.add_memory(user, said, session_id="s1")
        assert added.added == 2
        await client.add_memory(user, [Message.user("elsewhere")])
        assert await client.search_memory(user, [Message.user("hello")], {"top_k": 5}) == said[::-1]
        page = await client.list_memory(user, filters={"page_size": 10, "page_num": 1})
        assert page == [*said, Message.user("elsewhere")]
        assert (await client.delete_memory(user, "s1")).removed == 2
        assert await client.list_memory(user) == [Message.user("elsewhere")]
        assert (await client.delete_memory(user)).removed == 1
        assert await client.list_memory(user) == []

    async def test_the_session_is_default_unless_named(
        self, client: MemoryClient, user: str
    ) -> None:
        await client.add_memory(user, "without")
        await client.add_memory(user, "with", "default")
        assert len(await client.list_memory(user, {"session_id": "default"})) == 2

    async def test_every_shape_of_message_comes_back_as_it_went(
        self, client: MemoryClient, user: str
    ) -> None:
        shapes = [
            {"role": "user", "content": "plain", "id": "m1", "vendor": {"deep": [1, None, 2.5]}},
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {
                "object": "message",
                "type": "function_call",
                "role": None,
                "content": [
                    {"type": "data", "data": {"call_id": "c", "name": "n"}, "delta": False},
                    {"type": "image", "image_url": "https://example.com/a.png"},
                    {"type": "audio", "data": "AAAA", "format": "wav"},
                    {"type": "file", "file_id": "f-1", "filename": "report.pdf"},
                    {"type": "refusal", "refusal": "no"},
                    {"type": "something_new", "whatever": True},
                ],
            },
        ]
        await client.add_memory(user, shapes)
        found = await client.list_memory(user)
        assert [message.to_dict() for message in found] == shapes
        for query in ("report", "done"):
            assert len(await client.search_memory(user, query)) == 1

    async def test_search_tells_score_session_time_and_record(
        self, client: MemoryClient, user: str
    ) -> None:
        added = await client.add_memory(user, "green tea", "s1")
        (hit,) = await client.search(user, "tea")
        assert hit.record_id == added.record_ids[0]
        assert hit.session_id == "s1"
        assert 0.5 < hit.score < 1
        assert abs(hit.created_at.timestamp() - time.time()) < 60
        half = await client.search(user, "tea coffee", {"score_threshold": hit.score})
        assert half == [], "a message that holds a part of the query is a lesser match"

    async def test_a_query_without_text_finds_nothing(
        self, client: MemoryClient, user: str
    ) -> None:
        await client.add_memory(user, "tea")
        assert await client.search_memory(user, []) == []
        assert await client.search_memory(user, [{"role": "user", "content": None}]) == []

    async def test_the_last_message_is_the_query(self, client: MemoryClient, user: str) -> None:
        await client.add_memory(user, ["tea", "coffee"])
        found = await client.search_memory(user, [Message.user("tea"), Message.user("coffee")])
        assert [message.text for message in found] == ["coffee"]

    async def test_a_session_lists_in_the_order_of_submission(
        self, client: MemoryClient, user: str
    ) -> None:
        calls = [client.submit_add(user, str(number), "s") for number in range(300)]
        handles = await asyncio.gather(*calls)
        await asyncio.gather(*(handle.result(30) for handle in handles))
        found = await client.list_memory(user, {"page_size": 1000})
        assert [message.text for message in found] == [str(number) for number in range(300)]

    async def test_an_idempotency_key_stores_once(self, client: MemoryClient, user: str) -> None:
        first = await client.add_memory(user, ["a", "b"], idempotency_key="k")
        again = await client.add_memory(user, ["a", "b"], idempotency_key="k")
        other = await client.add_memory(user, "c", "another session", idempotency_key="k")
        assert (first.added, again.added, other.added) == (2, 0, 1)
        assert first.record_ids == again.record_ids
        assert len(await client.list_memory(user)) == 3

    async def test_a_call_may_take_its_place_before_it_is_made(
        self, client: MemoryClient, user: str
    ) -> None:
        place = client.next_order()
        await client.add_memory(user, "second")
        await client.add_memory(user, "first", order=place)
        handle = await client.submit_add(user, "third", order=client.next_order())
        await handle.result(30)
        assert [each.text for each in await client.list_memory(user)] == [
            "first", "second", "third"
        ]  # fmt: skip
        for wrong in (-1, 2**53, 1.5, True, "1"):
            with pytest.raises(InvalidInput, match="order"):
                await client.add_memory(user, "tea", order=wrong)  # type: ignore[arg-type]

    async def test_adding_nothing_does_nothing(self, client: MemoryClient, user: str) -> None:
        assert (await client.add_memory(user, [])).record_ids == []
        with pytest.raises(InvalidInput, match="empty"):
            await client.submit_add(user, [])
        with pytest.raises(InvalidInput, match="user_id"):
            await client.add_memory("", [])

    async def test_tenants_are_apart(self, redis_worker: Worker, user: str) -> None:
        def tenant(name: str) -> MemoryClient:
            return MemoryClient(redis_worker.url, namespace=redis_worker.namespace, tenant=name)

        async with tenant("one") as one, tenant("two") as two:
            await one.add_memory(user, "tea")
            assert await two.list_memory(user) == []
            assert (await two.delete_memory(user)).removed == 0
            assert len(await one.search_memory(user, "tea")) == 1


class _TheirMessage(BaseModel):
    """A caller's own message class."""

    model_config = ConfigDict(extra="forbid")
    role: str
    content: list[dict[str, str]]
    status: str = "created"


async def test_results_come_as_the_callers_class(redis_worker: Worker, user: str) -> None:
    mine = _TheirMessage(role="user", content=[{"type": "text", "text": "tea"}])
    async with MemoryClient(
        redis_worker.url, namespace=redis_worker.namespace, message_type=_TheirMessage
    ) as client:
        await client.add_memory(user, [mine])
        assert await client.list_memory(user) == [mine]
        (hit,) = await client.search(user, "tea")
        assert hit.message == mine


async def test_a_message_that_does_not_fit_the_callers_class_is_named(
    redis_worker: Worker, user: str
) -> None:
    async with MemoryClient(
        redis_worker.url, namespace=redis_worker.namespace, message_type=_TheirMessage
    ) as client:
        added = await client.add_memory(user, "content that is a string", "s")
        await client.add_memory(user, {"role": "user", "content": "no list of parts"}, "s")
        with pytest.raises(ConfigurationError, match="message_type"):
            await client.list_memory(user)
        assert (await client.delete_memory(user)).removed == 2
        assert added.added == 1


class TestHandles:
    async def test_a_handle_tells_state_and_result(self, client: MemoryClient, user: str) -> None:
        handle = await client.submit_add(user, "tea")
        added = await handle.result(timeout=30)
        assert added.added == 1
        assert await handle.status() is JobState.SUCCEEDED
        assert await handle.result() == added

    async def test_every_operation_can_be_submitted(self, client: MemoryClient, user: str) -> None:
        await client.add_memory(user, "tea", "s")
        hits = await (await client.submit_search(user, "tea")).result(30)
        records = await (await client.submit_list(user)).result(30)
        deleted = await (await client.submit_delete(user, "s")).result(30)
        assert [hit.message.text for hit in hits] == ["tea"]
        assert [record.session_id for record in records] == ["s"]
        assert deleted.removed == 1

    async def test_another_process_takes_a_handle_up_by_its_id(
        self, client: MemoryClient, redis_worker: Worker, user: str
    ) -> None:
        handle = await client.submit_add(user, ["a", "b"])
        program = (
            "import asyncio, sys, recallq\n"
            "async def main():\n"
            "    async with recallq.MemoryClient() as client:\n"
            "        handle = client.handle(sys.argv[1])\n"
            "        print((await handle.result(30)).added, await handle.status())\n"
            "asyncio.run(main())\n"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            handle.id,
            stdout=subprocess.PIPE,
            env=clean_environment(
                RECALLQ_REDIS_URL=redis_worker.url, RECALLQ_NAMESPACE=redis_worker.namespace
            ),
        )
        output, _ = await process.communicate()
        assert output.decode().split() == ["2", "succeeded"]

    async def test_an_unknown_id_is_an_error(self, client: MemoryClient, user: str) -> None:
        real = await client.submit_add(user, "tea")
        batch = real.id.rpartition("-")[0]
        for job_id in ("0123456789abcdef-1-0", f"{batch}-999"):
            stranger = client.handle(job_id)
            with pytest.raises(UnknownJob):
                await stranger.status()
            with pytest.raises(UnknownJob):
                await stranger.result(30)
        await real.result(30)
        with pytest.raises(UnknownJob):
            await client.handle(f"{batch}-999").status()
        for nonsense in ("", "tea", "0123456789abcdef-1", "x" * 10_000):
            with pytest.raises(UnknownJob):
                client.handle(nonsense)


class TestWithoutAWorker:
    """Jobs that nobody runs yet."""

    @pytest.fixture
    async def lonely(self, redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
        async with MemoryClient(redis_url, namespace=namespace) as client:
            with no_blocking():
                yield client

    async def test_a_submitted_job_is_queued_until_a_worker_comes(
        self, lonely: MemoryClient, start_worker: Callable[..., Worker], user: str
    ) -> None:
        handle = await lonely.submit_add(user, "tea")
        assert await handle.status() is JobState.QUEUED
        with pytest.raises(JobTimeout, match=handle.id):
            await handle.result(timeout=0.1)
        await asyncio.to_thread(start_worker)
        assert (await handle.result(timeout=30)).added == 1

    async def test_a_cancelled_job_is_never_run(
        self, lonely: MemoryClient, start_worker: Callable[..., Worker], user: str
    ) -> None:
        doomed, kept = await asyncio.gather(
            lonely.submit_add(user, "cancelled"), lonely.submit_add(user, "kept")
        )
        assert doomed.id.rpartition("-")[0] == kept.id.rpartition("-")[0]  # of one batch
        assert await doomed.cancel()
        assert await doomed.cancel()
        assert await doomed.status() is JobState.CANCELLED
        with pytest.raises(JobCancelled):
            await doomed.result(30)
        await asyncio.to_thread(start_worker)
        await kept.result(30)
        assert [each.text for each in await lonely.list_memory(user)] == ["kept"]
        assert await doomed.status() is JobState.CANCELLED
        assert not await kept.cancel()

    async def test_a_call_that_nobody_answers_says_so_in_time(
        self, lonely: MemoryClient, user: str
    ) -> None:
        began = time.monotonic()
        with pytest.raises(JobTimeout, match="no worker is running"):
            await lonely.add_memory(user, "tea", timeout=0.3)
        assert time.monotonic() - began < 15

    async def test_a_job_past_its_deadline_is_not_run(
        self, lonely: MemoryClient, start_worker: Callable[..., Worker], user: str
    ) -> None:
        handle = await lonely.submit_add(user, "too late", timeout=0.05)
        await asyncio.sleep(0.1)
        await asyncio.to_thread(start_worker)
        with pytest.raises(JobExpired):
            await handle.result(30)

        async def expired() -> bool:  # the worker may be about to say so as well
            return await handle.status() is JobState.EXPIRED

        await eventually(expired)
        assert await lonely.list_memory(user) == []

    async def test_health_is_false(self, lonely: MemoryClient) -> None:
        assert await lonely.health(timeout=0.2) is False

    async def test_beyond_the_high_water_mark_calls_are_refused_whole(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        async with MemoryClient(redis_url, namespace=namespace, high_water_mark=3) as client:
            for _ in range(3):
                await client.submit_add(user, "tea")
            with pytest.raises(QueueFull) as refused:
                await client.submit_add(user, "one too many")
            assert refused.value.retry_after > 0
            await client.submit_add(user, "another lane", lane="bulk")
            async with redis_at(redis_url) as redis:
                assert await redis.llen(f"{namespace}.live") == 3
                assert await redis.zcard(f"{namespace}:queued:live") == 3

    async def test_beyond_max_in_flight_calls_wait(
        self, redis_url: str, namespace: str, start_worker: Callable[..., Worker], user: str
    ) -> None:
        async with MemoryClient(redis_url, namespace=namespace, max_in_flight=2) as client:
            calls = [asyncio.create_task(client.add_memory(user, str(n))) for n in range(10)]

            async def two_are_out() -> bool:
                return (await client.transport.fleet()).outstanding == 2

            await eventually(two_are_out)
            await asyncio.sleep(0.1)
            assert await two_are_out()
            await asyncio.to_thread(start_worker)
            await asyncio.gather(*calls)

    @staticmethod
    async def submit_to_one_that_hangs(
        client: MemoryClient, redis: EmbeddedRedis, count: int, seconds: float
    ) -> list[JobHandle | BaseException]:
        """What comes of so many adds of a user, if Redis does nothing for so long."""
        assert redis.pid is not None
        os.kill(redis.pid, signal.SIGSTOP)
        try:
            calls = [asyncio.create_task(client.submit_add("ann", str(n))) for n in range(count)]
            await asyncio.wait(calls, timeout=seconds)
        finally:
            os.kill(redis.pid, signal.SIGCONT)
        return await asyncio.gather(*calls, return_exceptions=True)

    async def test_writes_are_accepted_in_order_however_long_redis_takes(
        self, tmp_path: Path
    ) -> None:
        with EmbeddedRedis(tmp_path) as own:
            async with MemoryClient(own.url, batch_max_jobs=5) as client:
                handles = await self.submit_to_one_that_hangs(client, own, 100, 2)
                assert {type(handle) for handle in handles} == {JobHandle}
                async with redis_at(own.url) as redis:
                    queued = await redis.lrange("recallq.live", 0, -1)
        orders = [
            job.order
            for message in reversed(queued)
            for job in decode_batch(orjson.loads(orjson.loads(message)["body"])[0][0]).jobs
            if isinstance(job, AddJob)
        ]
        assert len(orders) == 100
        assert orders == sorted(orders)

    async def test_in_an_outage_every_write_is_told_within_the_time_of_two(
        self, tmp_path: Path
    ) -> None:
        """That of the first, and that of all others."""
        with EmbeddedRedis(tmp_path) as own:
            async with MemoryClient(own.url, batch_max_jobs=1) as client:
                began = time.monotonic()
                hung = 3 * COMMAND_TIMEOUT
                outcomes = await self.submit_to_one_that_hangs(client, own, 30, hung)
                assert time.monotonic() < began + hung
        assert {type(outcome) for outcome in outcomes} == {ServiceUnavailable}

    async def test_cancelling_a_call_ends_it(self, lonely: MemoryClient, user: str) -> None:
        call = asyncio.create_task(lonely.add_memory(user, "tea"))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert lonely.transport.waiting == 0

    async def test_stopping_the_client_ends_every_call(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        client = MemoryClient(redis_url, namespace=namespace, max_in_flight=5)
        await client.start()
        calls = [asyncio.create_task(client.add_memory(user, str(n))) for n in range(20)]
        await asyncio.sleep(0.05)
        await client.stop()
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
        assert {type(outcome) for outcome in outcomes} == {ClientClosed}


class TestAWorkerThatObeys:
    """Failures and delays, by a backend that does what messages tell it."""

    @pytest.fixture
    async def obeyed(
        self, redis_url: str, namespace: str, start_worker: Callable[..., Worker]
    ) -> AsyncIterator[MemoryClient]:
        await asyncio.to_thread(start_worker, backend="obedient", retry_attempts=2, retry_base=0.1)
        async with MemoryClient(redis_url, namespace=namespace, timeout=60) as client:
            with no_blocking():
                yield client

    async def test_one_bad_job_fails_alone(self, obeyed: MemoryClient, user: str) -> None:
        texts = ["one", "refuse", "two", "unavailable", "explode", "three"]
        outcomes = await asyncio.gather(
            *(obeyed.add_memory(user, text) for text in texts), return_exceptions=True
        )
        assert [type(outcome).__name__ for outcome in outcomes] == [
            "AddResult", "BackendError", "AddResult", "BackendUnavailable", "InternalError",
            "AddResult",
        ]  # fmt: skip
        refused, unavailable, exploded = outcomes[1], outcomes[3], outcomes[4]
        assert isinstance(refused, BackendError)
        assert "as told" in str(refused)
        assert refused.job_id is not None
        assert isinstance(unavailable, BackendUnavailable)
        assert unavailable.retry_after == 1.5
        assert isinstance(exploded, InternalError)
        assert "secret" not in str(exploded)
        found = await obeyed.list_memory(user)
        assert [message.text for message in found] == ["one", "two", "three"]

    async def test_a_slow_job_does_not_hold_its_batch_mates(
        self, obeyed: MemoryClient, user: str
    ) -> None:
        slow, *quick = await asyncio.gather(
            *(obeyed.submit_search(user, query) for query in ("sleep 25", *["x"] * 20))
        )
        assert len({each.id.rpartition("-")[0] for each in (slow, *quick)}) == 1  # of one batch
        for each in quick:
            assert await each.result(20) == []
        assert await slow.status() is JobState.RUNNING
        assert not await slow.cancel()

    async def test_a_handle_of_a_running_job_says_so(self, obeyed: MemoryClient, user: str) -> None:
        handle = await obeyed.submit_search(user, "sleep 3")

        async def running() -> bool:
            return await handle.status() is JobState.RUNNING

        await eventually(running)
        assert await handle.result(30) == []

    async def test_a_job_beyond_the_time_limit_ends(
        self, redis_url: str, namespace: str, start_worker: Callable[..., Worker], user: str
    ) -> None:
        await asyncio.to_thread(
            start_worker, backend="obedient", job_timeout=1.5, retry_attempts=2, retry_base=0.1
        )
        async with MemoryClient(redis_url, namespace=namespace) as client:
            with no_blocking(), pytest.raises(BackendUnavailable, match=r"1\.5 s"):
                await client.search(user, "sleep 100", timeout=60)

    async def test_a_job_for_another_backend_is_refused(
        self, obeyed: MemoryClient, redis_url: str, namespace: str, user: str
    ) -> None:
        async with MemoryClient(redis_url, namespace=namespace, backend="redis") as picky:
            with pytest.raises(WrongBackend, match="obedient"):
                await picky.add_memory(user, "tea")
        assert await obeyed.list_memory(user) == []

    async def test_workers_are_known_while_they_live(self, obeyed: MemoryClient) -> None:
        (worker,) = await obeyed.workers()
        assert worker.backend == "obedient"
        assert worker.lanes == ["live", "bulk", "slow"]
        assert (await obeyed.check_backend(timeout=30)).backend == "obedient"


class TestTheEventLoop:
    async def test_a_heartbeat_stays_on_time_during_a_thousand_calls(
        self, client: MemoryClient, user: str
    ) -> None:
        lateness: list[float] = []

        async def beat() -> None:
            while True:
                began = time.thread_time()
                await asyncio.sleep(0.005)
                lateness.append(time.thread_time() - began)

        # What other tests have imported and left in this process is not looked through meanwhile.
        gc.collect()
        gc.freeze()
        heart = asyncio.create_task(beat())
        try:
            await asyncio.gather(
                *(client.add_memory(f"{user}-{n % 100}", "x" * 300) for n in range(1000))
            )
            await asyncio.gather(
                *(client.search_memory(f"{user}-{n % 100}", "x") for n in range(1000))
            )
        finally:
            heart.cancel()
            gc.unfreeze()
        lateness.sort()
        assert len(lateness) > 10
        # Blocking calls raise (see conftest); this is about long stretches of our own work, so it
        # counts the time of our own thread: other processes share the machine's cores.
        assert lateness[len(lateness) // 2] < 0.05
        assert lateness[-1] < 0.5


class TestStartAndStop:
    async def test_without_redis_it_says_where_it_looked(self) -> None:
        client = MemoryClient("redis://:geheim@127.0.0.1:1/0", connect_timeout=1)
        with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:1") as refused:
            await client.start()
        assert "geheim" not in str(refused.value)
        with pytest.raises(ClientClosed):
            await client.list_memory("u")
        await client.stop()

    async def test_a_client_that_was_not_started_says_so(self) -> None:
        client = MemoryClient("redis://127.0.0.1:1/0")
        with pytest.raises(ClientClosed, match="not started"):
            await client.add_memory("u", "tea")
        with pytest.raises(ClientClosed):
            await client.handle("0123456789abcdef-1-0").status()

    async def test_start_and_stop_can_be_repeated(self, redis_worker: Worker, user: str) -> None:
        client = MemoryClient(redis_worker.url, namespace=redis_worker.namespace)
        for _ in range(2):
            await client.start()
            await client.start()
            await client.add_memory(user, "tea")
            await client.stop()
            await client.stop()
        async with client:
            assert len(await client.list_memory(user)) == 2

    async def test_it_leaves_no_task_behind(self, redis_worker: Worker, user: str) -> None:
        before = asyncio.all_tasks()
        async with MemoryClient(redis_worker.url, namespace=redis_worker.namespace) as client:
            await client.add_memory(user, "tea")
        assert asyncio.all_tasks() == before


class TestOneRedisForEachPurpose:
    async def test_broker_coordination_results_and_store_may_be_apart(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        urls: dict[str, Any] = {
            "broker_url": redis_url.replace("/0", "/1"),
            "coordination_url": redis_url.replace("/0", "/2"),
            "result_url": redis_url.replace("/0", "/3"),
        }
        store_url = redis_url.replace("/0", "/4")
        with Worker(redis_url, namespace=namespace, store_url=store_url, **urls):
            async with MemoryClient(redis_url, namespace=namespace, **urls) as client:
                added = await asyncio.gather(
                    *(client.add_memory(f"{user}{n % 7}", f"tea {n}") for n in range(100))
                )
                assert sum(each.added for each in added) == 100
                handle = await client.submit_search(f"{user}1", "tea")
                assert len(await handle.result(30)) == 10
                assert await client.delete_memory(f"{user}1")

                async def all_settled() -> bool:  # on another Redis, so just after the answer
                    return not (await client.transport.fleet()).outstanding

                await eventually(all_settled)
        async with redis_at(redis_url) as redis:
            strays = [key async for key in redis.scan_iter(f"{namespace}*")]
        assert strays == []
        async with redis_at(store_url) as redis:
            stored = [key async for key in redis.scan_iter(f"{namespace}:m:*")]
        assert stored


async def test_one_redis_may_go_by_two_names(redis_url: str, namespace: str, user: str) -> None:
    other = redis_url.replace("127.0.0.1", "localhost")
    assert other != redis_url
    worker = Worker(redis_url, namespace=namespace, result_url=other)
    await asyncio.to_thread(worker.start)
    try:
        async with MemoryClient(redis_url, namespace=namespace, result_url=other) as client:
            handle = await client.submit_add(user, "tea")

            async def settled() -> bool:
                return (await handle.status()).settled

            await eventually(settled)
            assert (await handle.result(30)).added == 1
    finally:
        worker.close()


async def test_results_missed_while_disconnected_are_found(
    client: MemoryClient, redis_url: str, user: str
) -> None:
    """Every connection of every client is killed again and again under load."""
    async with redis_at(redis_url) as redis:
        calls = [
            asyncio.create_task(client.add_memory(f"{user}-{n}", "tea", timeout=60))
            for n in range(200)
        ]
        for _ in range(5):
            await redis.client_kill_filter(_type="pubsub")
            await asyncio.sleep(0.02)
        outcomes = await asyncio.gather(*calls)
    assert sum(outcome.added for outcome in outcomes) == 200


async def test_a_message_by_plain_celery_is_run(
    client: MemoryClient, redis_url: str, redis_worker: Worker, user: str
) -> None:
    """A standard producer can send a batch too; it takes effect as if it were submitted now."""
    from celery import Celery

    batch_id = "fedcba9876543210-1"
    batch = {
        "v": 1,
        "id": batch_id,
        "lane": "live",
        "operation": "add",
        "jobs": [
            {
                "id": f"{batch_id}-0",
                "scope": {"tenant": "default", "user_id": user, "session_id": "s"},
                "submitted_at": time.time(),
                "messages": [{"role": "user", "content": "by celery"}],
                "order": 1,
            }
        ],
    }
    app = Celery(broker=redis_url, backend="disabled://", set_as_current=False)
    await asyncio.to_thread(
        app.send_task,
        "recallq.add",
        args=[json.dumps(batch)],
        task_id=batch_id,
        queue=f"{redis_worker.namespace}.live",
    )

    async def stored() -> bool:
        return [each.text for each in await client.list_memory(user)] == ["by celery"]

    await eventually(stored)
    app.close()


async def test_what_cannot_be_decoded_becomes_a_dead_letter(
    client: MemoryClient, redis_url: str, redis_worker: Worker
) -> None:
    from celery import Celery

    app = Celery(broker=redis_url, backend="disabled://", set_as_current=False)
    before = await client.dead_letters.count()
    for payload in ('{"v": 99}', "nonsense", 7):
        await asyncio.to_thread(
            app.send_task,
            "recallq.add",
            args=[payload],
            queue=f"{redis_worker.namespace}.live",
        )

    async def all_three() -> bool:
        return await client.dead_letters.count() == before + 3

    await eventually(all_three)
    assert await client.health(timeout=30)
    app.close()


async def test_a_redis_that_goes_away_ends_calls_by_their_deadline(namespace: str) -> None:
    with EmbeddedRedis() as server:
        async with MemoryClient(server.url, namespace=namespace, connect_timeout=1) as client:
            waiting = asyncio.create_task(client.add_memory("u", "tea", timeout=2))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(server.kill)
            began = time.monotonic()
            with pytest.raises(JobTimeout):
                await waiting
            with pytest.raises((ServiceUnavailable, JobTimeout)):
                await client.add_memory("u", "tea", timeout=2)
            assert time.monotonic() - began < 20
