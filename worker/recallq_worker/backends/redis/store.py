"""Memories in Redis: durable, shared by any number of workers, on plain Redis 6.2 or later.

Each user has a hash of records, a sorted set of all of them by order key, and one such set per
session, so that adding, listing a page anywhere and deleting one record cost the same however much
the user has stored. Nothing is read in order to be written back.

With a TTL a record expires by its own age: reads leave expired ones out exactly, adds sweep them
out little by little, and a user who is silent for that long vanishes as a whole.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self, TypeVar, cast

from recallq.contract import Health, Scope
from recallq.errors import BackendError, BackendUnavailable, JobError
from recallq.keys import Keys, escape, unescape
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
from recallq_worker.backends.redis import index_scripts, scripts
from recallq_worker.backends.redis.expiry import Expiry
from recallq_worker.backends.redis.index import RedisIndex
from recallq_worker.backends.redis.index_storage import IndexKeys
from recallq_worker.backends.redis.reader import RedisReader, StaleIndex
from recallq_worker.backends.redis.remembered import Remembered
from recallq_worker.backends.redis.together import Together
from recallq_worker.backends.redis.values import to_record, to_value
from recallq_worker.backends.redis.vector_rows import RedisVectorRows
from recallq_worker.embedding import make_document_embedder
from recallq_worker.embedding.base import Refused
from recallq_worker.search.entries import VERSION, DamagedIndex
from recallq_worker.search.finder import Moved, Wanted, find
from recallq_worker.search.semantic import SemanticSearch
from recallq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_FENCES_LIVE_MS = 30 * 24 * 3600 * 1000
"""How long a fence outlives its delete: longer than any add may lie in a queue."""
_DELETE_CHUNK = 1000
_EMBEDDED_TOGETHER = 500
_SEARCHES = 5
"""How often an index may change its shape under a search."""

_ADDED = {"n": Added.NEW, "k": Added.KNOWN, "f": Added.FENCED}
"""What the script says of each record."""

_ADDED_TOGETHER = 100
"""Records, about, that one step adds: Redis does nothing else meanwhile."""

T = TypeVar("T")


@dataclass(slots=True)
class Embeddings:
    """What came of giving a user's messages vectors."""

    embedded: int = 0
    refused: int = 0
    """Messages that the model will not take."""


class _UserAdd:
    """The records of one user in one call, and where they stand in it."""

    __slots__ = ("base", "positions", "records", "sessions")

    def __init__(self, base: str) -> None:
        """`base` is how the user's keys begin."""
        self.base = base
        self.records: list[Record] = []
        self.positions: list[int] = []
        self.sessions: dict[str, int] = {}
        """Session id -> its number, from 1."""


@lru_cache(maxsize=4096)
def _keys_to_add(base: str) -> tuple[list[str], str, str]:
    """A user's keys as the script takes them, and the prefixes of those of sessions and of
    segments."""
    own = IndexKeys(base)
    keys = [own.records, own.order, f"{base}:x", f"{base}:f", *own.own]
    return keys, f"{base}:s:", own.segments


