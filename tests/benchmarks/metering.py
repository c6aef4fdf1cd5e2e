"""``python -m tests.benchmarks.metering``: what being watched costs.

Workers on one Redis do the same in turns: two that nobody watches, whose difference is that of the
machine's moods, one that is asked for its metrics every second, and two whose clients trace one
call in a hundred, or each. Read the ratios; the throughput's has the client's part in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from statistics import median
from typing import Annotated, Any

import typer
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from recallq import MemoryClient
from tests.benchmarks.speed.stack import processor_time, running, server
from tests.benchmarks.speed.works import query, text
from tests.loopback.otlp_collector import OtlpCollector
from tests.support import Worker

_IN_FLIGHT = 200
_USERS = 50
_SCRAPE_EVERY = 1.0
_SAMPLED = {"traces-1-percent": 0.01, "traces-all": 1.0}


async def _scraped(address: str) -> None:
    host, _, port = address.rpartition(":")
    while True:
        # First, so that short rounds are not asked more often than that.
        await asyncio.sleep(_SCRAPE_EVERY)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b"recallq_jobs_total" in await reader.read()
        writer.close()


@contextlib.asynccontextmanager
async def _watched(client: MemoryClient) -> AsyncIterator[None]:
    """Asks the client's worker for its metrics, if it tells them."""
    (worker,) = await client.workers()
    watching = None if worker.http is None else asyncio.create_task(_scraped(worker.http))
    try:
        yield
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.wait([watching])
            if not watching.cancelled():
                watching.result()


async def _do(call: Callable[[int], Awaitable[object]], times: int) -> None:
    left = iter(range(times))

    async def caller() -> None:
        for number in left:
            await call(number)

    await asyncio.gather(*(caller() for _ in range(_IN_FLIGHT)))


async def _measure(url: str, workers: dict[str, Worker], rounds: int, times: int) -> None:
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    async with contextlib.AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(
                MemoryClient(url, namespace=name, traces=_SAMPLED.get(name, 0.0))
            )
            for name in workers
        }
        for number in range(rounds + 1):  # the first is not counted
            order = list(workers)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                client, pid = clients[name], workers[name].pid

                async def add(n: int, client: MemoryClient = client, number: int = number) -> None:
                    await client.add_memory(f"user-{number}-{n % _USERS}", text(n))

                async def search(
                    n: int, client: MemoryClient = client, number: int = number
                ) -> None:
                    await client.search_memory(f"user-{number}-{n % _USERS}", query(n))

                async with _watched(client):
                    for work, call in (("adds", add), ("searches", search)):
                        before, began = processor_time(pid), time.perf_counter()
                        await _do(call, times)
                        if number:
                            seconds[work, name].append(time.perf_counter() - began)
                            spent[work, name].append(processor_time(pid) - before)
    print("| work | watched by | us of the worker | ratio | throughput, ratio |")
    print("|---|---|---|---|---|")
    for work in ("adds", "searches"):
        for name in workers:
            each = median(spent[work, name]) / times * 1e6
            cost = _ratio(spent[work, name], spent[work, "nothing"])
            rate = _ratio(seconds[work, "nothing"], seconds[work, name])
            print(f"| {work} | {name} | {each:.0f} | {cost:.3f} | {rate:.3f} |")


def _ratio(these: list[float], those: list[float]) -> float:
    """Round by round: what is measured in one minute is not to be held against another's."""
    return median(one / other for one, other in zip(these, those, strict=True))


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    times: Annotated[int, typer.Option(min=100, help="Calls of each kind in a round.")] = 4000,
) -> None:
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    trace.set_tracer_provider(provider)
    with server() as redis, OtlpCollector() as collector:

        def worker(name: str, **settings: Any) -> Worker:
            return Worker(redis.url, namespace=name, **settings)

        traced = {
            "traces": True,
            "environment": {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url},
        }
        workers = {
            "nothing": worker("nothing"),
            "nothing-again": worker("nothing-again"),
            "metrics": worker("metrics", http_port=0),
            **{name: worker(name, **traced) for name in _SAMPLED},
        }
        with running(list(workers.values())):
            asyncio.run(_measure(redis.url, workers, rounds, times))


if __name__ == "__main__":
    typer.run(main)
