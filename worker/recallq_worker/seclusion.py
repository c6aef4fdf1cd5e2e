"""Keeps apart, within a worker process, what workers may have died of.

A job that is worked on alone is blamed for the death of the process. So what runs beside it must
not be able to take the process with it: neither another suspect, nor a call of the slow lane.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Seclusion:
    """Lets many through together, or one alone; in the order in which they came."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.asynccontextmanager
    async def among_others(self) -> AsyncIterator[None]:
        """For what nobody suspects. Waits while somebody is alone, or waits to be."""
        async with self._door:
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """For a suspect. Waits until nobody else is inside, and lets nobody in."""
        async with self._door:
            await self._empty.wait()
            yield

    @contextlib.asynccontextmanager
    async def ahead(self) -> AsyncIterator[None]:
        """For a suspect that cannot wait until what takes long is over. No other suspect is inside,
        and nobody is let in."""
        async with self._door:
            yield

    @property
    def claimed(self) -> bool:
        """Whether somebody is alone, or waits to be."""
        return self._door.locked()
