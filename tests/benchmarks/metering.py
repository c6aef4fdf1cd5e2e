"""``python -m tests.benchmarks.metering``: what being watched costs a worker.

Two workers on one Redis, one of them with its port open and asked for its metrics every second, do
the same in turns. Read the ratios.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from statistics import median
from typing import Annotated

import typer

from recallq import MemoryClient
from tests.benchmarks.speed.stack import processor_time, running, server
from tests.benchmarks.speed.works import query, text
from tests.support import Worker

_IN_FLIGHT = 200
_USERS = 50
_SCRAPE_EVERY = 1.0


async def _scraped(address: str) -> None:
    host, _, port = address.rpartition(":")
    while True:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b"recallq_jobs_total" in await reader.read()
        writer.close()
        await asyncio.sleep(_SCRAPE_EVERY)


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
            name: await stack.enter_async_context(MemoryClient(url, namespace=name))
            for name in workers
        }
        for number in range(rounds + 1):  # the first is not counted
            for name in sorted(workers, reverse=bool(number % 2)):
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
    print("| work | unmeasured, us of the worker | measured | ratio | throughput, ratio |")
    print("|---|---|---|---|---|")
    for work in ("adds", "searches"):
        bare, full = (median(spent[work, name]) / times * 1e6 for name in ("bare", "measured"))
        cost = _ratio(spent[work, "measured"], spent[work, "bare"])
        rate = _ratio(seconds[work, "bare"], seconds[work, "measured"])
        print(f"| {work} | {bare:.0f} | {full:.0f} | {cost:.3f} | {rate:.3f} |")


def _ratio(these: list[float], those: list[float]) -> float:
    """Round by round: what is measured in one minute is not to be held against another's."""
    return median(one / other for one, other in zip(these, those, strict=True))


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 25,
    times: Annotated[int, typer.Option(min=100, help="Calls of each kind in a round.")] = 2000,
) -> None:
    with server() as redis:
        workers = {
            "bare": Worker(redis.url, namespace="bare"),
            "measured": Worker(redis.url, namespace="measured", http_port=0),
        }
        with running(list(workers.values())):
            asyncio.run(_measure(redis.url, workers, rounds, times))


if __name__ == "__main__":
    typer.run(main)
