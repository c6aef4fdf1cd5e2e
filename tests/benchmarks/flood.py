"""``python -m tests.benchmarks.flood``: does live work stay live during a bulk ingest?

The latency of searches, asked for at a steady rate, on an idle service and then while another
process ingests 100,000 messages: with one worker for both lanes, and with one each. Everything in
one run on one Redis; the figure to look at is the ratio of the two p95s.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from statistics import median, quantiles

from recallq import MemoryClient
from recallq.embedded import EmbeddedRedis
from tests.support import Worker, clean_environment

_MESSAGE = "On our way back from the market we talked about peanuts, order A-{n}, and the weather. "
_USERS = 500


async def _flood(url: str, namespace: str, jobs: int) -> None:
    """What the flooding process does."""
    async with MemoryClient(
        url, namespace=namespace, high_water_mark=10**9, max_in_flight=2000
    ) as client:
        for start in range(0, jobs, 2000):
            await asyncio.gather(
                *(
                    client.submit_add(f"bulk-{n % _USERS}", _MESSAGE.format(n=n) * 3, lane="bulk")
                    for n in range(start, min(start + 2000, jobs))
                )
            )


async def _searches(client: MemoryClient, rate: float, until: asyncio.Event) -> list[float]:
    """Latencies in ms of searches that are begun at a steady rate, whether or not answers come."""
    latencies: list[float] = []

    async def ask() -> None:
        began = time.perf_counter()
        await client.search_memory("searcher", "peanuts order", timeout=60)
        latencies.append((time.perf_counter() - began) * 1000)

    asked: list[asyncio.Task[None]] = []
    while not until.is_set():
        asked.append(asyncio.create_task(ask()))
        await asyncio.sleep(1 / rate)
    await asyncio.gather(*asked)
    return latencies


def _shown(latencies: list[float]) -> str:
    p95 = quantiles(latencies, n=20)[-1]
    return f"p50 {median(latencies):6.1f} ms   p95 {p95:6.1f} ms   ({len(latencies)} searches)"


async def _measure(url: str, namespace: str, options: argparse.Namespace) -> None:
    async with MemoryClient(url, namespace=namespace) as client:
        await client.add_memory("searcher", [_MESSAGE.format(n=n) for n in range(100)])
        over = asyncio.Event()
        asyncio.get_running_loop().call_later(options.seconds, over.set)
        idle = await _searches(client, options.rate, over)
        print(f"  idle            {_shown(idle)}")
        flood = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.flood", "--flood", url, namespace,
             "--jobs", str(options.jobs)],
            env=clean_environment(PYTHONPATH=os.pathsep.join(sys.path)),
        )  # fmt: skip
        over = asyncio.Event()
        searching = asyncio.create_task(_searches(client, options.rate, over))
        began = time.perf_counter()
        while flood.poll() is None or (await client.transport.fleet()).outstanding:
            await asyncio.sleep(0.25)
        took = time.perf_counter() - began
        over.set()
        busy = await searching
        print(f"  during ingest   {_shown(busy)}")
        print(
            f"  ingest          {options.jobs:,} jobs in {took:.1f} s, {options.jobs / took:,.0f}/s"
        )
        ratio = quantiles(busy, n=20)[-1] / quantiles(idle, n=20)[-1]
        print(f"  p95 ratio       {ratio:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.flood", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=50, help="searches per second")
    parser.add_argument("--seconds", type=float, default=10, help="length of the idle measurement")
    parser.add_argument("--flood", nargs=2, metavar=("URL", "NAMESPACE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flood:
        url, namespace = options.flood
        asyncio.run(_flood(url, namespace, options.jobs))
        return
    with EmbeddedRedis() as server:
        print("one worker for both lanes")
        with Worker(server.url, namespace="both", lanes="live,bulk"):
            asyncio.run(_measure(server.url, "both", options))
        print("one worker each")
        with (
            Worker(server.url, namespace="each", lanes="live"),
            Worker(server.url, namespace="each", lanes="bulk"),
        ):
            asyncio.run(_measure(server.url, "each", options))


if __name__ == "__main__":
    main()
