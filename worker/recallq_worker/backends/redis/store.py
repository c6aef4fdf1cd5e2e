"""Memories in Redis: durable, shared by any number of workers, on plain Redis 6.2 or later.

Each user has a hash of records, a sorted set of all of them by order key, and one such set per
session, so that adding, listing a page anywhere and deleting one record cost the same however much
the user has stored. Nothing is read in order to be written back.

With a TTL a record expires by its own age: reads leave expired ones out exactly, adds sweep them
out little by little, and a user who is silent for that long vanishes as a whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar, cast

import orjson
from redis import exceptions

from recallq.contract import Health, Scope
from recallq.errors import BackendError, BackendUnavailable
from recallq.keys import Keys, escape
from recallq.redis_client import (
    COMMAND_TIMEOUT,
    LOST,
    RedisClient,
    connect,
    is_transient,
    reason_of,
    redact,
)
from recallq_worker.backends.base import Added, Hit, Record
from recallq_worker.backends.redis import scripts
from recallq_worker.ranking import Ranking
from recallq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_FENCES_LIVE_MS = 30 * 24 * 3600 * 1000
"""How long a fence outlives its delete: longer than any add may lie in a queue."""
_DELETE_CHUNK = 1000
_SEARCH_CHUNK = 500

_ADDED = {"n": Added.NEW, "k": Added.KNOWN, "f": Added.FENCED}
"""What the script says of each record."""

T = TypeVar("T")


@dataclass(slots=True)
class _UserAdd:
    """The records of one user in one call, and where they stand in it."""

    records: list[Record] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sessions: dict[str, int] = field(default_factory=dict)
    """Session id -> its number, from 1."""


class RedisStore:
    """A `MemoryStore` on Redis."""

    name: ClassVar[str] = "redis"
    single_process: ClassVar[bool] = False

    def __init__(
        self,
        url: str,
        *,
        namespace: str,
        ttl: int | None = None,
        max_messages_per_session: int | None = None,
        connect_timeout: float = 5.0,
    ) -> None:
        self._url = url
        self._keys = Keys(namespace)
        self._ttl = ttl
        self._max_messages = max_messages_per_session
        self._connect_timeout = connect_timeout
        self._redis: RedisClient

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> Self:
        return cls(
            settings.store_url,
            namespace=settings.namespace,
            ttl=settings.store_ttl,
            max_messages_per_session=settings.max_messages_per_session,
            connect_timeout=settings.connect_timeout,
        )

    async def start(self) -> None:
        self._redis = connect(self._url, connect_timeout=self._connect_timeout)
        self._page = self._redis.register_script(scripts.PAGE)
        self._fence = self._redis.register_script(scripts.FENCE)
        self._delete = self._redis.register_script(scripts.DELETE)
        self._add = self._redis.register_script(scripts.ADD)
        await self._asking(self._redis.script_load(scripts.ADD))

    async def stop(self) -> None:
        redis = getattr(self, "_redis", None)
        if redis is not None:
            await redis.aclose(close_connection_pool=True)

    # --- add ------------------------------------------------------------------------------------

    async def add(self, records: Sequence[Record]) -> list[Added]:
        users: dict[tuple[str, str], _UserAdd] = {}
        for position, record in enumerate(records):
            scope = record.scope
            user = users.setdefault((scope.tenant, scope.user_id), _UserAdd())
            user.records.append(record)
            user.positions.append(position)
            user.sessions.setdefault(scope.session_id or "", len(user.sessions) + 1)
        calls = [self._add_call(tenant, user_id, user) for (tenant, user_id), user in users.items()]
        replies = await self._asking(self._add_all(calls))
        stored = [Added.FENCED] * len(records)
        for user, reply in zip(users.values(), replies, strict=True):
            for position, flag in zip(user.positions, reply.decode(), strict=True):
                stored[position] = _ADDED[flag]
        return stored

    def _add_call(self, tenant: str, user_id: str, user: _UserAdd) -> tuple[list[str], list[Any]]:
        """Keys and arguments of the script that adds one user's records."""
        base = self._base(tenant, user_id)
        suffixes = {session: escape(session) for session in user.sessions}
        keys = [f"{base}:r", f"{base}:o", f"{base}:x", f"{base}:f"]
        keys += [f"{base}:s:{suffix}" for suffix in suffixes.values()]
        args: list[Any] = [
            (self._ttl or 0) * 1000,
            self._max_messages or 0,
            self._cutoff(),
            f"{base}:s:",
            len(suffixes),
        ]
        for session, suffix in suffixes.items():
            args += [session, suffix]
        for record in user.records:
            session = record.scope.session_id or ""
            value = orjson.dumps([record.epoch, record.order, session, record.message])
            args += [user.sessions[session], record.record_id, record.order, record.epoch, value]
        return keys, args

    async def _add_all(self, calls: list[tuple[list[str], list[Any]]]) -> list[bytes]:
        """All users in one round trip."""
        for first_try in (True, False):
            pipe = self._redis.pipeline(transaction=False)
            for keys, args in calls:
                pipe.evalsha(self._add.sha, len(keys), *keys, *args)
            # Not raised by the pipeline, which would quote the command: ids, and what users said.
            replies = await pipe.execute(raise_on_error=False)
            error = next((each for each in replies if isinstance(each, Exception)), None)
            if error is None:
                return list(replies)
            if not (first_try and isinstance(error, exceptions.NoScriptError)):
                raise error
            # The server was restarted. Adding again what had been added changes nothing.
            await self._redis.script_load(scripts.ADD)
        raise AssertionError("unreachable")

    # --- read -----------------------------------------------------------------------------------

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        ranking = Ranking(query, top_k=top_k, score_threshold=score_threshold)
        offset, more = 0, True
        while more:
            records, more = await self._read(scope, offset, _SEARCH_CHUNK)
            ranking.consider(records)
            offset += _SEARCH_CHUNK
        return ranking.best()

    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]:
        return [*(await self._read(scope, offset, limit))[0]]

    async def _read(self, scope: Scope, offset: int, limit: int) -> tuple[Sequence[Record], bool]:
        """A page of records, and whether there may be more behind it."""
        base = self._base(scope.tenant, scope.user_id)
        order = f"{base}:o"
        if scope.session_id is not None:
            order = f"{base}:s:{escape(scope.session_id)}"
        ids, values = await self._asking(
            self._page(keys=[f"{base}:r", order], args=[self._cutoff(), offset, limit])
        )
        records = []
        for record_id, value in zip(ids, values, strict=True):
            try:
                epoch, at, session_id, message = orjson.loads(value)
            except (TypeError, ValueError):
                # Damaged by another hand. The user's other memories stay readable.
                log.error(  # noqa: TRY400  # the traceback would quote what a user said
                    "record %s of a user is damaged and left out", record_id.decode()
                )
                continue
            owner = Scope(scope.tenant, scope.user_id, session_id)
            records.append(Record(record_id.decode(), owner, at, epoch, message))
        return records, len(ids) == limit

    # --- delete ---------------------------------------------------------------------------------

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        base = self._base(scope.tenant, scope.user_id)
        await self._asking(
            self._fence(
                keys=[f"{base}:f"], args=[scope.session_id or "", before_epoch, _FENCES_LIVE_MS]
            )
        )
        if scope.session_id is not None:
            return await self._delete_session(base, scope.session_id, before_epoch)
        # The fence stands: no session can come to hold an older record any more.
        sessions = cast("Sequence[bytes]", await self._asking(self._redis.hkeys(f"{base}:x")))
        removed = 0
        for session in sessions:
            removed += await self._delete_session(base, session.decode(), before_epoch)
        # And what is in no session's set, because the set has expired and the user's has not.
        return removed + await self._delete_from(base, f"{base}:o", "", before_epoch)

    async def _delete_session(self, base: str, session_id: str, before_epoch: int) -> int:
        return await self._delete_from(
            base, f"{base}:s:{escape(session_id)}", session_id, before_epoch
        )

    async def _delete_from(self, base: str, places: str, session_id: str, before_epoch: int) -> int:
        """Removes the old ones of the records in the sorted set `places`."""
        keys = [f"{base}:r", f"{base}:o", f"{base}:x", places]
        removed = 0
        while True:
            offset = passed = 0
            while True:
                looked_at, gone = await self._asking(
                    self._delete(keys=keys, args=[session_id, before_epoch, offset, _DELETE_CHUNK])
                )
                passed += int(gone)
                offset += looked_at - int(gone)
                if looked_at < _DELETE_CHUNK:
                    break
            removed += passed
            if passed == 0 or offset < _DELETE_CHUNK:
                return removed
            # Others may have removed records meanwhile, and so moved some past our place.

    # --- the rest -------------------------------------------------------------------------------

    async def health(self) -> Health:
        try:
            info = await self._asking(self._redis.info("server"))
        except (BackendUnavailable, BackendError) as error:
            return Health(ok=False, backend=self.name, detail=str(error))
        return Health(ok=True, backend=self.name, detail=f"Redis {info['redis_version']}")

    def _base(self, tenant: str, user_id: str) -> str:
        return f"{self._keys.namespace}:m:{self._keys.user_tag(tenant, user_id)}"

    def _cutoff(self) -> str:
        """The lowest order key that has not expired."""
        if self._ttl is None:
            return "-inf"
        return str(int((time.time() - self._ttl) * 1_000_000))

    async def _asking(self, reply: Awaitable[T]) -> T:
        """Awaits Redis, in the errors that backends raise."""
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT):
                return await reply
        except LOST as error:
            kind = BackendUnavailable if is_transient(error) else BackendError
            raise kind(f"Redis at {redact(self._url)}: {reason_of(error)}") from error
