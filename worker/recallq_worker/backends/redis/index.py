"""The index of the redis backend: what keeps it, beside the adds and deletes that feed it.

An add leaves word of each record, in the same step; a delete takes that away, and notes what
segments still know. Everything else is done here, by whichever worker comes across it: records get
entries, entries become segments, segments are merged, and what is gone is taken out of them, before
a delete returns. How one is changed safely, `index_storage` says; how one is made anew,
`rebuilding`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice

from recallq.errors import BackendUnavailable, JobError
from recallq.redis_client import RedisClient
from recallq_worker.backends.redis.index_storage import (
    Asking,
    Change,
    IndexKeys,
    IndexStorage,
    Outdated,
    State,
    awaitable,
    new_name,
    text_of_id,
)
from recallq_worker.backends.redis.rebuilding import TRIES, Rebuilder
from recallq_worker.backends.redis.remembered import Remembered
from recallq_worker.backends.redis.values import parts_of
from recallq_worker.backends.redis.weighing import weigh_records
from recallq_worker.search.entries import DamagedIndex, session_digest
from recallq_worker.search.segments import sessions_in
from recallq_worker.search.terms import lines_of
from recallq_worker.search.upkeep import compacted, is_due, to_merge

log = logging.getLogger(__name__)

_AT_ONCE = 2
"""Users whose indexes a process tends at once: it is work for the processor."""
_LOCK_PATIENCE = 3.0
"""Seconds that a delete waits for whoever is changing the index; then it does so, too, and one of
them has to begin anew."""
_MOST_MERGED = 32_768
"""Messages of a segment: one is written anew when any of its messages is deleted."""


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
        self._storage = IndexStorage(redis, asking)
        self._rebuilder = Rebuilder(self._storage, self._forget_vectors, _MOST_MERGED)
        self._remembered = remembered
        self._forget = forget
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._tending: dict[str, asyncio.Task[None]] = {}
        self._rebuilding: dict[str, asyncio.Task[int]] = {}
        self._filling: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """Leaves everything that is under way as it is: others go on with it."""
        tasks = [*self._tending.values(), *self._rebuilding.values(), *self._filling]
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

    def fill(self, base: str, generation: bytes, entries: Mapping[bytes, bytes]) -> None:
        """Keeps what a search has made of records, for the next one. Does not wait."""
        task = asyncio.get_running_loop().create_task(
            self._fill(IndexKeys(base), generation, entries)
        )
        self._filling.add(task)
        task.add_done_callback(self._filling.discard)

    async def _fill(
        self, keys: IndexKeys, generation: bytes, entries: Mapping[bytes, bytes]
    ) -> None:
        try:
            await self._storage.fill(keys, generation, entries)
        except JobError as error:
            log.debug("cannot keep what a search has found out: %s", error)

    async def settled(self) -> None:
        """Returns once nothing is done here: for tests and benchmarks."""
        while under_way := [*self._tending.values(), *self._filling]:
            await asyncio.gather(*under_way, return_exceptions=True)

    async def clean(self, base: str) -> None:
        """Sees to it that nothing is left of what was removed up to now.

        Raises `BackendUnavailable`: then some may be left, and another call sees to it.
        """
        keys = IndexKeys(base)
        for _ in range(TRIES):
            state = await self._storage.look(keys)
            # An index that is of no use is dropped by who removes something.
            if state is None or not state.gone or not state.fits:
                return
            try:
                async with self._storage.locked(keys, _LOCK_PATIENCE):
                    state = await self._storage.look(keys)
                    if state is None or not state.gone or not state.fits:
                        return
                    if await self._storage.apply(
                        keys, state, await self._without_gone(keys, state)
                    ):
                        return
            except Outdated:
                continue
            except DamagedIndex as error:
                log.warning("a search index is damaged (%s); making it anew", error)
                await self.rebuild(base, force=True)
        raise BackendUnavailable("the search index changes too fast to be cleaned")

    async def is_sound(self, base: str) -> bool:
        """Whether an index is of this version, and has just the messages that there are."""
        return await self._storage.is_sound(IndexKeys(base))

    async def rebuild(self, base: str, *, force: bool = False, anyway: bool = False) -> int:
        """Makes a user's index anew if it is not sound, and says of how many messages. `force`:
        what is there is of no use; `anyway`: it is, until there is another.

        One call at a time for each user; who comes later waits for the same. Raises
        `BackendUnavailable` if another process is at it and does not come to an end.
        """
        task = self._rebuilding.get(base)
        if task is None:
            task = asyncio.get_running_loop().create_task(
                self._rebuilder.rebuild(IndexKeys(base), force=force, anyway=anyway)
            )
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
            async with self._storage.locked(keys) as lock:
                state = await self._storage.look(keys) if lock.is_mine else None
                if state is None:
                    return False  # nothing is there, or somebody sees to it
                if state.fits:
                    with contextlib.suppress(Outdated):
                        return await self._tidy(keys, state)
                    return True
            await self.rebuild(keys.base)
            return False

    async def _try_rebuild(self, base: str) -> None:
        try:
            await self.rebuild(base, force=True)
        except JobError as error:
            log.warning("cannot make a search index anew yet: %s", error)

    async def _tidy(self, keys: IndexKeys, state: State) -> bool:
        indexed = sum(state.segments.values())
        if is_due(0, len(state.gone), indexed):
            await self._storage.apply(keys, state, await self._without_gone(keys, state))
            return True
        if not is_due(len(state.entries), 0, indexed):
            return False
        entries = dict(islice(state.entries.items(), _MOST_MERGED))
        merged = to_merge(len(entries), state.segments, _MOST_MERGED)
        missing = [record_id for record_id, entry in entries.items() if not entry]
        values = await self._storage.values(keys, missing)
        for record_id, entry, text in await weigh_records(values):
            entries[record_id] = entry
            self._remembered.keep_text(keys.base, record_id, entry, text)
        texts = await self.texts_of(keys, entries)
        fields = [await self._storage.fields(keys, state, name) for name in merged]
        # What is gone stays in for now: it is taken out when there is more of it.
        made = await asyncio.to_thread(compacted, entries, texts, fields)
        assert made is not None  # there are entries
        await self._storage.apply(
            keys,
            state,
            Change({new_name(): made}, replaced=merged, absorbed=list(entries)),
        )
        return True

    async def _without_gone(self, keys: IndexKeys, state: State) -> Change:
        """Takes what is gone out of the segments that know it."""
        change = Change({}, replaced=[], cleaned=list(state.gone))
        digests = {session_digest(text_of_id(session)) for session in set(state.gone.values())}
        # Of a record that was damaged nobody knows the session.
        everywhere = b"" in state.gone.values()
        replaced: list[str] = []
        for name, size in state.segments.items():
            sessions = await self._storage.asking(
                awaitable(self._storage.redis.hget(keys.segments + name, "s"))
            )
            if sessions is None:
                raise await self._storage.missing(keys, state)
            _, there = sessions_in(sessions)
            if not everywhere and digests.isdisjoint(there.tolist()):
                continue
            fields = await self._storage.fields(keys, state, name)
            left = await asyncio.to_thread(compacted, {}, [], [fields], state.gone)
            removed = size - (0 if left is None else left.size)
            if not removed:
                continue
            replaced.append(name)
            change.removed += removed
            if left is not None:
                change.made[new_name()] = left
        change.replaced = replaced
        await self._forget_vectors(keys, state)
        return change

    async def _forget_vectors(self, keys: IndexKeys, state: State) -> None:
        """Says which records are gone, but for those that have been stored again since."""
        if self._forget is not None and state.gone:
            lost = await self._storage.lost(keys, list(state.gone))
            await self._forget(keys.base, [text_of_id(each) for each in lost])

    async def texts_of(self, keys: IndexKeys, entries: Mapping[bytes, bytes]) -> list[str]:
        """The texts of the records that entries are of, as their analysis has them; of those that
        are gone, none."""
        found = {
            record_id: self._remembered.text_of(keys.base, record_id, entry)
            for record_id, entry in entries.items()
        }
        missing = [record_id for record_id, known in found.items() if known is None]
        if missing:
            for record_id, value in await self._storage.values(keys, missing):
                parts = None if value is None else parts_of(record_id, value)
                if parts is not None:
                    text = found[record_id] = lines_of(parts[3])
                    self._remembered.keep_text(keys.base, record_id, entries[record_id], text)
        return [text for text in found.values() if text]