class RedisStore:
    """A `MemoryStore` on Redis."""

    name: ClassVar[str] = "redis"
    single_process: ClassVar[bool] = False
    indexes = False

    def __init__(
        self,
        url: str,
        *,
        namespace: str,
        ttl: int | None = None,
        clock_url: str = "",
        max_messages_per_session: int | None = None,
        connect_timeout: float = 5.0,
        semantic: SemanticSearch[RedisVectorRows] | None = None,
    ) -> None:
        """Connects to nothing yet. `clock_url` is of the Redis that has the time in order keys, if
        it is another. With `semantic`, messages are also found by their meaning."""
        self._url = url
        self._keys = Keys(namespace)
        self._expiry = Expiry(ttl, clock_url or url, connect_timeout)
        self._max_messages = max_messages_per_session
        self._connect_timeout = connect_timeout
        self._semantic = semantic
        if semantic is not None:
            self.indexes = True
        self._redis: RedisClient

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> Self:
        semantic = None
        if settings.search_strategy != "keyword":
            embedder = make_document_embedder(settings.store_url, settings.namespace)
            rows = RedisVectorRows(
                settings.store_url,
                namespace=settings.namespace,
                dimensions=embedder.dimensions,
                ttl=settings.store_ttl,
                connect_timeout=settings.connect_timeout,
                cache_mb=settings.vector_cache_mb,
            )
            semantic = SemanticSearch(embedder, rows, settings.search_strategy)
        return cls(
            settings.store_url,
            namespace=settings.namespace,
            ttl=settings.store_ttl,
            clock_url=settings.coordination_url,
            max_messages_per_session=settings.max_messages_per_session,
            connect_timeout=settings.connect_timeout,
            semantic=semantic,
        )

    async def start(self) -> None:
        self._redis = connect(self._url, connect_timeout=self._connect_timeout)
        self._page = self._redis.register_script(scripts.PAGE)
        self._fence = self._redis.register_script(scripts.FENCE)
        self._delete = self._redis.register_script(scripts.DELETE)
        self._look_up = self._redis.register_script(index_scripts.LOOK_UP)
        self._read_places = self._redis.register_script(index_scripts.READ)
        self._add = self._redis.register_script(scripts.ADD)
        self._together = Together(self._redis, self._asking, self._worded)
        self._remembered = Remembered()
        self._index = RedisIndex(
            self._redis,
            self._asking,
            remembered=self._remembered,
            forget=None if self._semantic is None else self._semantic.rows.forget,
        )
        await self._asking(self._redis.script_load(scripts.ADD))  # which tells whether it answers
        await self._asking(self._expiry.start())
        if self._semantic is not None:
            await self._semantic.start()

    async def stop(self) -> None:
        index = getattr(self, "_index", None)
        if index is not None:
            await index.stop()
        if self._semantic is not None:
            await self._semantic.stop()
        await self._expiry.stop()
        redis = getattr(self, "_redis", None)
        if redis is not None:
            await redis.aclose(close_connection_pool=True)

    # --- add ------------------------------------------------------------------------------------

    async def add(self, records: Sequence[Record]) -> list[Added]:
        users: dict[tuple[str, str], _UserAdd] = {}
        for position, record in enumerate(records):
            scope = record.scope
            user = users.get((scope.tenant, scope.user_id))
            if user is None:
                base = self._base(scope.tenant, scope.user_id)
                user = users[scope.tenant, scope.user_id] = _UserAdd(base)
            user.records.append(record)
            user.positions.append(position)
            user.sessions.setdefault(scope.session_id or "", len(user.sessions) + 1)
        stored = [Added.FENCED] * len(records)
        for some in _portions(list(users.values())):
            replies = await self._asking(self._add_users(some))
            for user, (flags, entries, gone, indexed, fits) in zip(some, replies, strict=True):
                for position, flag in zip(user.positions, flags.decode(), strict=True):
                    stored[position] = _ADDED[flag]
                self._index.notice(
                    user.base, entries=entries, gone=gone, indexed=indexed, fits=bool(fits)
                )
        return stored

    def _add_users(self, users: Sequence[_UserAdd]) -> Awaitable[list[list[Any]]]:
        """All of them in one step."""
        keys: list[str] = []
        args: list[Any] = [
            (self._expiry.ttl or 0) * 1000,
            self._max_messages or 0,
            self._cutoff(),
            VERSION,
        ]
        for user in users:
            sessions = user.sessions
            own, prefix, segments = _keys_to_add(user.base)
            keys += own
            args += (prefix, segments, len(sessions), len(user.records))
            for session in sessions:
                suffix = escape(session)
                keys.append(prefix + suffix)
                args += (session, suffix)
            for record in user.records:
                args += (
                    sessions[record.scope.session_id or ""],
                    record.record_id,
                    record.order,
                    record.epoch,
                    to_value(record),
                )
        return self._add(keys=keys, args=args)

    # --- the second step ------------------------------------------------------------------------

    async def index(
        self, records: Sequence[Record], *, patience: float
    ) -> Sequence[JobError | None]:
        if self._semantic is None:
            return [None] * len(records)
        return await self._semantic.index(records, self._stored)

    async def _stored(self, user: Scope, ids: Sequence[str]) -> dict[str, Record]:
        """Records of a user, by their ids."""
        reply = self._redis.hmget(IndexKeys(self._base(user.tenant, user.user_id)).records, [*ids])
        values = await self._asking(cast("Awaitable[list[bytes | None]]", reply))
        found = {}
        for record_id, value in zip(ids, values, strict=True):
            record = None if value is None else to_record(record_id.encode(), value, user)
            if record is not None:
                found[record_id] = record
        return found

    # --- read -----------------------------------------------------------------------------------

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        base = self._base(scope.tenant, scope.user_id)
        wanted = Wanted(query, scope.session_id, top_k, score_threshold)
        for _ in range(_SEARCHES):
            reader = RedisReader(
                self._redis,
                self._asking,
                self._together,
                self._look_up,
                self._read_places,
                self._index,
                self._remembered,
                base,
                scope,
                self._expiry.cutoff,
            )
            try:
                if self._semantic is not None:
                    return await self._semantic.find(reader, scope, wanted)
                return await find(reader, wanted)
            except Moved:
                continue
            except StaleIndex:
                await self._index.rebuild(base)
            except DamagedIndex as error:
                log.warning("the search index of a user is damaged (%s); making it anew", error)
                await self._index.rebuild(base, force=True)
        raise BackendUnavailable("the search index changes too fast to be read")

    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]:
        return await self._page_from(scope, self._cutoff(), offset, limit)

    async def _page_from(
        self, scope: Scope, lowest: str, offset: int, limit: int
    ) -> builtins.list[Record]:
        """A page of the records from the order key `lowest` on."""
        base = self._base(scope.tenant, scope.user_id)
        order = f"{base}:o"
        if scope.session_id is not None:
            order = f"{base}:s:{escape(scope.session_id)}"
        ids, values = await self._together.call(
            self._page, [f"{base}:r", order], [lowest, offset, limit]
        )
        found = (
            to_record(record_id, value, scope) for record_id, value in zip(ids, values, strict=True)
        )
        return [record for record in found if record is not None]

    # --- delete ---------------------------------------------------------------------------------

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        base = self._base(scope.tenant, scope.user_id)
        await self._asking(
            self._fence(
                keys=[f"{base}:f"], args=[scope.session_id or "", before_epoch, _FENCES_LIVE_MS]
            )
        )
        removed = await self._delete_records(base, scope, before_epoch)
        self._remembered.forget_entered(base)
        if self._semantic is not None:
            await self._semantic.rows.delete(scope, before_epoch)
        await self._index.clean(base)
        return removed

    async def _delete_records(self, base: str, scope: Scope, before_epoch: int) -> int:
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
        own = IndexKeys(base)
        keys = [own.records, own.order, f"{base}:x", places, *own.own]
        removed = 0
        while True:
            offset = passed = 0
            while True:
                args: list[Any] = [
                    session_id,
                    before_epoch,
                    offset,
                    _DELETE_CHUNK,
                    own.segments,
                    VERSION,
                ]
                looked_at, gone = await self._asking(self._delete(keys=keys, args=args))
                passed += int(gone)
                offset += looked_at - int(gone)
                if looked_at < _DELETE_CHUNK:
                    break
            removed += passed
            if passed == 0 or offset < _DELETE_CHUNK:
                return removed
            # Others may have removed records meanwhile, and so moved some past our place.

    # --- reindexing -----------------------------------------------------------------------------

    async def users(self, user: Scope | None = None) -> AsyncIterator[str]:
        """How the keys begin of all users who have something stored, or of one."""
        if user is not None:
            yield self._base(user.tenant, user.user_id)
            return
        beginning = f"{self._keys.namespace}:m:"
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", beginning) + "{*}:[oi]"
        cursor = 0
        seen: set[str] = set()
        while True:
            cursor, keys = await self._asking(self._redis.scan(cursor, match=pattern, count=1000))
            # Order or index: of a user whom another version has deleted, the latter is left.
            bases = {key.decode()[:-2] for key in cast("list[bytes]", keys)} - seen
            for base in bases:
                yield base
            seen |= bases
            if cursor == 0:
                return

    async def reindex(self, base: str, *, anyway: bool = False) -> int | None:
        """Makes a user's index anew if it is not as it should be, or `anyway`; searches go by the
        old one meanwhile, if that is of use. Returns the number of messages, None if not."""
        if not anyway and await self._index.is_sound(base):
            return None
        return await self._index.rebuild(base, anyway=True)

    async def embed(self, base: str) -> Embeddings | None:
        """Gives a user's messages vectors where they have none, and says how many; None if it
        cannot be told whose they are.

        Raises `BackendUnavailable`, `BackendError`.
        """
        assert self._semantic is not None  # else there are none
        names = base[base.index("{") + 1 : -1].split("/")
        tenant, user_id = (unescape(name) for name in names)
        if tenant is None or user_id is None:
            return None
        scope = Scope(tenant, user_id)
        done = Embeddings()
        async for records in self._all_of(scope):
            ids = [each.record_id for each in records]
            before = await self._semantic.rows.epochs(scope, ids)
            for error in await self._semantic.index(records, self._stored):
                if isinstance(error, Refused):
                    done.refused += 1
                elif error is not None:
                    raise error
            after = await self._semantic.rows.epochs(scope, ids)
            done.embedded += len(after.keys() - before.keys())
        return done

    async def _all_of(self, scope: Scope) -> AsyncIterator[builtins.list[Record]]:
        """A user's records, in order; by order key, so that none is passed over because others are
        removed meanwhile."""
        lowest, offset = self._cutoff(), 0
        while records := await self._page_from(scope, lowest, offset, _EMBEDDED_TOGETHER):
            yield records
            last = records[-1].order
            # Those of one order key, a job's messages, may be more than a page.
            same = sum(each.order == last for each in records)
            offset = same + (offset if str(last) == lowest else 0)
            lowest = str(last)

    async def settled(self) -> None:
        """Returns once nothing is being done to the indexes here: for tests and benchmarks."""
        await self._index.settled()

    # --- the rest -------------------------------------------------------------------------------

    async def health(self) -> Health:
        try:
            info = await self._asking(self._redis.info("server"))
            detail = f"Redis {info['redis_version']}"
            if self._semantic is not None:
                detail += f", searched by meaning with {await self._semantic.embedder.check()}"
        except JobError as error:
            return Health(ok=False, backend=self.name, detail=str(error))
        return Health(ok=True, backend=self.name, detail=detail)

    def _base(self, tenant: str, user_id: str) -> str:
        return f"{self._keys.namespace}:m:{self._keys.user_tag(tenant, user_id)}"

    def _cutoff(self) -> str:
        """The lowest order key that has not expired, for scripts."""
        cutoff = self._expiry.cutoff
        return "-inf" if cutoff is None else str(cutoff)

    async def _asking(self, reply: Awaitable[T]) -> T:
        """Awaits Redis, in the errors that backends raise."""
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT):
                return await reply
        except LOST as error:
            raise self._worded(error) from error

    def _worded(self, error: Exception) -> JobError:
        kind = BackendUnavailable if is_transient(error) else BackendError
        return kind(f"Redis at {redact(self._url)}: {reason_of(error)}")


def _portions(users: Sequence[_UserAdd]) -> Iterator[list[_UserAdd]]:
    """Users, as many as may be added to together."""
    portion: list[_UserAdd] = []
    size = 0
    for user in users:
        if portion and size + len(user.records) > _ADDED_TOGETHER:
            yield portion
            portion, size = [], 0
        portion.append(user)
        size += len(user.records)
    if portion:
        yield portion
