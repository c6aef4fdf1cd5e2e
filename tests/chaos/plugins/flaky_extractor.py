"""An extractor in bad weather, for the chaos tests of the slow lane.

It makes one memory of each message, under an id that differs each time, so that what is extracted
twice is seen twice, and keeps it where the redis backend does. The weather strikes before it has
stored anything, as an LLM would, and after it has.
"""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

from flaky_redis import FlakyRedisStore, taste

from recallq.keys import escape
from recallq.messages import message_text
from recallq_worker.backends.base import (
    Added,
    Extracted,
    Journal,
    Record,
    Submission,
    Superseded,
)
from recallq_worker.backends.redis import RedisStore


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
                taste(message_text(message))
        made = [
            Extracted(
                [f"{each.job_id}-{n:05x}.{uuid.uuid4().hex}" for n in range(len(each.messages))],
                len(each.messages),
                len(submissions),
            )
            for each in submissions
        ]
        await self._through(_nothing)
        await journal({"ids": [each.record_ids for each in made]})
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
        ids: list[list[str]] = intent["ids"]
        return await self._through(lambda: self._recover(submissions, ids))

    async def _recover(
        self, submissions: Sequence[Submission], ids: list[list[str]]
    ) -> list[Extracted] | None:
        every = [record_id for each in ids for record_id in each]
        if not submissions:
            return None  # the delete that took them takes these
        scope = submissions[0].scope
        tag = self._keys.user_tag(scope.tenant, scope.user_id)
        base = f"{self._keys.namespace}:m:{tag}"
        found = await self._redis.hmget(f"{base}:r", every)
        if all(each is not None for each in found):
            return [Extracted(each, len(each), len(ids)) for each in ids]
        session = f"{base}:s:{escape(scope.session_id or '')}"
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hdel(f"{base}:r", *every)
            pipe.zrem(f"{base}:o", *every)
            pipe.zrem(session, *every)
            await pipe.execute()
        return None


async def _nothing() -> None:
    """What the LLM does is known before."""
