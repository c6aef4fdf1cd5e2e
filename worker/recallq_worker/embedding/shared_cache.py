"""Vectors in Redis, for all workers; see `cache` for what that means for privacy.

It is there to save money and time, so it may cost neither: one round trip for all texts of a call,
a short wait, and while Redis does not answer it is left alone for a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from recallq.redis_client import LOST, RedisClient, connect
from recallq_worker.embedding.base import Vector

log = logging.getLogger(__name__)

_PATIENCE = 0.25
"""Longest wait for Redis, in seconds."""
_LEFT_ALONE = 15.0
"""Seconds for which a Redis that failed is not asked again."""


class SharedCache:
    """Vectors of one number of dimensions, as float32, each with a time to live."""

    def __init__(self, url: str, *, namespace: str, dimensions: int, ttl: int) -> None:
        """Connects on first use. `ttl` is in seconds."""
        self._url = url
        self._prefix = f"{namespace}:embedding:"
        self._bytes = dimensions * 4
        self._ttl = ttl
        self._redis: RedisClient | None = None
        self._asleep_until = 0.0
        self._asking = 0
        self._nobody_asks = asyncio.Event()
        self._nobody_asks.set()
        self._closed = False

    async def get(self, keys: Sequence[bytes]) -> Sequence[Vector | None]:
        """What is kept for `keys`, in their order; empty if Redis does not answer. Never raises."""
        values: list[Any] = []
        async with self._client() as redis:
            if redis is not None and keys:
                values = await redis.mget([self._prefix + key.hex() for key in keys])
        return [self._vector(value) for value in values]

    async def put(self, vectors: Mapping[bytes, Vector]) -> None:
        """Keeps `vectors` for their time to live. Never raises."""
        async with self._client() as redis:
            if redis is not None:
                async with redis.pipeline(transaction=False) as pipe:
                    for key, vector in vectors.items():
                        pipe.set(self._prefix + key.hex(), vector.tobytes(), ex=self._ttl)
                    await pipe.execute()

    async def close(self) -> None:
        """Waits for what is under way, which is not long."""
        self._closed = True
        await self._nobody_asks.wait()
        redis, self._redis = self._redis, None
        if redis is not None:
            await redis.aclose()

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[RedisClient | None]:
        """The connection, for as long as it takes to ask; None while it is left alone. What goes
        wrong with it ends here."""
        if self._closed or asyncio.get_running_loop().time() < self._asleep_until:
            yield None
            return
        if self._redis is None:
            self._redis = connect(self._url, connect_timeout=_PATIENCE, retries=0)
        self._asking += 1
        self._nobody_asks.clear()
        try:
            async with asyncio.timeout(_PATIENCE):
                yield self._redis
        except (*LOST, TimeoutError) as error:
            self._sleep(error)
        finally:
            self._asking -= 1
            if self._asking == 0:
                self._nobody_asks.set()

    def _sleep(self, error: BaseException) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._asleep_until:
            log.warning(
                "the Redis that keeps embeddings does not answer (%s); not asking it for %g s",
                type(error).__name__,
                _LEFT_ALONE,
            )
        self._asleep_until = now + _LEFT_ALONE

    def _vector(self, value: Any) -> Vector | None:
        if not isinstance(value, bytes) or len(value) != self._bytes:
            return None
        vector: Vector = np.frombuffer(value, dtype="<f4").astype(np.float32, copy=False)
        if not np.isfinite(vector).all():
            return None
        vector.flags.writeable = False
        return vector
