"""Makes the index of a user anew, from the records: because it is of another version, is damaged,
or does not have just the messages that there are.

Adds go on meanwhile, and a sound index is of use until there is another. Of several workers one
does it, and the others wait; a delete that comes in between has it begin anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from recallq.errors import BackendUnavailable
from recallq_worker.backends.redis.index_storage import (
    Change,
    IndexKeys,
    IndexStorage,
    Lock,
    Outdated,
    State,
    awaitable,
    new_name,
)
from recallq_worker.backends.redis.weighing import weighed
from recallq_worker.search.segments import Segment
from recallq_worker.search.upkeep import compacted

TRIES = 5
_PATIENCE = 10.0
"""Seconds that a search waits for another process that makes an index anew."""
_PAGE = 1000


class Rebuilder:
    """What makes indexes anew."""

    def __init__(
        self,
        storage: IndexStorage,
        forget: Callable[[IndexKeys, State], Awaitable[None]],
        most: int,
    ) -> None:
        """`forget` is told of a state in which records are gone; `most` messages go into a
        segment."""
        self._storage = storage
        self._forget = forget
        self._most = most

    async def rebuild(self, keys: IndexKeys, *, force: bool, anyway: bool) -> int:
        """See `recallq_worker.backends.redis.index.RedisIndex.rebuild`."""
        for _ in range(TRIES):
            async with self._storage.locked(keys, _PATIENCE) as lock:
                if not lock.is_mine:
                    raise BackendUnavailable(
                        "the search index of this user is being made anew", retry_after=2.0
                    )
                if not (force or anyway) and await self._storage.is_sound(keys):
                    return 0  # somebody was faster
                before = await self._storage.look(keys)
                if before is not None:
                    await self._forget(keys, before)
                await self._storage.renew(keys, force=force)
                state = await self._storage.look(keys)
                if state is None:
                    return 0
                force = False  # what is written from now on is as it should be
                seen = await self._make_anew(keys, state, lock)
                if seen is not None:
                    return seen
        raise BackendUnavailable("messages change too fast for their search index to be made anew")

    async def _make_anew(self, keys: IndexKeys, state: State, lock: Lock) -> int | None:
        """Indexes all records, and says how many there are; None if they have changed meanwhile."""
        made: dict[str, Segment] = {}
        seen: set[bytes] = set()
        entries: dict[bytes, bytes] = {}
        texts: list[str] = []

        async def put() -> None:
            segment = await asyncio.to_thread(compacted, dict(entries), list(texts), [])
            assert segment is not None  # there are entries
            name = new_name()
            made[name] = segment._replace(fields={})
            await self._storage.write(keys, state, name, segment)
            entries.clear()
            texts.clear()

        done = False
        try:
            async for page in self._records(keys, seen):
                for record_id, entry, text in await asyncio.to_thread(weighed, page):
                    entries[record_id] = entry
                    texts.append(text)
                    if len(entries) >= self._most:
                        await put()
                await lock.prolong()
            if entries:
                await put()
            # Those of records that are gone as well: who removed them knew no entries.
            there = await self._storage.asking(awaitable(self._storage.redis.hkeys(keys.own[1])))
            unknown = [each for each in there if each not in seen]
            lost = await self._storage.lost(keys, unknown)
            change = Change(
                made,
                absorbed=[each for each in there if each in seen or each in lost],
                cleaned=list(state.gone),
            )
            done = await self._storage.replace(keys, state, change, whole=True)
        except Outdated:
            pass
        finally:
            if not done:
                await self._storage.drop(keys, made)
        return len(seen) if done else None

    async def _records(
        self, keys: IndexKeys, seen: set[bytes]
    ) -> AsyncIterator[list[tuple[bytes, bytes | None]]]:
        """All records, from the lowest order key on; by order key, so that none is passed over
        because others are removed meanwhile."""
        lowest, most = "-inf", _PAGE
        while True:
            page = await self._storage.asking(
                awaitable(
                    self._storage.redis.zrangebyscore(
                        keys.order, lowest, "+inf", start=0, num=most, withscores=True
                    )
                )
            )
            ids = [record_id for record_id, _ in page if record_id not in seen]
            if ids:
                values = await self._storage.asking(
                    awaitable(self._storage.redis.hmget(keys.records, ids))
                )
                found = dict(zip(ids, values, strict=True))
                # Removed since; one that is still in the order is damaged, and is to be counted.
                for record_id in await self._storage.lost(
                    keys, [i for i in ids if found[i] is None]
                ):
                    del found[record_id]
                seen.update(found)
                yield list(found.items())
            elif len(page) == most:
                most *= 2  # so many have the same order key
                continue
            if len(page) < most:
                return
            lowest = repr(page[-1][1])
