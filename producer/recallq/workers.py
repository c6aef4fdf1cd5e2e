"""Who works: the workers' signs of life in Redis, as they are written and read.

Each worker process describes itself under a key that expires soon after its last sign of life, so
that a killed worker disappears by itself.
"""

from __future__ import annotations

from typing import cast

from pydantic import BaseModel, ValidationError

from recallq.contract import Lane
from recallq.keys import Keys
from recallq.redis_client import RedisClient

SIGN_OF_LIFE_EVERY = 3.0
"""Seconds between two signs of life."""
PRESUMED_DEAD_AFTER = 10.0
"""Seconds without one after which a worker no longer counts."""


class WorkerInfo(BaseModel):
    """One worker process, as it describes itself."""

    id: str
    host: str
    pid: int
    version: str
    backend: str
    lanes: list[Lane]
    concurrency: int
    started_at: float
    protocol: int = 1
    """The newest that it reads; see `recallq.contract.PROTOCOL_VERSION`."""
    http: str | None = None
    """Where it answers /healthz, /readyz and /metrics, if it does."""


class WorkerRegistry:
    """The signs of life of one namespace."""

    def __init__(self, redis: RedisClient, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def sign(self, worker: WorkerInfo) -> None:
        """Says that `worker` is alive."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(
                self._keys.worker(worker.id),
                worker.model_dump_json(),
                px=int(PRESUMED_DEAD_AFTER * 1000),
            )
            pipe.sadd(self._keys.workers, worker.id)
            await pipe.execute()

    async def sign_off(self, worker_id: str) -> None:
        """Says that a worker has stopped."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._keys.worker(worker_id))
            pipe.srem(self._keys.workers, worker_id)
            await pipe.execute()

    async def alive(self) -> list[WorkerInfo]:
        """The workers that have signed of late, oldest first. Forgets those that have not."""
        ids = sorted(cast("set[bytes]", await self._redis.smembers(self._keys.workers)))
        if not ids:
            return []
        found = await self._redis.mget([self._keys.worker(each.decode()) for each in ids])
        gone = [each for each, info in zip(ids, found, strict=True) if info is None]
        if gone:
            # One that comes back to life signs itself in again.
            await self._redis.srem(self._keys.workers, *gone)
        workers = []
        for info in found:
            if info is not None:
                try:
                    workers.append(WorkerInfo.model_validate_json(info))
                except ValidationError:
                    continue  # written by another version: alive, but not for us to describe
        return sorted(workers, key=lambda worker: worker.started_at)
