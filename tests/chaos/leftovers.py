"""What may be left in Redis when every job has settled, and what may not."""

from __future__ import annotations

from typing import cast

from recallq.keys import Keys
from recallq.redis_client import RedisClient


async def leftovers(redis: RedisClient, namespace: str) -> list[str]:
    """Keys that nobody needs any more and that would stay for ever.

    Memories, deletion epochs, dead letters, how many jobs there were and what kind of backend it is
    are kept on purpose, and kombu keeps its bindings. Whatever else there is - results, signs of
    life, what clients note down - must expire; batches, messages and all that counts those that are
    open must be gone.
    """
    keys = Keys(namespace)
    kept = (
        f"{namespace}:m:{{",
        f"{namespace}:reme_personal:",
        f"{namespace}:epoch:{{",
        keys.clock,
        keys.totals,
        keys.extracts,
        keys.slow_tokens,
        keys.dead,
        keys.workers,
        "_kombu.binding",
    )
    found: list[str] = []
    cursor = 0
    while True:
        cursor, some = await redis.scan(cursor, count=1000)
        names = [
            name
            for name in (key.decode(errors="replace") for key in cast("list[bytes]", some))
            if not name.startswith(kept)
        ]
        async with redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.pttl(name)
            lives = await pipe.execute()
        found += [
            name
            for name, life in zip(names, lives, strict=True)
            if life == -1 or (life > 0 and name.startswith(keys.batch("")))
        ]
        if cursor == 0:
            return sorted(set(found))
