"""Dead letters: what failed for good, kept until somebody looks at it.

One hash per letter and a sorted set of their ids by time of death.
"""

from __future__ import annotations

import uuid

from recallq.keys import Keys
from recallq.redis_client import RedisClient


class DeadLetters:
    """The dead letters of one namespace."""

    def __init__(self, redis: RedisClient, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def add(self, *, kind: str, payload: str, error: str, at: float) -> str:
        """Keeps `payload` with the reason for its death; returns the letter's id."""
        letter_id = uuid.uuid4().hex
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(
                self._keys.dead_letter(letter_id),
                mapping={"kind": kind, "payload": payload, "error": error, "at": repr(at)},
            )
            pipe.zadd(self._keys.dead, {letter_id: at})
            await pipe.execute()
        return letter_id

    async def count(self) -> int:
        return int(await self._redis.zcard(self._keys.dead))
