"""The redis backend in bad weather, for the chaos tests.

The weather is that of the file named by ``RECALLQ_TEST_WEATHER``; see `tests.chaos.weather`.
By a coin seeded from ``RECALLQ_TEST_WEATHER_SEED``, a call fails before it reaches Redis, fails
after Redis has done it (a lost reply), takes its time, or takes for ever.

A message can also be poison whatever the weather: ``poison-permanent`` in its text has it refused
for good, ``poison-transient`` for now, every time, and ``poison-kill`` ends the process. None of a
call with poison in it is stored.

`FlakyIndexedStore` stores first, and takes a second step that fails just as well.

`FlakyExtractor` makes one memory of each message, under an id that differs each time, so that what
is extracted twice is seen twice. The weather strikes before it has stored anything, as an LLM
would, and after it has.
"""

from __future__ import annotations

import asyncio
import os
import random
import uuid
from collections.abc import Awaitable, Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable, JobError
from recallq.keys import escape
from recallq.messages import message_text
from recallq_worker.backends.base import (
    Added,
    Extracted,
    Hit,
    Journal,
    Record,
    Submission,
    Superseded,
)
from recallq_worker.backends.redis import RedisStore
from tests.chaos.weather import Weather

T = TypeVar("T")


class FlakyRedisStore(RedisStore):
    name: ClassVar[str] = "flaky_redis"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        path = os.environ.get("RECALLQ_TEST_WEATHER")
        seed = os.environ.get("RECALLQ_TEST_WEATHER_SEED", "0")
        self._weather = Weather(Path(path) if path else None, random.Random(seed))

    async def add(self, records: Sequence[Record]) -> list[Added]:
        for record in records:
            _taste(message_text(record.message))
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


class FlakyIndexedStore(FlakyRedisStore):
    """Takes a second step, which the weather strikes for some records and not for others."""

    name: ClassVar[str] = "flaky_indexed"
    indexes = True

    async def index(self, records: Sequence[Record], *, patience: float) -> list[JobError | None]:
        await self._through(_nothing)
        bad = BackendUnavailable("the weather is bad here")
        return [bad if self._weather.happens("unavailable") else None for _ in records]


def _taste(text: str) -> None:
    """Takes poison."""
    if "poison-permanent" in text:
        raise BackendError("poison")
    if "poison-transient" in text:
        raise BackendUnavailable("poison")
    if "poison-kill" in text:
        os._exit(9)


class FlakyExtractor(FlakyRedisStore):
    name: ClassVar[str] = "flaky_extractor"

    # Not a store: what comes in are submissions.
    add = None  # type: ignore[assignment]

    def group(self, submission: Submission) -> Hashable:
        return submission.scope.session_id

    def tokens(self, submission: Submission) -> int:
        return sum(len(message_text(each)) for each in submission.messages)

    async def extract(self, submissions: Sequence[Submission], journal: Journal) -> list[Extracted]:
        for each in submissions:
            for message in each.messages:
                _taste(message_text(message))
        made = [
            Extracted(
                [f"{each.job_id}-{n:05x}.{uuid.uuid4().hex}" for n in range(len(each.messages))],
                len(each.messages),
                len(submissions),
            )
            for each in submissions
        ]
        await self._through(_nothing)
        scope = submissions[0].scope
        base = f"{self._keys.namespace}:m:{self._keys.user_tag(scope.tenant, scope.user_id)}"
        ids = [each.record_ids for each in made]
        await journal({"ids": ids, "base": base, "session": scope.session_id})
        await self._through(lambda: self._store(submissions, made))
        return made

    async def _store(self, submissions: Sequence[Submission], made: Sequence[Extracted]) -> None:
        """In several steps, so that a death may fall between them."""
        for submission, extracted in zip(submissions, made, strict=True):
            records = [
                Record(record_id, submission.scope, submission.order, submission.epoch, message)
                for record_id, message in zip(
                    extracted.record_ids, submission.messages, strict=True
                )
            ]
            if Added.FENCED in await RedisStore.add(self, records):
                raise Superseded

    async def recover(
        self, submissions: Sequence[Submission], intent: dict[str, Any]
    ) -> list[Extracted] | None:
        return await self._through(lambda: self._recover(submissions, intent))

    async def _recover(
        self, submissions: Sequence[Submission], intent: dict[str, Any]
    ) -> list[Extracted] | None:
        ids: list[list[str]] = intent["ids"]
        every, base = [record_id for each in ids for record_id in each], intent["base"]
        found = await self._asking(self._redis.hmget(f"{base}:r", every))
        if submissions and all(each is not None for each in found):
            return [Extracted(each, len(each), len(ids)) for each in ids]
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hdel(f"{base}:r", *every)
            pipe.zrem(f"{base}:o", *every)
            pipe.zrem(f"{base}:s:{escape(intent['session'])}", *every)
            await self._asking(pipe.execute())
        return None


async def _nothing() -> None:
    """What an LLM does is known before, and what a search index does does not matter."""
