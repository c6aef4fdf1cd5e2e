"""The lease of a backend whose data lives in one process.

Kept in Redis and renewed while the process lives. Whoever starts a second worker is told who holds
it; the lease of a process that died is taken over, at once on the same machine and after it has
run out otherwise.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import cast

import orjson

from recallq.errors import ConfigurationError
from recallq.redis_client import RedisClient

LEASE_SECONDS = 10.0
RENEW_EVERY = 3.0

# KEYS: lease. ARGV: owner, lifetime (ms). Renews the owner's own lease.
_RENEW = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 0
"""

# KEYS: lease. ARGV: owner.
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end"


class OwnerLease:
    """The right to be the only process with this backend."""

    def __init__(self, redis: RedisClient, key: str, backend: str, worker_id: str) -> None:
        self._redis = redis
        self._key = key
        self._backend = backend
        self._owner = orjson.dumps(
            {"worker": worker_id, "host": socket.gethostname(), "pid": os.getpid()}
        )
        self._renew = redis.register_script(_RENEW)
        self._release = redis.register_script(_RELEASE)

    async def acquire(self, *, patience: float = LEASE_SECONDS + 1) -> None:
        """Raises `ConfigurationError` if another process holds the lease and keeps it for
        `patience` seconds."""
        give_up = time.monotonic() + patience
        while True:
            taken = await self._redis.set(
                self._key, self._owner, nx=True, px=int(LEASE_SECONDS * 1000)
            )
            if taken:
                return
            holder = cast("bytes | None", await self._redis.get(self._key))
            if holder is None:
                continue
            if _is_gone(holder):
                await self._release(keys=[self._key], args=[holder])
                continue
            if not _may_be_gone(holder) or time.monotonic() >= give_up:
                raise ConfigurationError(self._refusal(holder))
            await asyncio.sleep(0.5)  # its machine may have died: then the lease runs out

    async def renew(self) -> bool:
        """Keeps the lease; False if it was lost."""
        kept = await self._renew(keys=[self._key], args=[self._owner, int(LEASE_SECONDS * 1000)])
        return bool(kept)

    async def release(self) -> None:
        await self._release(keys=[self._key], args=[self._owner])

    def _refusal(self, holder: bytes) -> str:
        other = orjson.loads(holder)
        return (
            f"the {self._backend} backend keeps its data in one worker process, and process "
            f"{other['pid']} on {other['host']} has it already; stop that worker, or use "
            "RECALLQ_BACKEND=redis to run several"
        )


def _may_be_gone(holder: bytes) -> bool:
    """Whether only time can tell if the holder lives: it is on another machine."""
    return bool(orjson.loads(holder)["host"] != socket.gethostname())


def _is_gone(holder: bytes) -> bool:
    """Whether the holder was a process of this machine that runs no more."""
    owner = orjson.loads(holder)
    if owner["host"] != socket.gethostname():
        return False
    if owner["pid"] == os.getpid():
        return True  # a container that was started again: same name, same pid, another process
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
