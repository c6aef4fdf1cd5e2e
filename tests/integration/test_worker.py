"""Worker processes: how they start, refuse to start, and stop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from recallq import ConfigurationError, JobState, MemoryClient, MemoryServiceFactory
from recallq.embedded import EmbeddedRedis
from recallq.keys import Keys
from tests.support import PLUGINS, Worker, clean_environment, eventually, redis_at


def refused(**variables: str) -> str:
    """What a worker that must not start says; it must say it in one line."""
    run = subprocess.run(
        [sys.executable, "-m", "recallq_worker", "worker"],
        env=clean_environment(**variables),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    output = run.stderr.decode()
    assert "Traceback" not in output
    told = [line for line in output.splitlines() if line.startswith("recallq worker: ")]
    assert len(told) == 1, output
    return told[0]


class TestRefusals:
    def test_a_second_worker_on_the_in_memory_backend(
        self, redis_url: str, namespace: str, start_worker: Callable[..., Worker]
    ) -> None:
        first = start_worker(backend="in_memory")
        told = refused(
            RECALLQ_REDIS_URL=redis_url, RECALLQ_NAMESPACE=namespace, RECALLQ_BACKEND="in_memory"
        )
        assert str(first.pid) in told
        assert "RECALLQ_BACKEND=redis" in told
        assert first.is_alive()

    def test_an_unknown_backend(self, redis_url: str) -> None:
        told = refused(RECALLQ_REDIS_URL=redis_url, RECALLQ_BACKEND="magic")
        assert "'magic'" in told
        assert "in_memory, mem0, redis" in told

    def test_no_redis(self) -> None:
        told = refused(RECALLQ_REDIS_URL="redis://:geheim@127.0.0.1:1/0")
        assert "127.0.0.1:1" in told
        assert "geheim" not in told

    def test_a_wrong_setting(self, redis_url: str) -> None:
        told = refused(RECALLQ_REDIS_URL=redis_url, RECALLQ_CONCURRENCY="many")
        assert "RECALLQ_CONCURRENCY" in told

    def test_an_unknown_lane(self, redis_url: str) -> None:
        run = subprocess.run(
            [sys.executable, "-m", "recallq_worker", "worker", "--lanes", "fast"],
            env=clean_environment(RECALLQ_REDIS_URL=redis_url),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == 1
        assert b"live, bulk, slow" in run.stderr


class TestTheInMemoryBackend:
    async def test_it_serves_the_four_calls(
        self, redis_url: str, namespace: str, start_worker: Callable[..., Worker], user: str
    ) -> None:
        await asyncio.to_thread(start_worker, backend="in_memory")
        async with MemoryClient(redis_url, namespace=namespace) as client:
            await client.add_memory(user, ["tea", "coffee"])
            assert len(await client.search_memory(user, "tea")) == 1
            assert len(await client.list_memory(user)) == 2
            assert (await client.delete_memory(user)).removed == 2

    def test_after_a_stop_or_a_kill_the_next_may_start_at_once(
        self, start_worker: Callable[..., Worker]
    ) -> None:
        usual = -time.monotonic()
        worker = start_worker(backend="in_memory")
        usual += time.monotonic()
        worker.stop()
        worker = start_worker(backend="in_memory")
        took: list[float] = []
        # Where the machine stalls for a while, once is enough.
        while not took or (took[-1] >= usual + 5 and len(took) < 3):
            worker.kill()
            began = time.monotonic()
            worker = start_worker(backend="in_memory")
            took.append(time.monotonic() - began)
        assert took[-1] < usual + 5  # the lease of who was killed lasts for seven more at least


class TestPlainCelery:
    def test_the_celery_command_runs_a_worker_too(self, redis_url: str, namespace: str) -> None:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "celery", "-A", "recallq_worker", "worker",
                "-Q", f"{namespace}.live",
            ],
            env=clean_environment(RECALLQ_REDIS_URL=redis_url, RECALLQ_NAMESPACE=namespace),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

        async def work() -> None:
            async with MemoryClient(redis_url, namespace=namespace) as client:
                await client.add_memory("u", "tea", timeout=60)
                assert [each.lanes for each in await client.workers()] == [["live"]]

        try:
            asyncio.run(work())
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        assert process.returncode == 0

    def test_processes_instead_of_threads_share_a_backend_that_can(
        self, redis_url: str, namespace: str
    ) -> None:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "celery", "-A", "recallq_worker", "worker",
                "-P", "processes", "-c", "2", "-Q", f"{namespace}.live",
            ],
            env=clean_environment(RECALLQ_REDIS_URL=redis_url, RECALLQ_NAMESPACE=namespace),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

        async def work() -> None:
            async with MemoryClient(redis_url, namespace=namespace, timeout=60) as client:
                added = await asyncio.gather(
                    *(client.add_memory(f"u{n}", f"tea {n}") for n in range(200))
                )
                assert sum(each.added for each in added) == 200

                async def both_there() -> bool:
                    return len(await client.workers()) == 2

                await eventually(both_there)

        try:
            asyncio.run(work())
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
        assert process.returncode == 0

    def test_a_killed_process_among_them_loses_nothing(
        self, redis_url: str, namespace: str
    ) -> None:
        parent = subprocess.Popen(
            [
                sys.executable, "-m", "celery", "-A", "recallq_worker", "worker",
                "-P", "processes", "-c", "2", "-Q", f"{namespace}.live",
            ],
            env=clean_environment(
                RECALLQ_REDIS_URL=redis_url,
                RECALLQ_NAMESPACE=namespace,
                RECALLQ_BACKEND="slow_redis",
                PYTHONPATH=os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")]),
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

        async def work() -> None:
            async with MemoryClient(redis_url, namespace=namespace) as client:
                handle = await client.submit_add("u", "until released")

                async def running() -> bool:
                    return await handle.status() is JobState.RUNNING

                await eventually(running, 60)
                async with redis_at(redis_url) as redis:
                    batch = Keys(namespace).batch(handle.id.rpartition("-")[0])
                    worker_id = str(await redis.hget(batch, "w"))
                child = int(worker_id.split("-")[-2])
                assert child in [each.pid for each in psutil.Process(parent.pid).children()]
                os.kill(child, signal.SIGKILL)
                async with redis_at(redis_url) as redis:
                    await redis.set(f"{namespace}:released", 1)
                assert (await handle.result(60)).added == 1
                assert len(await client.list_memory("u")) == 1

        try:
            asyncio.run(work())
        finally:
            parent.send_signal(signal.SIGTERM)
            parent.wait(timeout=60)


class TestScalingOut:
    async def test_two_workers_share_the_work(
        self, redis_url: str, namespace: str, start_worker: Callable[..., Worker], user: str
    ) -> None:
        for _ in range(2):
            await asyncio.to_thread(start_worker)
        async with MemoryClient(redis_url, namespace=namespace) as client:
            assert len(await client.workers()) == 2
            added = await asyncio.gather(
                *(client.add_memory(f"{user}-{n % 30}", f"tea {n}") for n in range(1000))
            )
            assert sum(each.added for each in added) == 1000

    async def test_a_stopped_worker_is_not_listed_any_more(
        self, redis_url: str, namespace: str, start_worker: Callable[..., Worker]
    ) -> None:
        worker = await asyncio.to_thread(start_worker)
        async with MemoryClient(redis_url, namespace=namespace) as client:
            assert len(await client.workers()) == 1
            await asyncio.to_thread(worker.stop)
            assert await client.workers() == []

    async def test_lanes_are_worked_on_by_those_who_take_them(
        self, redis_url: str, namespace: str, start_worker: Callable[..., Worker], user: str
    ) -> None:
        await asyncio.to_thread(start_worker, lanes="bulk")
        async with MemoryClient(redis_url, namespace=namespace) as client:
            handle = await client.submit_add(user, "live")
            assert (await client.add_memory(user, "bulk", lane="bulk")).added == 1
            assert (await handle.status()).value == "queued"
            await asyncio.to_thread(start_worker, lanes="live")
            assert (await handle.result(30)).added == 1


class TestOutlivingRedis:
    def test_an_idle_worker_works_on_after_a_restart_of_redis(self, namespace: str) -> None:
        async def work(url: str) -> None:
            async with MemoryClient(url, namespace=namespace) as client:
                assert (await client.add_memory("u", "tea", timeout=60)).added == 1

        with EmbeddedRedis() as server, Worker(server.url, namespace=namespace) as worker:
            asyncio.run(work(server.url))
            server.restart()
            asyncio.run(work(server.url))
            assert worker.is_alive()


class TestTheFactory:
    async def test_it_returns_a_started_client_for_the_backend_asked_for(
        self,
        redis_url: str,
        namespace: str,
        start_worker: Callable[..., Worker],
        monkeypatch: pytest.MonkeyPatch,
        user: str,
    ) -> None:
        await asyncio.to_thread(start_worker)
        monkeypatch.setenv("MEMORY_BACKEND", "Redis")
        monkeypatch.setenv("MEMORY_REDIS_REDIS_URL", redis_url)
        client = await MemoryServiceFactory.create(namespace=namespace)
        await client.add_memory(user, "tea")
        assert client.settings.backend == "redis"
        await client.stop()
        with pytest.raises(ConfigurationError, match="in_memory"):
            await MemoryServiceFactory.create("in_memory", redis_url=redis_url, namespace=namespace)

    async def test_the_references_variables_configure_a_worker_too(
        self, redis_url: str, namespace: str, user: str
    ) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "recallq_worker", "worker"],
            env=clean_environment(
                MEMORY_BACKEND="redis",
                MEMORY_REDIS_REDIS_URL=redis_url,
                MEMORY_REDIS_MAX_MESSAGES_PER_SESSION="2",
                RECALLQ_NAMESPACE=namespace,
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            async with MemoryClient(redis_url, namespace=namespace) as client:
                await client.add_memory(user, ["one", "two", "three"], timeout=60)
                found = await client.list_memory(user)
        finally:
            process.terminate()
            process.wait(60)
        assert [message.text for message in found] == ["two", "three"]


class TestSteppingBack:
    @pytest.mark.parametrize(
        ("lanes", "settings", "nice"),
        [
            ("live,bulk", {}, 0),
            ("bulk", {}, 10),
            ("bulk", {"nice": 3}, 3),
            ("live", {"nice": 2}, 2),
        ],
    )
    def test_who_takes_no_live_work_goes_behind_who_does(
        self, start_worker: Callable[..., Worker], lanes: str, settings: dict[str, int], nice: int
    ) -> None:
        worker = start_worker(lanes=lanes, **settings)
        mine = os.getpriority(os.PRIO_PROCESS, 0)
        wanted = min(mine + nice, 19)
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) == wanted
        threads = [each.id for each in psutil.Process(worker.pid).threads()]
        found = [os.getpriority(os.PRIO_PROCESS, each) for each in threads]
        assert found.count(wanted) >= len(found) - 1  # all but the one that waits for the stop
