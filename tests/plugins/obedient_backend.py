"""Backends from outside that do what messages and queries tell them.

Registered by their own entry points, as anybody's backend would be. ``sleep 2`` in a text makes the
operation last two seconds, ``fail 3 times`` makes it unavailable so often before it works (and
``wait 2`` asks for that many seconds), ``refuse``, ``unavailable`` and ``explode`` make it fail in
the three ways a backend can, and ``exit`` ends the worker process at once.

Where they keep memories in Redis, ``until released`` makes an operation last until the test has set
``<namespace>:released``: what a test does before that happens while the operation runs, however
slow the machine is.

`ObedientStore` keeps memories in the process. `SlowRedisStore` keeps them in Redis, where it also
counts the calls in which it stored something (``<namespace>:calls``), and does not ``refuse`` any
more once ``<namespace>:allowed`` is there.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import orjson

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable, JobError
from recallq.keys import escape
from recallq.messages import message_text
from recallq.redis_client import RedisClient
from recallq_worker.backends.base import (
    REPEATABLE,
    Added,
    Extracted,
    Hit,
    Journal,
    Record,
    Submission,
)
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
            await _released(self._redis, self._keys.namespace, text)
            await _obey(text.replace("refuse", "") if allowed else text)
        return await super().add(records)

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        await _obey(query)
        return await super().search(scope, query, top_k=top_k, score_threshold=score_threshold)


class IndexedRedisStore(RedisStore):
    """Takes a second step, which obeys what follows ``index:`` in a text; ``cancel`` cancels the
    call from within. Searches find what has been through it. The users of each call are listed in
    ``<namespace>:index-calls``."""

    name: ClassVar[str] = "indexed"
    indexes = True

    async def add(self, records: Sequence[Record]) -> list[Added]:
        for record in records:
            await _obey(message_text(record.message).partition("index:")[0])
        return await super().add(records)

    async def index(self, records: Sequence[Record], *, patience: float) -> list[JobError | None]:
        users = [record.scope.user_id for record in records]
        await self._redis.rpush(f"{self._keys.namespace}:index-calls", orjson.dumps(users))
        errors: list[JobError | None] = []
        for record in records:
            error: JobError | None = None
            order = message_text(record.message).partition("index:")[2]
            await _released(self._redis, self._keys.namespace, order)
            if "cancel" in order:
                raise asyncio.CancelledError
            try:
                await _obey(order)
            except JobError as failure:
                error = failure
            else:
                await self._redis.sadd(f"{self._keys.namespace}:indexed", record.record_id)
            errors.append(error)
        return errors

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        hits = await super().search(scope, query, top_k=top_k, score_threshold=score_threshold)
        found = f"{self._keys.namespace}:indexed"
        return [hit for hit in hits if await self._redis.sismember(found, hit.record.record_id)]


async def _released(redis: RedisClient, namespace: str, text: str) -> None:
    while "until released" in text and not await redis.exists(f"{namespace}:released"):
        await asyncio.sleep(0.1)


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


class ObedientExtractor(RedisStore):
    """An extractor that makes one memory of each message, with an id of its own each time, and
    keeps it in Redis. What each of its extractions was about, and when it began, it lists in
    ``<namespace>:extractions``, and which users' ran at once at the most in ``<namespace>:most``.
    How often it began to look what was stored, ``<namespace>:recoveries`` counts.

    ``die before storing``, ``die half way`` and ``die after storing`` end the worker process at
    these moments, the first time, and ``die in recover`` each time. ``bad store``, ``bad recover``,
    ``slow store 2`` and ``slow recover 2`` say what happens while it stores, and while it looks
    what was stored; ``recover later`` makes it look for as long as it is not released, and ``store
    later`` makes it wait so before it stores anything. With ``same ids`` memories have the ids of
    their messages.
    """

    name: ClassVar[str] = "extractor"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running: set[str] = set()

    # Not a store: what comes in are submissions.
    add = None  # type: ignore[assignment]

    def group(self, submission: Submission) -> Hashable:
        return submission.scope.session_id

    def tokens(self, submission: Submission) -> int:
        if submission.infer is False:
            return 0
        return sum(len(message_text(each)) for each in submission.messages)

    async def extract(self, submissions: Sequence[Submission], journal: Journal) -> list[Extracted]:
        scope, texts = submissions[0].scope, _texts(submissions)
        namespace = self._keys.namespace
        started = {
            "user": scope.user_id, "session": scope.session_id, "texts": texts, "at": time.time()
        }  # fmt: skip
        assert scope.user_id not in self._running, "two extractions of one user at once"
        self._running.add(scope.user_id)
        try:
            await self._redis.rpush(f"{namespace}:extractions", orjson.dumps(started))
            await self._redis.zadd(f"{namespace}:most", {"users": len(self._running)}, gt=True)
            for text in texts:
                await _released(self._redis, namespace, text)
                await _obey(text)
            same = any("same ids" in text for text in texts)
            records = [
                Record(
                    known if same else uuid.uuid4().hex, each.scope, each.order, each.epoch, said
                )
                for each in submissions
                for known, said in zip(each.record_ids, each.messages, strict=True)
            ]
            ids = [record.record_id for record in records]
            await self._die("die before storing", texts)
            base = f"{namespace}:m:{self._keys.user_tag(scope.tenant, scope.user_id)}"
            intent = {"ids": ids, "base": base, "session": scope.session_id, "texts": texts}
            await journal({**intent, REPEATABLE: same})
            for text in texts:
                await _released(self._redis, namespace, "until released" * ("store later" in text))
                if slept := re.search(r"\bslow store ([0-9.]+)", text):
                    await asyncio.sleep(float(slept[1]))
                if "bad store" in text:
                    raise BackendError("not stored, as told")
            for record in records:
                await RedisStore.add(self, [record])
                await self._die("die half way", texts)
            await self._die("die after storing", texts)
            if "hang after storing" in texts[0]:
                await asyncio.sleep(60)
        finally:
            self._running.discard(scope.user_id)
        return _shared(submissions, ids)

    async def _die(self, when: str, texts: Sequence[str]) -> None:
        """Once for each text: whoever takes over lives."""
        for text in texts:
            key = f"{self._keys.namespace}:died:{text}"
            if when in text and await self._redis.set(key, 1, nx=True):
                os._exit(9)

    async def recover(
        self, submissions: Sequence[Submission], intent: dict[str, Any]
    ) -> list[Extracted] | None:
        ids, base, namespace = intent["ids"], intent["base"], self._keys.namespace
        await self._redis.incr(f"{namespace}:recoveries")
        for text in intent["texts"]:
            await _released(self._redis, namespace, "until released" * ("recover later" in text))
            if "bad recover" in text:
                raise BackendError("not found, as told")
            if "die in recover" in text:
                os._exit(9)
            if slept := re.search(r"\bslow recover ([0-9.]+)", text):
                await asyncio.sleep(float(slept[1]))
        found = await self._redis.hmget(f"{base}:r", ids)
        if submissions and all(each is not None for each in found):
            return _shared(submissions, ids)
        await self._redis.hdel(f"{base}:r", *ids)
        await self._redis.zrem(f"{base}:o", *ids)
        await self._redis.zrem(f"{base}:s:{escape(intent['session'])}", *ids)
        return None


def _texts(submissions: Sequence[Submission]) -> list[str]:
    return [message_text(message) for each in submissions for message in each.messages]


def _shared(submissions: Sequence[Submission], ids: list[str]) -> list[Extracted]:
    return [
        Extracted(ids, 0 if place else len(ids), len(submissions))
        for place in range(len(submissions))
    ]
