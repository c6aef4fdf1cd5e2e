"""Backends from outside that do what messages and queries tell them.

Registered by their own entry points, as anybody's backend would be. ``sleep 2`` in a text makes the
operation last two seconds, ``fail 3 times`` makes it unavailable so often before it works (and
``wait 2`` asks for that many seconds), ``refuse``, ``unavailable`` and ``explode`` make it fail in
the three ways a backend can, and ``exit`` ends the worker process at once.

`ObedientStore` keeps memories in the process. `SlowRedisStore` keeps them in Redis, where it also
counts the calls in which it stored something (``<namespace>:calls``), and does not ``refuse`` any
more once ``<namespace>:allowed`` is there.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable
from recallq.messages import message_text
from recallq_worker.backends.base import Added, Hit, Record
from recallq_worker.backends.in_memory import InMemoryStore
from recallq_worker.backends.redis import RedisStore

_failed: Counter[str] = Counter()


class ObedientStore(InMemoryStore):
    name: ClassVar[str] = "obedient"
    single_process: ClassVar[bool] = False

    async def add(self, records: Sequence[Record]) -> list[Added]:
        for record in records:
            await _obey(message_text(record.message))
        return await super().add(records)

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        await _obey(query)
        if "garbage" in query:
            record = Record("r", Scope("", "", "s"), 1, 0, {"role": "user", "content": "\ud800"})
            return [Hit(record, 1.0)]
        return await super().search(scope, query, top_k=top_k, score_threshold=score_threshold)


class SlowRedisStore(RedisStore):
    name: ClassVar[str] = "slow_redis"

    async def add(self, records: Sequence[Record]) -> list[Added]:
        await self._redis.incr(f"{self._keys.namespace}:calls")
        allowed = await self._redis.exists(f"{self._keys.namespace}:allowed")
        for record in records:
            text = message_text(record.message)
            await _obey(text.replace("refuse", "") if allowed else text)
        return await super().add(records)

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        await _obey(query)
        return await super().search(scope, query, top_k=top_k, score_threshold=score_threshold)


async def _obey(text: str) -> None:
    if slept := re.search(r"\bsleep ([0-9.]+)", text):
        await asyncio.sleep(float(slept[1]))
    if (times := re.search(r"\bfail ([0-9]+) times", text)) and _failed[text] < int(times[1]):
        _failed[text] += 1
        wait = re.search(r"\bwait ([0-9.]+)", text)
        raise BackendUnavailable("not yet", retry_after=float(wait[1]) if wait else None)
    if "refuse" in text:
        raise BackendError("refused, as told")
    if "unavailable" in text:
        raise BackendUnavailable("not now", retry_after=1.5)
    if "garble for a while" in text:
        raise BackendUnavailable("bytes: \ud800")
    if "garble" in text:
        raise BackendError("bytes: \ud800")
    if "explode" in text:
        raise RuntimeError(f"secret of a user: {text}")
    if "exit" in text:
        os._exit(3)
