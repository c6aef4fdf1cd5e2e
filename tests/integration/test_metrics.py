"""What a worker tells those who watch over it: alive, ready, and what it has done."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from recallq import BackendError, JobTimeout, MemoryClient, ServiceUnavailable
from recallq.embedded import EmbeddedRedis
from tests.scraping import addresses, ask, scraped, value
from tests.support import Shell, Worker, eventually, redis_at

StartWorker = Callable[..., Worker]


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace, timeout=30) as memory:
        yield memory


async def test_jobs_are_counted_and_timed(client: MemoryClient, start_worker: StartWorker) -> None:
    await asyncio.to_thread(start_worker, http_port=0)
    await asyncio.gather(*(client.add_memory(f"u{n % 7}", f"tea {n}") for n in range(50)))
    for _ in range(3):
        await client.search_memory("u1", "tea")
    await (await client.submit_add("u1", "milk", lane="bulk")).result(30)
    (address,) = await addresses(client)
    samples = await scraped(address)
    adds = {"operation": "add", "lane": "live"}
    assert value(samples, "recallq_jobs_total", **adds, outcome="succeeded") == 50
    for phase in ("queued", "run", "total"):
        count = value(samples, "recallq_job_seconds_count", **adds, phase=phase)
        assert count == value(samples, "recallq_job_seconds_bucket", **adds, phase=phase, le="+Inf")
        assert count == 50
    total = value(samples, "recallq_job_seconds_sum", **adds, phase="total")
    parts = [value(samples, "recallq_job_seconds_sum", **adds, phase=p) for p in ("queued", "run")]
    assert 0 < total == pytest.approx(sum(parts), rel=0.01)
    assert value(samples, "recallq_batch_jobs_sum", **adds) == 50
    assert 1 <= value(samples, "recallq_batch_jobs_count", **adds) <= 50
    searches = {"operation": "search", "lane": "live", "outcome": "succeeded"}
    assert value(samples, "recallq_jobs_total", **searches) == 3
    assert value(samples, "recallq_settled_jobs_total", lane="live") == 53
    assert value(samples, "recallq_accepted_jobs_total", lane="bulk") == 1
    assert value(samples, "recallq_workers", lane="live") == 1
    assert value(samples, "recallq_coordination_up") == 1
    assert value(samples, "recallq_outstanding_jobs", lane="live") == 0
    assert value(samples, "process_resident_memory_bytes") > 1e6


async def test_every_process_counts_its_own(
    client: MemoryClient, start_worker: StartWorker
) -> None:
    await asyncio.gather(
        *(asyncio.to_thread(start_worker, http_port=0, lanes=lane) for lane in ("live", "bulk"))
    )
    await client.add_memory("u", "one")
    await client.add_memory("u", "two", lane="bulk")
    await client.add_memory("u", "three", lane="bulk")
    both = [await scraped(address) for address in await addresses(client)]
    for lane, count in (("live", 1), ("bulk", 2)):
        labels = {"operation": "add", "lane": lane, "outcome": "succeeded"}
        counted = [value(samples, "recallq_jobs_total", **labels) for samples in both]
        assert sorted(counted) == [0, count]
        told = {value(samples, "recallq_settled_jobs_total", lane=lane) for samples in both}
        assert told == {count}  # what the fleet shares, each tells


async def test_what_waits_and_what_went_wrong(
    client: MemoryClient, start_worker: StartWorker
) -> None:
    await asyncio.to_thread(
        start_worker, http_port=0, lanes="live", backend="slow_redis", retry_base=0.05
    )
    (address,) = await addresses(client)
    with pytest.raises(BackendError):
        await client.add_memory("ann", "refuse this")
    await client.submit_add("ann", "nobody takes this", lane="bulk")
    await asyncio.sleep(0.3)
    samples = await scraped(address)
    dead = {"operation": "add", "lane": "live"}
    assert value(samples, "recallq_jobs_total", **dead, outcome="dead") == 1
    assert value(samples, "recallq_dead_letters_total", **dead) == 1
    assert value(samples, "recallq_kept_dead_letters") == 1
    assert value(samples, "recallq_outstanding_jobs", lane="bulk") == 1
    assert value(samples, "recallq_queued_batches", lane="bulk") == 1
    assert value(samples, "recallq_oldest_queued_seconds", lane="bulk") >= 0.3


async def test_who_waits_in_the_slow_lane(
    client: MemoryClient, start_worker: StartWorker, namespace: str
) -> None:
    await asyncio.to_thread(
        start_worker, http_port=0, lanes="live", backend="extractor", slow_pause=0
    )
    (address,) = await addresses(client)
    handle = await client.submit_add("ann", "until released")

    async def waits() -> bool:
        samples = await scraped(address)
        assert value(samples, "recallq_slow_users") <= 1
        return value(samples, "recallq_slow_waiting_seconds") >= 0.5

    await eventually(waits)
    await asyncio.to_thread(start_worker, lanes="slow", backend="extractor")

    async def works() -> bool:
        samples = await scraped(address)
        assert value(samples, "recallq_slow_users") == 1
        return value(samples, "recallq_slow_waiting_seconds") == 0

    await eventually(works)
    async with redis_at(client.settings.redis_url) as redis:
        await redis.set(f"{namespace}:released", 1)
    await handle.result(30)


async def test_ready_is_who_can_work(namespace: str) -> None:
    with EmbeddedRedis() as redis:
        worker = Worker(redis.url, namespace=namespace, http_port=0)
        await asyncio.to_thread(worker.start)
        try:
            async with MemoryClient(redis.url, namespace=namespace) as client:
                (address,) = await addresses(client)
            assert ask(address, "/readyz") == (200, "ok\n")
            assert ask(address, "/healthz") == (200, "ok\n")
            assert ask(address, "/healthz", "HEAD") == (200, "")
            assert ask(address, "/other")[0] == 404
            assert ask(address, "/healthz", "POST")[0] == 405

            async def silent() -> bool:
                status, said = await asyncio.to_thread(ask, address, "/readyz")
                return status == 503 and "did not answer within" in said

            frozen = psutil.Process(redis.pid)
            frozen.suspend()
            try:
                await eventually(silent)
            finally:
                frozen.resume()
            redis.stop()

            async def unready() -> bool:
                status, said = await asyncio.to_thread(ask, address, "/readyz")
                return status == 503 and "Redis" in said

            await eventually(unready)
            assert ask(address, "/healthz") == (200, "ok\n")  # restarting it would not help
            samples = await scraped(address)
            assert value(samples, "recallq_coordination_up") == 0
        finally:
            await asyncio.to_thread(worker.close)


async def test_a_redis_that_is_full_is_said_to_be_full(namespace: str, tmp_path: Path) -> None:
    """Not that there is no worker: workers cannot even give a sign of life."""
    with EmbeddedRedis() as server:
        worker = Worker(server.url, namespace=namespace, http_port=0)
        await asyncio.to_thread(worker.start)
        shell = Shell(tmp_path, RECALLQ_REDIS_URL=server.url, RECALLQ_NAMESPACE=namespace)
        try:
            async with (
                redis_at(server.url) as redis,
                MemoryClient(server.url, namespace=namespace) as client,
            ):
                (address,) = await addresses(client)
                handle = await client.submit_add("ann", "tea", lane="slow")
                await handle.result(30)
                worker.signal(signal.SIGSTOP)
                waiting = asyncio.create_task(client.add_memory("ann", "milk", timeout=20))

                async def accepted() -> bool:
                    return (await client.transport.fleet()).outstanding == 1

                await eventually(accepted)
                await redis.config_set("maxmemory", 1)
                worker.signal(signal.SIGCONT)

                async def gone() -> bool:
                    return not await client.workers()

                await eventually(gone)
                status, said = await asyncio.to_thread(ask, address, "/readyz")
                assert status == 503
                assert "out of memory (maxmemory)" in said
                samples = await scraped(address)
                limit = value(samples, "recallq_coordination_memory_limit_bytes")
                assert value(samples, "recallq_coordination_memory_bytes") > limit == 1
                told = (await asyncio.to_thread(shell, "status")).stdout
                assert "Redis is out of memory" in told
                assert "start one" not in told
                with pytest.raises(ServiceUnavailable, match="out of memory"):
                    await client.add_memory("ann", "more")
                with pytest.raises(JobTimeout, match="out of memory"):
                    await waiting
                assert "out of memory (maxmemory); no writes are taken" in worker.output
                assert worker.output.count("sign of life") == 1  # and not every three seconds
                doctor = await asyncio.to_thread(lambda: shell("doctor", code=1))
                assert "raise its maxmemory" in doctor.stdout

                await redis.config_set("maxmemory", 0)

                async def ready() -> bool:
                    return (await asyncio.to_thread(ask, address, "/readyz"))[0] == 200

                await eventually(ready)
                assert (await client.add_memory("ann", "more", timeout=60)).added == 1
        finally:
            await asyncio.to_thread(worker.close)


async def test_a_port_that_is_taken(start_worker: StartWorker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        worker = start_worker(ready=False, http_port=taken.getsockname()[1])

        async def ended() -> bool:
            return not worker.is_alive()

        await eventually(ended)
    assert "RECALLQ_HTTP_PORT" in worker.output
    assert "Traceback" not in worker.output


async def test_connections_that_say_nothing(
    client: MemoryClient, start_worker: StartWorker
) -> None:
    worker = await asyncio.to_thread(lambda: start_worker(http_port=0))
    (address,) = await addresses(client)
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(200)
        ]
        assert len(psutil.Process(worker.pid).net_connections()) < 120
        await asyncio.to_thread(silent[0].recv, 1)  # it is closed after a while
        await asyncio.sleep(0.5)  # so are the others
        assert ask(address, "/healthz") == (200, "ok\n")
    reset = socket.create_connection((host, int(port)))
    reset.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    await asyncio.sleep(0.5)
    assert "Traceback" not in worker.output


async def test_an_address_that_is_not_here(start_worker: StartWorker) -> None:
    worker = start_worker(ready=False, http_port=0, http_host="192.0.2.1")

    async def ended() -> bool:
        return not worker.is_alive()

    await eventually(ended)
    assert "RECALLQ_HTTP_HOST" in worker.output
    assert "port of its own" not in worker.output


async def test_without_a_port_nothing_listens(
    client: MemoryClient, start_worker: StartWorker
) -> None:
    worker = await asyncio.to_thread(start_worker)
    await client.add_memory("u", "tea")
    assert await addresses(client) == []
    worker.signal(signal.SIGTERM)


async def test_what_is_told_is_what_the_page_says(
    client: MemoryClient, start_worker: StartWorker
) -> None:
    await asyncio.to_thread(start_worker, http_port=0, backend="slow_redis", retry_base=0.05)
    (address,) = await addresses(client)
    with pytest.raises(BackendError):
        await client.add_memory("ann", "refuse this")
    _, text = ask(address, "/metrics")
    told = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(text)
        if family.name.startswith("recallq_")
    }
    page = (Path(__file__).parents[2] / "deploy" / "metrics.md").read_text()
    assert told == set(re.findall(r"^\| `(recallq_\w+)`", page, re.MULTILINE))
