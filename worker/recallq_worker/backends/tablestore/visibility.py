"""Waiting until searches find what was written: the search index says nothing, so it is asked.

One watch per process asks for all rows that anybody waits for, the oldest first, a hundred in a
request, and rests only when the index has not moved on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from recallq.errors import JobError
from recallq_worker.backends.tablestore.index import SearchIndex
from recallq_worker.backends.tablestore.rows import EPOCH, Key
from recallq_worker.backends.tablestore.table import Table

log = logging.getLogger(__name__)

_AT_ONCE = 100
_REQUESTS = 4
_SHORTEST_REST = 0.05
_LONGEST_REST = 0.5
_LOOK_WHETHER_THERE = 1.0
"""Seconds after which a row that is not found is looked for in the table: it may be deleted."""


@dataclass(slots=True)
class _Awaited:
    since: float
    waiters: set[asyncio.Future[None]] = field(default_factory=set)
    looked: float = 0.0
    """When it was last looked for in the table."""


class Watch:
    """What this process waits for the index to show."""

    def __init__(self, table: Table, index: SearchIndex) -> None:
        self._table = table
        self._index = index
        self._awaited: dict[Key, _Awaited] = {}
        self._task: asyncio.Task[None] | None = None

    async def shown(self, keys: Iterable[Key], patience: float) -> set[Key]:
        """Waits until searches find these rows, for `patience` seconds at most; returns those that
        they do not find. What is gone needs not be found.

        Raises what asking fails with. May be cancelled.
        """
        loop = asyncio.get_running_loop()
        waiters = []
        for key in dict.fromkeys(keys):
            awaited = self._awaited.setdefault(key, _Awaited(loop.time()))
            waiter: asyncio.Future[None] = loop.create_future()
            awaited.waiters.add(waiter)
            waiters.append((key, waiter))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._watch())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    for _, waiter in waiters:
                        await asyncio.shield(waiter)
            return {key for key, waiter in waiters if not waiter.done()}
        finally:
            for key, waiter in waiters:
                self._let_go(key, waiter)

    async def stop(self) -> None:
        """Ends the watch; whoever still waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for awaited in self._awaited.values():
            for waiter in awaited.waiters:
                waiter.cancel()

    def _let_go(self, key: Key, waiter: asyncio.Future[None]) -> None:
        if waiter.done() and not waiter.cancelled():
            waiter.exception()  # the first is raised; the others are not worth a log line
        waiter.cancel()
        awaited = self._awaited.get(key)
        if awaited is not None:
            awaited.waiters.discard(waiter)
            if not awaited.waiters:
                del self._awaited[key]

    async def _watch(self) -> None:
        rest = _SHORTEST_REST
        while self._awaited:
            oldest = list(self._awaited)[: _AT_ONCE * _REQUESTS]
            parts = [oldest[at : at + _AT_ONCE] for at in range(0, len(oldest), _AT_ONCE)]
            try:
                shown = set().union(
                    *await asyncio.gather(*(self._index.shown(part) for part in parts))
                )
                gone = await self._gone([key for key in oldest if key not in shown])
            except JobError as error:
                self._fail(oldest, error)
                continue
            except Exception as error:
                log.exception("a defect in watching the search index")
                self._fail(oldest, error)
                continue
            for key in shown | gone:
                self._resolve(key)
            if len(self._awaited) > len(oldest):
                for key in oldest:  # others have their turn, even if these never show
                    if key in self._awaited:
                        self._awaited[key] = self._awaited.pop(key)
            if shown:
                rest = _SHORTEST_REST
            await asyncio.sleep(rest if len(shown) < len(oldest) else 0)
            rest = min(rest * 2, _LONGEST_REST)

    async def _gone(self, keys: list[Key]) -> set[Key]:
        """Those that are not in the table any more, of those that have been waited for long."""
        now = asyncio.get_running_loop().time()
        late = []
        for key in keys:
            awaited = self._awaited.get(key)
            if awaited is None:
                continue
            if now - max(awaited.since, awaited.looked) >= _LOOK_WHETHER_THERE:
                awaited.looked = now
                late.append(key)
        return set(late) - set(await self._table.read(late, [EPOCH])) if late else set()

    def _resolve(self, key: Key) -> None:
        awaited = self._awaited.pop(key, None)
        for waiter in awaited.waiters if awaited is not None else ():
            if not waiter.done():
                waiter.set_result(None)

    def _fail(self, keys: list[Key], error: Exception) -> None:
        for key in keys:
            awaited = self._awaited.pop(key, None)
            for waiter in awaited.waiters if awaited is not None else ():
                if not waiter.done():
                    waiter.set_exception(error)
