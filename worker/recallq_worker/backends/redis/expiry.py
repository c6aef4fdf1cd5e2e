"""Which memories have expired, where they do.

By the clock that their order keys were given by: a machine whose own is ahead would remove, for
good, what has yet to live.
"""

from __future__ import annotations

import asyncio

from recallq.clock import FleetClock, keep_time
from recallq.redis_client import RedisClient, connect


class Expiry:
    """What lives for `ttl` seconds, or for ever."""

    def __init__(self, ttl: int | None, clock_url: str, connect_timeout: float) -> None:
        """`clock_url` is of the Redis whose time order keys have."""
        self.ttl = ttl
        self._clock = FleetClock()
        self._clock_url = clock_url
        self._connect_timeout = connect_timeout
        self._redis: RedisClient | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises redis-py's errors."""
        if self.ttl is None:
            return
        self._redis = connect(
            self._clock_url, max_connections=1, connect_timeout=self._connect_timeout
        )
        await self._clock.calibrate(self._redis)
        self._keeping = asyncio.create_task(keep_time(self._clock, self._redis))

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._redis is not None:
            await self._redis.aclose(close_connection_pool=True)

    @property
    def cutoff(self) -> int | None:
        """The lowest order key that has not expired; None if none does."""
        return None if self.ttl is None else int((self._clock.now() - self.ttl) * 1_000_000)
