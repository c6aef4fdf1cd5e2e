"""One user's index in Redis, as it is read and changed: what `index` and `rebuilding` work with.

New segments are written first, under names of their own, and then put in the place of others in one
step, if nobody else has changed them meanwhile, and no delete has come: a worker may die anywhere,
and two may do the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from recallq.errors import JobError
from recallq.redis_client import RedisClient
from recallq_worker.backends.redis import index_scripts as scripts
from recallq_worker.search.entries import VERSION, DamagedIndex
from recallq_worker.search.segments import Fields, Segment

_LOCK_MS = 15_000
"""How long others wait for a worker that died."""
_UNUSED_SEGMENT_MS = 3_600_000
"""How long a segment is kept that nobody has put into an index: its maker died."""
_WRITE_BYTES = 1 << 20

T = TypeVar("T")


class Asking(Protocol):
    """Awaits Redis, in the errors that backends raise."""

    async def __call__(self, reply: Awaitable[T]) -> T: ...


@dataclass(frozen=True, slots=True)
class IndexKeys:
    """The keys of one user."""

    base: str

    @property
    def records(self) -> str:
        return f"{self.base}:r"

    @property
    def order(self) -> str:
        return f"{self.base}:o"

    @property
    def own(self) -> list[str]:
        """Index, entries, gone."""
        return [f"{self.base}:i", f"{self.base}:e", f"{self.base}:g"]

    @property
    def segments(self) -> str:
        """How the segments' keys begin."""
        return f"{self.base}:n:"

    @property
    def looked_up(self) -> list[str]:
        """What a search looks at."""
        return [*self.own, self.order, self.records]

    @property
    def lock(self) -> str:
        return f"{self.base}:l"


@dataclass(slots=True)
class State:
    """What whoever changes the segments goes by."""

    fits: bool
    """Whether the index is of this version."""
    generation: bytes
    segments: dict[str, int]
    """Names, and numbers of messages."""
    entries: dict[bytes, bytes]
    """Of records that are in no segment; empty where nobody has made it yet."""
    gone: dict[bytes, bytes]


@dataclass(slots=True)
class Change:
    """What is to become of an index."""

    made: dict[str, Segment]
    replaced: Sequence[str] = ()
    absorbed: Sequence[bytes] = ()
    """Ids of the entries that are in new segments."""
    cleaned: Sequence[bytes] = ()
    """Ids that no segment knows any more."""
    removed: int = 0
    """Messages that were taken out of segments."""


@dataclass(frozen=True, slots=True)
class Lock:
    is_mine: bool
    prolong: Callable[[], Awaitable[None]]


class Outdated(Exception):
    """Somebody has changed the index since it was looked at."""


