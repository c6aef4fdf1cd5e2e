"""What one call costs as its user's memory grows."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from statistics import median

from recallq import MemoryClient
from tests.benchmarks.speed.works import query, text

SIZES = (100, 1_000, 10_000, 100_000)
"""Messages that the users have."""
_CALLS = 150
_TOGETHER = 500
_WARM = 20
"""Searches that are not counted: once an index is tended, all of it is known."""


class _User:
    """One whose memory has a size, and the calls that are about it."""

    def __init__(self, client: MemoryClient, size: int) -> None:
        self._client = client
        self._name = f"has-{size}"
        self._stored = 0
        self.calls: dict[str, Callable[[], Awaitable[None]]] = {
            "add": self._add,
            "list": self._page,
            "search": self._search,
        }

    async def fill(self, size: int) -> None:
        while self._stored < size:
            count = min(_TOGETHER, size - self._stored)
            said = [text(self._stored + n + 1) for n in range(count)]
            await self._client.add_memory(self._name, said, "s", timeout=120)
            self._stored += count
        for _ in range(_WARM):
            await self._search()

    async def _add(self) -> None:
        self._stored += 1
        await self._client.add_memory(self._name, text(self._stored), "s")

    async def _page(self) -> None:
        filters = {"page_num": self._stored // 20, "page_size": 10}
        await self._client.list_memory(self._name, filters)

    async def _search(self) -> None:
        assert await self._client.search_memory(self._name, query(self._stored // 2))


async def growth(
    url: str, namespace: str, advance: Callable[[str], None]
) -> dict[str, dict[int, float]]:
    """Median seconds of an add, of a page and of a search, by size: single calls, one at a time,
    about each user in turn, so that a machine that is slow for a while is so for all."""
    async with MemoryClient(url, namespace=namespace, high_water_mark=10**7) as client:
        users = {size: _User(client, size) for size in SIZES}
        for size, user in users.items():
            advance(f"a user with {size:,} messages")
            await user.fill(size)
        took: dict[str, dict[int, list[float]]] = {}
        for name in ("search", "list", "add"):
            took[name] = {size: [] for size in SIZES}
            for _ in range(_CALLS):
                for size, user in users.items():
                    began = time.perf_counter()
                    await user.calls[name]()
                    took[name][size].append(time.perf_counter() - began)
    return {
        name: {size: median(times) for size, times in by_size.items()}
        for name, by_size in took.items()
    }
