"""The redis backend in bad weather, for the chaos tests.

A file named by ``RECALLQ_TEST_WEATHER`` holds the weather as JSON, and may change at any moment.
By a coin seeded from ``RECALLQ_TEST_WEATHER_SEED``, a call fails before it reaches Redis, fails
after Redis has done it (a lost reply), takes its time, or takes for ever.

A message can also be poison whatever the weather: ``poison-permanent`` in its text has it refused
for good, ``poison-transient`` for now, every time, and ``poison-kill`` ends the process. None of a
call with poison in it is stored.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable
from recallq.messages import message_text
from recallq_worker.backends.base import Added, Hit, Record
from recallq_worker.backends.redis import RedisStore

T = TypeVar("T")

_LOOK_EVERY = 0.1


class Weather:
    """What the file says, at most a tenth of a second late."""

    def __init__(self, path: Path | None, seed: str) -> None:
        self._path = path
        self._looked_at = 0.0
        self._rates: dict[str, float] = {}
        self._random = random.Random(seed)

    def happens(self, what: str) -> bool:
        return self._random.random() < self._now().get(what, 0.0)

    def coin(self) -> bool:
        return self._random.random() < 0.5

    def nap(self) -> float:
        """Seconds: mostly short."""
        return self._random.uniform(0.01, 0.1) * self._random.choice((1, 2, 4, 8))

    def _now(self) -> dict[str, float]:
        if self._path is not None and time.monotonic() > self._looked_at + _LOOK_EVERY:
            self._looked_at = time.monotonic()
            self._rates = json.loads(self._path.read_text())
        return self._rates


class FlakyRedisStore(RedisStore):
    name: ClassVar[str] = "flaky_redis"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        path = os.environ.get("RECALLQ_TEST_WEATHER")
        seed = os.environ.get("RECALLQ_TEST_WEATHER_SEED", "0")
        self._weather = Weather(Path(path) if path else None, seed)

    async def add(self, records: Sequence[Record]) -> list[Added]:
        for record in records:
            taste(message_text(record.message))
        return await self._through(lambda: super(FlakyRedisStore, self).add(records))

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        return await self._through(
            lambda: super(FlakyRedisStore, self).search(
                scope, query, top_k=top_k, score_threshold=score_threshold
            )
        )

    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]:
        return await self._through(
            lambda: super(FlakyRedisStore, self).list(scope, offset=offset, limit=limit)
        )

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        return await self._through(
            lambda: super(FlakyRedisStore, self).delete(scope, before_epoch=before_epoch)
        )

    async def _through(self, call: Callable[[], Awaitable[T]]) -> T:
        weather = self._weather
        if weather.happens("unavailable"):
            after = 0.2 if weather.coin() else None
            raise BackendUnavailable("the weather is bad", retry_after=after)
        if weather.happens("slow"):
            await asyncio.sleep(weather.nap())
        if weather.happens("stuck"):
            await asyncio.sleep(3600)  # until the job's time is over
        result = await call()
        if weather.happens("slow"):
            await asyncio.sleep(weather.nap())
        if weather.happens("lost_reply"):
            raise BackendUnavailable("the reply got lost in the weather")
        return result


def taste(text: str) -> None:
    """Takes poison."""
    if "poison-permanent" in text:
        raise BackendError("poison")
    if "poison-transient" in text:
        raise BackendUnavailable("poison")
    if "poison-kill" in text:
        os._exit(9)
