"""The index of the redis backend: what keeps it, beside the adds and deletes that feed it.

An add leaves an entry beside each record, in the same step; a delete takes entries away, and notes
what segments still know. Everything else is done here, by whichever worker comes across it: entries
become segments, segments are merged, and what is gone is taken out of them - before a delete
returns. New segments are written first, under names of their own, and then put in the place of the
old ones in one step, if nobody else has changed them meanwhile: a worker may die anywhere, and two
may do the same.

An index of another version, or of other messages than are stored - because a worker of an older
version has added some - is made anew from the records, while adds go on; searches wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

from recallq.errors import BackendUnavailable, JobError
from recallq.redis_client import RedisClient
from recallq_worker.backends.redis import index_scripts as scripts
from recallq_worker.backends.redis.remembered import Remembered
from recallq_worker.backends.redis.values import parts_of
from recallq_worker.search.entries import VERSION, DamagedIndex, encode_entry, session_digest
from recallq_worker.search.segments import Fields, Segment, sessions_in
from recallq_worker.search.terms import analyze, lines_of
from recallq_worker.search.upkeep import compacted, is_due, to_merge

log = logging.getLogger(__name__)

_AT_ONCE = 2
"""Users whose indexes a process tends at once: it is work for the processor."""
_LOCK_MS = 15_000
"""How long others wait for a worker that died."""
_LOCK_PATIENCE = 3.0
"""Seconds that a delete waits for whoever is changing the index; then it does so, too, and one of
them has to begin anew."""
_REBUILD_PATIENCE = 10.0
"""Seconds that a search waits for another process that makes an index anew."""
_UNUSED_SEGMENT_MS = 3_600_000
"""How long a segment is kept that nobody has put into an index: its maker died."""
_WRITE_BYTES = 1 << 20
_PAGE = 1000
_MOST_MERGED = 32_768
"""Messages of a segment: one is written anew when any of its messages is deleted."""
_TRIES = 5

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
    def lock(self) -> str:
        return f"{self.base}:l"


@dataclass(slots=True)
class _State:
    """What whoever changes the segments goes by."""

    fits: bool
    """Whether the index is of this version."""
    generation: bytes
    segments: dict[str, int]
    """Names, and numbers of messages."""
    entries: dict[bytes, bytes]
    gone: dict[bytes, bytes]


@dataclass(slots=True)
class _Change:
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
class _Lock:
    is_mine: bool
    prolong: Callable[[], Awaitable[None]]


class _Outdated(Exception):
    """Somebody has changed the index since it was looked at."""


class RedisIndex:
    """The indexes of all users of one store. Belongs to the event loop that makes it."""

    def __init__(
        self,
        redis: RedisClient,
        asking: Asking,
        *,
        remembered: Remembered,
        forget: Callable[[str, Sequence[str]], Awaitable[None]] | None,
    ) -> None:
        """`forget` is told what records of a user are gone for good, by the beginning of the
        user's keys; it may be told again."""
        self._redis = redis
        self._asking = asking
        self._remembered = remembered
        self._forget = forget
        self._look_up = redis.register_script(scripts.LOOK_UP)
        self._state = redis.register_script(scripts.STATE)
        self._write_fields = redis.register_script(scripts.WRITE)
        self._commit = redis.register_script(scripts.COMMIT)
        self._abandon = redis.register_script(scripts.ABANDON)
        self._renew = redis.register_script(scripts.RENEW)
        self._prolong = redis.register_script(scripts.PROLONG)
        self._unlock = redis.register_script(scripts.UNLOCK)
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._tending: dict[str, asyncio.Task[None]] = {}
        self._rebuilding: dict[str, asyncio.Task[int]] = {}

    async def stop(self) -> None:
        """Leaves everything that is under way as it is: others go on with it."""
        tasks = [*self._tending.values(), *self._rebuilding.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def notice(self, base: str, *, entries: int, gone: int, indexed: int, fits: bool) -> None:
        """Takes note of how a user's index is doing after an add, and sees to it if need be."""
        if base in self._tending or (fits and not is_due(entries, gone, indexed)):
            return
        task = asyncio.get_running_loop().create_task(self._tend(base))
        self._tending[base] = task
        task.add_done_callback(lambda _: self._tending.pop(base, None))

    async def settled(self) -> None:
        """Returns once nothing is tended: for tests and benchmarks."""
        while self._tending:
            await asyncio.gather(*self._tending.values(), return_exceptions=True)

    async def clean(self, base: str) -> None:
        """Sees to it that nothing is left of what was removed up to now.

        Raises `BackendUnavailable`: then some may be left, and another call sees to it.
        """
        keys = IndexKeys(base)
        for _ in range(_TRIES):
            state = await self._look(keys)
            # An index that is of no use is dropped by who removes something.
            if state is None or not state.gone or not state.fits:
                return
            try:
                async with self._locked(keys, _LOCK_PATIENCE):
                    state = await self._look(keys)
                    if state is None or not state.gone or not state.fits:
                        return
                    await self._apply(keys, state, await self._without_gone(keys, state))
            except _Outdated:
                continue
            except DamagedIndex as error:
                log.warning("a search index is damaged (%s); making it anew", error)
                await self.rebuild(base, force=True)
        raise BackendUnavailable("the search index changes too fast to be cleaned")

    async def is_sound(self, base: str) -> bool:
        """Whether an index is of this version, and has just the messages that there are."""
        keys = IndexKeys(base)
        said = await self._asking(
            self._look_up(keys=[*keys.own[:2], keys.order], args=[keys.segments, VERSION])
        )
        return bool(said != 0)

    async def rebuild(self, base: str, *, force: bool = False, anyway: bool = False) -> int:
        """Makes a user's index anew if it is not sound, and says of how many messages. `force`:
        what is there is of no use; `anyway`: it is, until there is another.

        One call at a time for each user; who comes later waits for the same. Raises
        `BackendUnavailable` if another process is at it and does not come to an end.
        """
        task = self._rebuilding.get(base)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._rebuild(base, force, anyway))
            self._rebuilding[base] = task
            task.add_done_callback(lambda _: self._rebuilding.pop(base, None))
        return await asyncio.shield(task)

    # --- tending --------------------------------------------------------------------------------

    async def _tend(self, base: str) -> None:
        keys = IndexKeys(base)
        try:
            while await self._tended(keys):
                pass  # more has come meanwhile
        except DamagedIndex as error:
            log.warning("the search index of a user is damaged (%s); making it anew", error)
            await self._try_rebuild(base)
        except JobError as error:
            log.debug("cannot tend a search index: %s", error)
        except Exception:
            log.exception("a defect in tending a search index")

    async def _tended(self, keys: IndexKeys) -> bool:
        """Does what is due; whether there was anything."""
        async with self._slots:
            async with self._locked(keys) as lock:
                state = await self._look(keys) if lock.is_mine else None
                if state is None:
                    return False  # nothing is there, or somebody sees to it
                if state.fits:
                    with contextlib.suppress(_Outdated):
                        return await self._tidy(keys, state)
                    return True
            await self.rebuild(keys.base)
            return False

    async def _try_rebuild(self, base: str) -> None:
        try:
            await self.rebuild(base, force=True)
        except JobError as error:
            log.warning("cannot make a search index anew yet: %s", error)

    async def _tidy(self, keys: IndexKeys, state: _State) -> bool:
        indexed = sum(state.segments.values())
        if is_due(0, len(state.gone), indexed):
            await self._apply(keys, state, await self._without_gone(keys, state))
            return True
        if not is_due(len(state.entries), 0, indexed):
            return False
        entries = dict(islice(state.entries.items(), _MOST_MERGED))
        merged = to_merge(len(entries), state.segments, _MOST_MERGED)
        texts = await self.texts_of(keys, entries)
        fields = [await self._fields(keys, state, name) for name in merged]
        # What is gone stays in for now: it is taken out when there is more of it.
        made = await asyncio.to_thread(compacted, entries, texts, fields)
        assert made is not None  # there are entries
        await self._apply(
            keys,
            state,
            _Change({_new_name(): made}, replaced=merged, absorbed=list(entries)),
        )
        return True

    async def _without_gone(self, keys: IndexKeys, state: _State) -> _Change:
        """Takes what is gone out of the segments that know it."""
        change = _Change({}, replaced=[], cleaned=list(state.gone))
        digests = {session_digest(_text(session)) for session in set(state.gone.values())}
        # Of a record that was damaged nobody knows the session.
        everywhere = b"" in state.gone.values()
        replaced: list[str] = []
        for name, size in state.segments.items():
            sessions = await self._asking(_awaitable(self._redis.hget(keys.segments + name, "s")))
            if sessions is None:
                raise await self._missing(keys, state)
            _, there = sessions_in(sessions)
            if not everywhere and digests.isdisjoint(there.tolist()):
                continue
            fields = await self._fields(keys, state, name)
            left = await asyncio.to_thread(compacted, {}, [], [fields], state.gone)
            removed = size - (0 if left is None else left.size)
            if not removed:
                continue
            replaced.append(name)
            change.removed += removed
            if left is not None:
                change.made[_new_name()] = left
        change.replaced = replaced
        if self._forget is not None:
            await self._forget(keys.base, [_text(each) for each in state.gone])
        return change

    # --- making anew ----------------------------------------------------------------------------

    async def _rebuild(self, base: str, force: bool, anyway: bool) -> int:
        keys = IndexKeys(base)
        for _ in range(_TRIES):
            async with self._locked(keys, _REBUILD_PATIENCE) as lock:
                if not lock.is_mine:
                    raise BackendUnavailable(
                        "the search index of this user is being made anew", retry_after=2.0
                    )
                if not (force or anyway) and await self.is_sound(base):
                    return 0  # somebody was faster
                before = await self._look(keys)
                if before is not None and before.gone and self._forget is not None:
                    await self._forget(base, [_text(each) for each in before.gone])
                await self._asking(
                    self._renew(
                        keys=[*keys.own, keys.order], args=[keys.segments, VERSION, int(force)]
                    )
                )
                state = await self._look(keys)
                if state is None:
                    return 0
                force = False  # what is written from now on is as it should be
                seen = await self._make_anew(keys, state, lock)
                if seen is not None:
                    return seen
        raise BackendUnavailable("messages change too fast for their search index to be made anew")

    async def _make_anew(self, keys: IndexKeys, state: _State, lock: _Lock) -> int | None:
        """Indexes all records, and says how many there are; None if they have changed meanwhile."""
        made: dict[str, Segment] = {}
        seen: set[bytes] = set()
        entries: dict[bytes, bytes] = {}
        texts: list[str] = []

        async def put() -> None:
            segment = await asyncio.to_thread(compacted, dict(entries), list(texts), [])
            assert segment is not None  # there are entries
            name = _new_name()
            made[name] = segment._replace(fields={})
            await self._write(keys, state, name, segment)
            entries.clear()
            texts.clear()

        done = False
        try:
            async for page in self._records(keys, seen):
                for record_id, entry, text in await asyncio.to_thread(_entries_of, page):
                    entries[record_id] = entry
                    texts.append(text)
                    if len(entries) >= _MOST_MERGED:
                        await put()
                await lock.prolong()
            if entries:
                await put()
            # Those of records that are gone as well: who removed them knew no entries.
            there = await self._asking(_awaitable(self._redis.hkeys(keys.own[1])))
            unknown = [each for each in there if each not in seen]
            lost = await self._lost(keys, unknown)
            change = _Change(
                made,
                absorbed=[each for each in there if each in seen or each in lost],
                cleaned=list(state.gone),
            )
            done = await self._replace(keys, state, change, whole=True)
        except _Outdated:
            pass
        finally:
            if not done:
                await self._drop(keys, made)
        return len(seen) if done else None

    async def _records(
        self, keys: IndexKeys, seen: set[bytes]
    ) -> AsyncIterator[list[tuple[bytes, bytes | None]]]:
        """All records, from the lowest order key on; by order key, so that none is passed over
        because others are removed meanwhile."""
        lowest, most = "-inf", _PAGE
        while True:
            page = await self._asking(
                _awaitable(
                    self._redis.zrangebyscore(
                        keys.order, lowest, "+inf", start=0, num=most, withscores=True
                    )
                )
            )
            ids = [record_id for record_id, _ in page if record_id not in seen]
            if ids:
                values = await self._asking(_awaitable(self._redis.hmget(keys.records, ids)))
                found = dict(zip(ids, values, strict=True))
                # Removed since; one that is still in the order is damaged, and is to be counted.
                for record_id in await self._lost(keys, [i for i in ids if found[i] is None]):
                    del found[record_id]
                seen.update(found)
                yield list(found.items())
            elif len(page) == most:
                most *= 2  # so many have the same order key
                continue
            if len(page) < most:
                return
            lowest = repr(page[-1][1])

    async def _lost(self, keys: IndexKeys, ids: Sequence[bytes]) -> set[bytes]:
        """Those that are no records any more."""
        if not ids:
            return set()
        scores = await self._asking(
            _awaitable(self._redis.zmscore(keys.order, cast("list[str]", list(ids))))
        )
        return {record_id for record_id, score in zip(ids, scores, strict=True) if score is None}

    # --- reading and writing --------------------------------------------------------------------

    @asynccontextmanager
    async def _locked(self, keys: IndexKeys, patience: float = 0.0) -> AsyncIterator[_Lock]:
        """Keeps others from doing the same work, if it can be had. It is not needed to be right."""
        token = secrets.token_hex(8)
        until = asyncio.get_running_loop().time() + patience

        async def prolong() -> None:
            await self._asking(self._prolong(keys=[keys.lock], args=[token, _LOCK_MS]))

        try:
            while True:
                reply = self._redis.set(keys.lock, token, nx=True, px=_LOCK_MS)
                mine = bool(await self._asking(_awaitable(reply)))
                if mine or asyncio.get_running_loop().time() >= until:
                    break
                await asyncio.sleep(0.02)
            yield _Lock(mine, prolong)
        finally:
            # Also when it is not known whether it was had, and when nobody waits for it.
            await asyncio.shield(self._asking(self._unlock(keys=[keys.lock], args=[token])))

    async def _look(self, keys: IndexKeys) -> _State | None:
        """None if the user has no messages."""
        said = await self._asking(
            self._state(keys=[*keys.own, keys.order], args=[keys.segments, VERSION])
        )
        if said is None:
            return None
        fits, generation, segments, entries, gone = said
        return _State(
            bool(fits),
            generation,
            {_text(name): int(about.split()[0]) for name, about in pairs(segments)},
            dict(pairs(entries)),
            dict(pairs(gone)),
        )

    async def texts_of(self, keys: IndexKeys, entries: Mapping[bytes, bytes]) -> list[str]:
        """The texts of the records that entries are of, as their analysis has them; of those that
        are gone, none."""
        found = {
            record_id: self._remembered.text_of(keys.base, record_id, entry)
            for record_id, entry in entries.items()
        }
        missing = [record_id for record_id, known in found.items() if known is None]
        if missing:
            values = await self._asking(_awaitable(self._redis.hmget(keys.records, missing)))
            for record_id, value in zip(missing, values, strict=True):
                parts = None if value is None else parts_of(record_id, value)
                if parts is not None:
                    text = found[record_id] = lines_of(parts[3])
                    self._remembered.keep_text(keys.base, record_id, entries[record_id], text)
        return [text for text in found.values() if text]

    async def _fields(self, keys: IndexKeys, state: _State, name: str) -> Fields:
        fields = await self._asking(_awaitable(self._redis.hgetall(keys.segments + name)))
        if not fields:
            raise await self._missing(keys, state)
        return cast("Fields", fields)

    async def _missing(self, keys: IndexKeys, state: _State) -> Exception:
        """Why a segment is not there: somebody has put another in its place, or it is lost."""
        now = await self._look(keys)
        if now is None or now.generation != state.generation:
            return _Outdated()
        return DamagedIndex("a segment is missing")

    async def _apply(self, keys: IndexKeys, state: _State, change: _Change) -> bool:
        """Writes the new segments, and puts them in their place unless somebody was faster."""
        done = False
        try:
            for name, segment in change.made.items():
                await self._write(keys, state, name, segment)
            done = await self._replace(keys, state, change, whole=False)
        except _Outdated:
            pass
        finally:
            if not done:
                await self._drop(keys, change.made)
        return done

    async def _write(self, keys: IndexKeys, state: _State, name: str, segment: Segment) -> None:
        """Writes a segment, which is not part of the index yet. Raises `_Outdated`."""
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
        self, keys: IndexKeys, state: _State, name: str, portion: Sequence[bytes]
    ) -> None:
        written = await self._asking(
            self._write_fields(
                keys=[keys.own[0], keys.segments + name],
                args=[state.generation, name, _UNUSED_SEGMENT_MS, *portion],
            )
        )
        if not written:
            raise _Outdated

    async def _replace(
        self, keys: IndexKeys, state: _State, change: _Change, *, whole: bool
    ) -> bool:
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
        return bool(await self._asking(self._commit(keys=[*keys.own, keys.order], args=args)))

    async def _drop(self, keys: IndexKeys, made: dict[str, Segment]) -> None:
        """Removes segments that nobody needs; what cannot be removed expires."""
        if made:
            with contextlib.suppress(JobError):
                await self._asking(self._abandon(keys=[keys.own[0]], args=[keys.segments, *made]))


def _entries_of(
    records: Sequence[tuple[bytes, bytes | None]],
) -> list[tuple[bytes, bytes, str]]:
    """Ids, entries and texts of records. It is work for the processor."""
    found = []
    for record_id, value in records:
        parts = parts_of(record_id, value)
        # One that is damaged is found by nothing, and is a record all the same.
        order, session_id, message = parts[1:] if parts is not None else (0, "", {})
        analysis = analyze(message)
        entry = encode_entry(session_id, order, analysis.weights, analysis.usual)
        found.append((record_id, entry, analysis.text))
    return found


def pairs(flat: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """What a script returns of a hash."""
    return zip(flat[::2], flat[1::2], strict=True)


def _new_name() -> str:
    return secrets.token_hex(6)


def _text(name: bytes) -> str:
    return name.decode(errors="surrogatepass")


def _awaitable(reply: Any) -> Awaitable[Any]:
    """redis-py's annotations stand for its synchronous client as well."""
    return cast("Awaitable[Any]", reply)