class IndexStorage:
    """The indexes of all users of one store. Belongs to the event loop that makes it."""

    def __init__(self, redis: RedisClient, asking: Asking) -> None:
        self.redis = redis
        self.asking = asking
        self._look_up = redis.register_script(scripts.LOOK_UP)
        self._state = redis.register_script(scripts.STATE)
        self._fill = redis.register_script(scripts.FILL)
        self._write_fields = redis.register_script(scripts.WRITE)
        self._commit = redis.register_script(scripts.COMMIT)
        self._abandon = redis.register_script(scripts.ABANDON)
        self._renew = redis.register_script(scripts.RENEW)
        self._prolong = redis.register_script(scripts.PROLONG)
        self._unlock = redis.register_script(scripts.UNLOCK)

    # --- reading --------------------------------------------------------------------------------

    async def is_sound(self, keys: IndexKeys) -> bool:
        """Whether an index is of this version, and has just the messages that there are."""
        said = await self.asking(
            self._look_up(keys=keys.looked_up, args=[keys.segments, VERSION, ""])
        )
        return bool(said != 0)

    async def look(self, keys: IndexKeys) -> State | None:
        """None if the user has no messages."""
        said = await self.asking(
            self._state(keys=[*keys.own, keys.order], args=[keys.segments, VERSION])
        )
        if said is None:
            return None
        fits, generation, segments, entries, gone = said
        return State(
            bool(fits),
            generation,
            {text_of_id(name): int(about.split()[0]) for name, about in pairs(segments)},
            dict(pairs(entries)),
            dict(pairs(gone)),
        )

    async def values(
        self, keys: IndexKeys, ids: Sequence[bytes]
    ) -> list[tuple[bytes, bytes | None]]:
        """Ids and values of records."""
        if not ids:
            return []
        reply = self.redis.hmget(keys.records, cast("list[str]", list(ids)))
        return list(zip(ids, await self.asking(awaitable(reply)), strict=True))

    async def fields(self, keys: IndexKeys, state: State, name: str) -> Fields:
        fields = await self.asking(awaitable(self.redis.hgetall(keys.segments + name)))
        if not fields:
            raise await self.missing(keys, state)
        return cast("Fields", fields)

    async def missing(self, keys: IndexKeys, state: State) -> Exception:
        """Why a segment is not there: somebody has put another in its place, or it is lost."""
        now = await self.look(keys)
        if now is None or now.generation != state.generation:
            return Outdated()
        return DamagedIndex("a segment is missing")

    async def lost(self, keys: IndexKeys, ids: Sequence[bytes]) -> set[bytes]:
        """Those that are no records any more."""
        if not ids:
            return set()
        scores = await self.asking(
            awaitable(self.redis.zmscore(keys.order, cast("list[str]", list(ids))))
        )
        return {record_id for record_id, score in zip(ids, scores, strict=True) if score is None}

    # --- changing -------------------------------------------------------------------------------

    @asynccontextmanager
    async def locked(self, keys: IndexKeys, patience: float = 0.0) -> AsyncIterator[Lock]:
        """Keeps others from doing the same work, if it can be had. It is not needed to be right."""
        token = secrets.token_hex(8)
        until = asyncio.get_running_loop().time() + patience

        async def prolong() -> None:
            await self.asking(self._prolong(keys=[keys.lock], args=[token, _LOCK_MS]))

        try:
            while True:
                reply = self.redis.set(keys.lock, token, nx=True, px=_LOCK_MS)
                mine = bool(await self.asking(awaitable(reply)))
                if mine or asyncio.get_running_loop().time() >= until:
                    break
                await asyncio.sleep(0.02)
            yield Lock(mine, prolong)
        finally:
            # Also when it is not known whether it was had, and when nobody waits for it.
            await asyncio.shield(self.asking(self._unlock(keys=[keys.lock], args=[token])))

    async def fill(
        self, keys: IndexKeys, generation: bytes, entries: Mapping[bytes, bytes]
    ) -> None:
        """Keeps the entries that were made of records, unless any have been deleted since."""
        flat = [each for pair in entries.items() for each in pair]
        await self.asking(self._fill(keys=keys.own[:2], args=[generation, *flat]))

    async def renew(self, keys: IndexKeys, *, force: bool) -> None:
        """Drops an index of another version, or with `force` of any, to be made anew."""
        args: list[Any] = [keys.segments, VERSION, int(force)]
        await self.asking(self._renew(keys=[*keys.own, keys.order], args=args))

    async def apply(self, keys: IndexKeys, state: State, change: Change) -> bool:
        """Writes the new segments, and puts them in their place unless somebody was faster."""
        done = False
        try:
            for name, segment in change.made.items():
                await self.write(keys, state, name, segment)
            done = await self.replace(keys, state, change, whole=False)
        except Outdated:
            pass
        finally:
            if not done:
                await self.drop(keys, change.made)
        return done

    async def write(self, keys: IndexKeys, state: State, name: str, segment: Segment) -> None:
        """Writes a segment, which is not part of the index yet. Raises `Outdated`."""
        portion: list[bytes] = []
        size = 0
        for field, value in segment.fields.items():
            portion += (field, value)
            size += len(value)
            if size >= _WRITE_BYTES:
                await self._write_portion(keys, state, name, portion)
                portion, size = [], 0
        await self._write_portion(keys, state, name, portion)

    async def _write_portion(
        self, keys: IndexKeys, state: State, name: str, portion: Sequence[bytes]
    ) -> None:
        written = await self.asking(
            self._write_fields(
                keys=[keys.own[0], keys.segments + name],
                args=[state.generation, name, _UNUSED_SEGMENT_MS, *portion],
            )
        )
        if not written:
            raise Outdated

    async def replace(self, keys: IndexKeys, state: State, change: Change, *, whole: bool) -> bool:
        """Puts new segments in their place; `whole`, in the place of all there are."""
        args: list[Any] = [
            keys.segments,
            VERSION,
            state.generation,
            int(whole),
            change.removed,
            len(change.made),
        ]
        for name, segment in change.made.items():
            args += [name, segment.describe()]
        args += [len(change.replaced), *change.replaced]
        args += [len(change.absorbed), *change.absorbed, *change.cleaned]
        return bool(await self.asking(self._commit(keys=[*keys.own, keys.order], args=args)))

    async def drop(self, keys: IndexKeys, made: dict[str, Segment]) -> None:
        """Removes segments that nobody needs; what cannot be removed expires."""
        if made:
            with contextlib.suppress(JobError):
                await self.asking(self._abandon(keys=[keys.own[0]], args=[keys.segments, *made]))


def pairs(flat: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """What a script returns of a hash."""
    return zip(flat[::2], flat[1::2], strict=True)


def new_name() -> str:
    return secrets.token_hex(6)


def text_of_id(name: bytes) -> str:
    return name.decode(errors="surrogatepass")


def awaitable(reply: Any) -> Awaitable[Any]:
    """redis-py's annotations stand for its synchronous client as well."""
    return cast("Awaitable[Any]", reply)
