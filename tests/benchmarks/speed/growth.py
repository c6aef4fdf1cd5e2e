"""What one call costs as its user's memory grows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from statistics import median

from recallq import MemoryClient
from tests.benchmarks.speed.works import query, text

SIZES = (100, 1_000, 10_000, 100_000)
"""Messages that the user has."""
_CALLS = 150
_TOGETHER = 500
_USER = "grows"


async def growth(
    url: str, namespace: str, advance: Callable[[str], None]
) -> dict[str, dict[int, float]]:
    """Median seconds of an add, of a page and of a search, by size: single calls, one at a time."""
    found: dict[str, dict[int, float]] = {"add": {}, "list": {}, "search": {}}
    async with MemoryClient(url, namespace=namespace, high_water_mark=10**7) as client:
        stored = 0

        async def add() -> None:
            nonlocal stored
            stored += 1
            await client.add_memory(_USER, text(stored), "s")

        async def page() -> None:
            await client.list_memory(_USER, {"page_num": stored // 20, "page_size": 10})

        async def search() -> None:
            assert await client.search_memory(_USER, query(stored // 2))

        for size in SIZES:
            advance(f"a user with {size:,} messages")
            while stored < size:
                count = min(_TOGETHER, size - stored)
                said = [text(stored + n + 1) for n in range(count)]
                await client.add_memory(_USER, said, "s", timeout=120)
                stored += count
            await _measured(search, 20)  # once an index is tended, all of it is known
            for name, call in (("search", search), ("list", page), ("add", add)):
                found[name][size] = await _measured(call, _CALLS)
    return found


async def _measured(call: Callable[[], Awaitable[None]], times: int) -> float:
    took = []
    for _ in range(times):
        began = time.perf_counter()
        await call()
        took.append(time.perf_counter() - began)
        await asyncio.sleep(0)
    return median(took)
