"""What search costs: as one user's memory grows, beside the same backend without an index.

    python -m tests.benchmarks.search [--sizes 100,1000,10000,100000] [--repeat 3] [--json FILE]

- Searches, list pages and adds of a user who has so many messages already, by the redis backend in
  this process: medians in milliseconds, of sizes in turn, `repeat` times.
- The index in Redis, beside the records (`MEMORY USAGE` of every key).
- Adds with and without the index, in turn: by the backend, in batches of 64, one user and 64; and
  through the whole service, one worker process, 200 calls in flight.

Texts are made: words of a vocabulary of 20,000 by Zipf's law, a third of them stop words, 300 bytes
a message, and an order number in every tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from recallq import MemoryClient
from recallq.contract import Scope
from recallq.embedded import EmbeddedRedis
from recallq_worker.backends.base import Record
from recallq_worker.backends.redis import RedisStore
from recallq_worker.search.english import STOP_WORDS
from tests.support import Worker

PLUGINS = Path(__file__).parent / "plugins"
_TENANT = "default"
_SESSION = 200
"""Messages of a session."""
_BATCH = 64
_SEARCHES = 60
_TOP_K = 10
_WRITTEN = 1_790_000_000_000_000


class Texts:
    """Messages of 300 bytes, and questions about them."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)
        letters = random.Random(0)
        syllables = [a + b for a in "bcdfghklmnprstvz" for b in "aeiou"]
        self._words = [
            "".join(letters.choices(syllables, k=letters.randint(2, 4))) for _ in range(20_000)
        ]
        self._weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(20_000)))
        self._stop_words = sorted(STOP_WORDS)

    def message(self, number: int) -> dict[str, Any]:
        words = self._random.choices(self._words, cum_weights=self._weights, k=32)
        words += self._random.choices(self._stop_words, k=16)
        self._random.shuffle(words)
        text = " ".join(words)[:290] + (f" order A-{number}" if number % 10 == 0 else "")
        return {"role": "user", "name": "Ann", "content": text}

    def question(self) -> str:
        words = self._random.choices(self._words, cum_weights=self._weights, k=4)
        return "what did you say about " + " ".join(words)

    def part(self) -> str:
        """A part of a word, long enough to be rare."""
        return self._random.choice(self._words[:2000])[1:6]


def records(texts: Texts, user: str, first: int, count: int) -> list[Record]:
    return [
        Record(
            f"{user}{number:032x}-00000",
            Scope(_TENANT, user, f"session-{number // _SESSION}"),
            _WRITTEN + number * 1000,
            0,
            texts.message(number),
        )
        for number in range(first, first + count)
    ]


async def fill(store: RedisStore, texts: Texts, user: str, size: int) -> None:
    for first in range(0, size, 500):
        await store.add(records(texts, user, first, min(500, size - first)))
    await store.settled()


async def timed(calls: Sequence[Callable[[], Awaitable[Any]]]) -> list[float]:
    """Milliseconds that each took."""
    took = []
    for call in calls:
        began = time.perf_counter()
        await call()
        took.append((time.perf_counter() - began) * 1000)
    return took


