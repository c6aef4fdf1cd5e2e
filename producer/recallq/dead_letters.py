"""Dead letters: writes that failed for good, as anybody reads, replays and purges them.

A letter is a hash - the letter itself as JSON, and the epoch and session by which a deletion finds
it - whose id stands in a sorted set by time of death and in its user's set. Workers write them
(`recallq_worker.dead_letters`); a deletion of the user or session takes them along.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Literal, cast

import orjson
from pydantic import BaseModel, Field, ValidationError

from recallq.contract import Job, Lane, Operation, Scope
from recallq.keys import Keys
from recallq.redis_client import RedisClient

LETTER, EPOCH, SESSION = "letter", "e", "s"
"""Fields of a letter's hash."""

_PAGE = 100

# KEYS: letter, dead, the user's dead letters. ARGV: id.
_FORGET = """
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('SREM', KEYS[3], ARGV[1])
return redis.call('DEL', KEYS[1])
"""


class DeadLetter(BaseModel):
    """One of them. Times are UTC."""

    id: str
    """Of a job, the job's id."""
    kind: Literal["job", "message"]
    """``message``: what came on a queue and could not be read as a batch of jobs."""
    operation: Operation | None = None
    lane: Lane | None = None
    scope: Scope | None = None
    backend: str | None = None
    """The backend that the client insisted on, if it did."""
    job: dict[str, Any] | None = Field(default=None, repr=False)
    """Of a job: the job, with what the user said."""
    payload: str | None = Field(default=None, repr=False)
    """Of a message: what came, with bytes that are not text written as escapes."""
    unsigned: bool = False
    """Of a message: whether it came where workers check signatures, and none was found to be good.
    It may be anybody's."""
    epochs: list[int] = Field(default_factory=list)
    """The job's deletion epoch; of a message, each job's."""
    code: str
    """The error's code, as in `recallq.errors`."""
    error: str
    attempts: int = 1
    """How often the job was run."""
    submitted_at: datetime | None = None
    died_at: datetime
    history: list[dict[str, Any]] = Field(default_factory=list)
    """Earlier attempts, oldest first: ``at``, ``error``."""


class DeadLetterOffice:
    """Reads and removes the dead letters of one namespace. Errors are redis-py's."""

    def __init__(self, redis: RedisClient, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._forget = redis.register_script(_FORGET)

    async def count(self) -> int:
        return int(await self._redis.zcard(self._keys.dead))

    async def get(self, letter_id: str) -> DeadLetter | None:
        stored = await self._redis.hget(self._keys.dead_letter(letter_id), LETTER)
        return None if stored is None else _read(letter_id, cast("bytes", stored))

    async def fence(self, scope: Scope) -> int:
        """The epoch below which nothing of a session, or of a user, is kept or replayed."""
        fields = ["*"] if scope.session_id is None else ["*", f"s:{scope.session_id}"]
        key = self._keys.epochs(scope.tenant, scope.user_id)
        found = cast("list[bytes | None]", await self._redis.hmget(key, fields))
        return max(int(each or 0) for each in found)

    async def every(
        self, *, scope: Scope | None = None, before: datetime | None = None
    ) -> AsyncIterator[DeadLetter]:
        """The letters from the oldest on: all, or those of a scope, or those that died `before`."""
        latest = "+inf" if before is None else f"({before.timestamp()}"
        ids = [
            cast("bytes", each).decode()
            for each in await self._redis.zrange(self._keys.dead, "-inf", latest, byscore=True)
        ]
        if scope is not None:
            key = self._keys.dead_letters_of(scope.tenant, scope.user_id)
            mine = cast("set[bytes]", await self._redis.smembers(key))
            ids = [each for each in ids if each.encode() in mine]
        for start in range(0, len(ids), _PAGE):
            page = ids[start : start + _PAGE]
            async with self._redis.pipeline(transaction=False) as pipe:
                for letter_id in page:
                    pipe.hget(self._keys.dead_letter(letter_id), LETTER)
                found = await pipe.execute()
            for letter_id, stored in zip(page, found, strict=True):
                letter = None if stored is None else _read(letter_id, stored)
                if letter is not None and _concerns(letter, scope):
                    yield letter

    async def remove(self, letter: DeadLetter) -> bool:
        """Forgets a letter; False if it was gone already."""
        user = letter.scope or Scope("", "")
        keys = [
            self._keys.dead_letter(letter.id),
            self._keys.dead,
            self._keys.dead_letters_of(user.tenant, user.user_id),
        ]
        return bool(await self._forget(keys=keys, args=[letter.id]))


def _concerns(letter: DeadLetter, scope: Scope | None) -> bool:
    if scope is None or scope.session_id is None:
        return True
    return letter.scope is not None and letter.scope.session_id == scope.session_id


def _read(letter_id: str, stored: bytes) -> DeadLetter:
    try:
        return DeadLetter.model_validate_json(stored)
    except ValidationError as error:
        # Written by another version, or damaged. It must still be seen, and can be purged.
        return DeadLetter(
            id=letter_id,
            kind="message",
            payload=stored.decode(errors="backslashreplace"),
            code="undecodable",
            error=f"the letter itself cannot be read: {error.errors()[0]['msg']}",
            died_at=datetime.fromtimestamp(0, UTC),
        )


def of_job(
    job: Job,
    operation: Operation,
    lane: Lane,
    backend: str | None,
    *,
    epoch: int,
    error: dict[str, Any],
    attempts: int,
    history: list[dict[str, Any]],
    at: float,
) -> DeadLetter:
    """The letter of a job that failed with `error` (as `recallq.errors.to_wire` writes it)."""
    return DeadLetter(
        id=job.id,
        kind="job",
        operation=operation,
        lane=lane,
        scope=job.scope,
        backend=backend,
        job=orjson.loads(job.model_dump_json()),
        epochs=[epoch],
        code=error["code"],
        error=error["message"],
        attempts=attempts,
        submitted_at=datetime.fromtimestamp(job.submitted_at, UTC),
        died_at=datetime.fromtimestamp(at, UTC),
        history=history,
    )
