"""Waiting until searches find what was written: the search index says nothing, so it is asked.

One watch per process asks for all rows that anybody waits for, those that came first first, a
hundred in a request, and rests only when the index has not moved on. A request that fails is made
again, as long as those who wait for its rows have patience, and concerns nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recallq.errors import BackendError, BackendUnavailable, InternalError, JobError
from recallq_worker.backends.tablestore.index import SearchIndex
from recallq_worker.backends.tablestore.rows import EPOCH, Key
from recallq_worker.backends.tablestore.table import Table

log = logging.getLogger(__name__)

_AT_ONCE = 100
_REQUESTS = 4
_LONGEST_REQUEST = 3.0
_SHORTEST_REST = 0.05
_LONGEST_REST = 0.5
_LOOK_WHETHER_THERE = 1.0
"""Seconds after which a row that is not found is looked for in the table: it may be deleted."""
_LOOK_AGAIN = 5.0
"""Seconds after which somebody whose patience is at its end should come again."""


@dataclass(eq=False, slots=True)
class _Caller:
    """Somebody who waits, for some rows."""

    missing: set[Key]
    done: asyncio.Future[None]
    """Once nothing is missing."""
    errors: dict[Key, JobError] = field(default_factory=dict)


@dataclass(slots=True)
class _Awaited:
    """A row that somebody waits for."""

    epoch: int
    """That the index must have heard of."""
    looked: float
    """When it was last looked for in the table, or came."""
    callers: set[_Caller] = field(default_factory=set)
    trouble: JobError | None = None
    """What the last request for it failed with."""


class Watch:
    """What this process waits for the index to show."""

    def __init__(self, table: Table, index: SearchIndex) -> None:
        self._table = table
        self._index = index
        self._awaited: dict[Key, _Awaited] = {}
        self._task: asyncio.Task[None] | None = None

    async def shown(self, rows: Mapping[Key, int], patience: float) -> dict[Key, JobError]:
        """Waits until searches find these rows, with at least these epochs; says why of those that
        they do not find within `patience` seconds. What is gone needs not be found.

        May be cancelled.
        """
        loop = asyncio.get_running_loop()
        caller = _Caller(set(rows), loop.create_future())
        for key, epoch in rows.items():
            awaited = self._awaited.setdefault(key, _Awaited(epoch, loop.time()))
            awaited.epoch = max(awaited.epoch, epoch)
            awaited.callers.add(caller)
        if not rows:
            return {}
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._watch())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await caller.done
            for key in caller.missing:
                caller.errors[key] = self._awaited[key].trouble or BackendUnavailable(
                    f"search index {self._index.name} does not show it yet",
                    retry_after=_LOOK_AGAIN,
                )
            return caller.errors
        finally:
            caller.done.cancel()
            for key in caller.missing:
                awaited = self._awaited[key]
                awaited.callers.discard(caller)
                if not awaited.callers:
                    del self._awaited[key]

    async def stop(self) -> None:
        """Ends the watch; whoever still waits is told so."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for key in list(self._awaited):
            self._end(key, BackendUnavailable("the worker stops"))

    async def _watch(self) -> None:
        rest = _SHORTEST_REST
        while self._awaited:
            first = list(self._awaited)[: _AT_ONCE * _REQUESTS]
            parts = [first[at : at + _AT_ONCE] for at in range(0, len(first), _AT_ONCE)]
            seen = await asyncio.gather(*(self._look_for(part) for part in parts))
            if len(self._awaited) > len(first):
                for key in first:  # others have their turn, even if these never show
                    if key in self._awaited:
                        self._awaited[key] = self._awaited.pop(key)
            if any(seen):
                rest = _SHORTEST_REST
            await asyncio.sleep(rest if not all(seen) else 0)
            rest = min(rest * 2, _LONGEST_REST)

    async def _look_for(self, keys: Sequence[Key]) -> bool:
        """Asks the index for rows; whether it shows one of them, or one is gone."""
        try:
            async with asyncio.timeout(_LONGEST_REQUEST):
                shown = await self._index.shown(keys)
                settled = {key for key in keys if self._is_enough(key, shown.get(key))}
                settled |= await self._gone([key for key in keys if key not in settled])
        except TimeoutError:
            self._note(keys, BackendUnavailable("the search index does not answer"))
            return False
        except JobError as error:
            self._note(keys, error)
            return False
        except Exception as error:
            log.exception("a defect in watching the search index")
            self._note(keys, InternalError(f"{type(error).__name__}; see the worker's log"))
            return False
        for key in settled:
            self._end(key, None)
        return bool(settled)

    def _is_enough(self, key: Key, epoch: int | None) -> bool:
        awaited = self._awaited.get(key)
        return awaited is None or (epoch is not None and epoch >= awaited.epoch)

    async def _gone(self, keys: Sequence[Key]) -> set[Key]:
        """Those that are not in the table any more, of those that have been waited for long."""
        now = asyncio.get_running_loop().time()
        late = []
        for key in keys:
            awaited = self._awaited.get(key)
            if awaited is not None and now - awaited.looked >= _LOOK_WHETHER_THERE:
                awaited.looked = now
                late.append(key)
        return set(late) - set(await self._table.read(late, [EPOCH])) if late else set()

    def _note(self, keys: Sequence[Key], error: JobError) -> None:
        """A request failed; where another would as well, nobody waits for it."""
        for key in keys:
            if isinstance(error, BackendError | InternalError):
                self._end(key, error)
            elif key in self._awaited:
                self._awaited[key].trouble = error

    def _end(self, key: Key, error: JobError | None) -> None:
        """Nobody waits for a row any more: it is shown, or gone, or cannot be asked for."""
        awaited = self._awaited.pop(key, None)
        for caller in awaited.callers if awaited is not None else ():
            caller.missing.discard(key)
            if error is not None:
                caller.errors[key] = error
            if not caller.missing and not caller.done.done():
                caller.done.set_result(None)