async def as_memory_grows(
    store: RedisStore, texts: Texts, sizes: Sequence[int], repeat: int
) -> dict[str, dict[int, float]]:
    users = {size: f"user-{size}" for size in sizes}
    for size, user in users.items():
        note(f"storing {size:,} messages of one user")
        await fill(store, texts, user, size)
    taken: dict[str, dict[int, list[float]]] = {}

    def keep(name: str, size: int, took: list[float]) -> None:
        taken.setdefault(name, {}).setdefault(size, []).extend(took)

    added = max(sizes)
    for round_ in range(repeat):
        note(f"round {round_ + 1} of {repeat}")
        for size, user in users.items():
            scope = Scope(_TENANT, user)
            session = Scope(_TENANT, user, "session-0")

            def search(scope: Scope, query: str) -> Callable[[], Awaitable[Any]]:
                return lambda: store.search(scope, query, top_k=_TOP_K, score_threshold=None)

            questions = [texts.question() for _ in range(_SEARCHES)]
            keep("search", size, await timed([search(scope, each) for each in questions]))
            keep("search, p95", size, [quantiles(taken["search"][size], n=20)[-1]])
            keep("search a session", size, await timed([search(session, e) for e in questions]))
            parts = [texts.part() for _ in range(_SEARCHES // 3)]
            keep("search a part of a word", size, await timed([search(scope, e) for e in parts]))
            pages = [
                lambda at=at, scope=scope: store.list(scope, offset=at, limit=10)
                for at in range(0, size, max(1, size // 20))
            ]
            keep("list a page", size, await timed(pages))
            adds = []
            for _ in range(20):
                batch = records(texts, user, added, 1)
                adds.append(lambda batch=batch: store.add(batch))
                added += 1
            keep("add a message", size, await timed(adds))
            await store.settled()
    return {
        name: {size: median(took) for size, took in by_size.items()}
        for name, by_size in taken.items()
    }


async def memory(store: RedisStore, size: int) -> tuple[float, float, float]:
    """Bytes a message takes: as JSON, with all of its keys, and in the index."""
    redis = store._redis
    base = store._base(_TENANT, f"user-{size}")
    kept = index = 0.0
    async for key in redis.scan_iter(match=f"{store._keys.namespace}:m:*", count=1000):
        name = key.decode()
        if name.startswith(f"{base}:"):
            used = await redis.memory_usage(key, samples=0) or 0
            if name.removeprefix(f"{base}:")[:1] in "iegn":
                index += used
            else:
                kept += used
    values = await redis.hvals(f"{base}:r")
    count = len(values)
    return sum(map(len, values)) / count, kept / count, index / count


async def adds_by_the_backend(
    stores: dict[str, RedisStore], texts: Texts, users: int, repeat: int, count: int = 6400
) -> dict[str, float]:
    """Microseconds of an add, everything that follows from it included."""
    taken: dict[str, list[float]] = {name: [] for name in stores}
    for round_ in range(repeat):
        for name, store in stores.items():
            batches = []
            for first in range(0, count, _BATCH):
                batch = records(texts, "adder", first, _BATCH)
                for number, each in enumerate(batch):
                    user = f"{name}-{users}-{round_}-{number % users}"
                    scope = Scope(_TENANT, user, each.scope.session_id)
                    batch[number] = Record(each.record_id, scope, each.order, 0, each.message)
                batches.append(batch)
            began = time.perf_counter()
            for batch in batches:
                await store.add(batch)
            await store.settled()
            taken[name].append((time.perf_counter() - began) / count * 1e6)
    return {name: median(took) for name, took in taken.items()}


async def adds_through_the_service(
    url: str, texts: Texts, repeat: int, count: int = 8000, in_flight: int = 200
) -> dict[str, float]:
    """Microseconds for each of many adds in flight, by one worker process."""
    path = os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONPATH"] = path
    workers = {
        name: Worker(url, namespace=f"service-{name}", backend=backend)
        for name, backend in (("indexed", "redis"), ("plain", "plain_redis"))
    }
    taken: dict[str, list[float]] = {name: [] for name in workers}
    messages = [texts.message(number) for number in range(count)]
    for worker in workers.values():
        await asyncio.to_thread(worker.start)
    try:
        for _ in range(repeat):
            for name in workers:
                async with MemoryClient(url, namespace=f"service-{name}") as client:
                    numbers = iter(range(count))

                    async def caller(client: MemoryClient, numbers: Any) -> None:
                        for number in numbers:
                            await client.add_memory(f"user-{number % 500}", messages[number])

                    await caller(client, iter(range(100)))
                    began = time.perf_counter()
                    await asyncio.gather(*(caller(client, numbers) for _ in range(in_flight)))
                    taken[name].append((time.perf_counter() - began) / count * 1e6)
    finally:
        for worker in workers.values():
            await asyncio.to_thread(worker.close)
    return {name: median(took) for name, took in taken.items()}


def note(doing: str) -> None:
    print(doing, file=sys.stderr, flush=True)


def row(name: str, figures: Sequence[float], ratio: str) -> str:
    return f"| {name} | " + " | ".join(f"{each:,.2f}" for each in figures) + f" | {ratio} |"


async def measure(sizes: Sequence[int], repeat: int) -> dict[str, Any]:
    sys.path.append(str(PLUGINS))
    PlainRedisStore = import_module("plain_redis").PlainRedisStore  # noqa: N806  # a class

    texts = Texts()
    results: dict[str, Any] = {}
    with EmbeddedRedis() as redis:
        store = RedisStore(redis.url, namespace="grows")
        await store.start()
        grown = results["as memory grows"] = await as_memory_grows(store, texts, sizes, repeat)
        print(f"\n| ms | {' | '.join(f'{size:,}' for size in sizes)} | last / first |")
        print("|---" * (len(sizes) + 2) + "|")
        for name, by_size in grown.items():
            figures = [by_size[size] for size in sizes]
            print(row(name, figures, f"{figures[-1] / figures[0]:.2f}"))

        print("\n| messages of a user | JSON, bytes | with all keys | index | index / JSON |")
        print("|---|---|---|---|---|")
        results["memory"] = {}
        for size in sizes:
            as_json, kept, index = results["memory"][size] = await memory(store, size)
            print(
                f"| {size:,} | {as_json:.0f} | {kept:.0f} | {index:.0f} | {index / as_json:.2f} |"
            )
        await store.stop()

        print("\n| an add, microseconds | plain | indexed | ratio |")
        print("|---|---|---|---|")
        stores = {
            "plain": PlainRedisStore(redis.url, namespace="adds-plain"),
            "indexed": RedisStore(redis.url, namespace="adds-indexed"),
        }
        for each in stores.values():
            await each.start()
        for users in (1, 64):
            note(f"adds of {users} users by the backend")
            adds = await adds_by_the_backend(stores, texts, users, repeat)
            results[f"adds of {users}"] = adds
            print_adds(f"by the backend, batches of {_BATCH}, {users} users", adds)
        for each in stores.values():
            await each.stop()
        note("adds through the service")
        adds = results["adds through the service"] = await adds_through_the_service(
            redis.url, texts, repeat
        )
        print_adds("through the service, 200 in flight", adds)
    return results


def print_adds(name: str, adds: dict[str, float]) -> None:
    print(row(name, [adds["plain"], adds["indexed"]], f"{adds['indexed'] / adds['plain']:.2f}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="100,1000,10000,100000")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures as well")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    results = asyncio.run(measure(sizes, arguments.repeat))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
