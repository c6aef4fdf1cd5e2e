"""When requests go to the provider, and what becomes of those that fail.

One place decides what is sent: it is run whenever something may have changed, never waits, and
sends what may go. Everything that shall be sent again comes back here, so that a pause holds for
all of it, and queries go first there, too.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Protocol

from recallq.errors import BackendUnavailable, JobError
from recallq_worker.embedding.base import Embedded, Embedder, Kind, Refused, Throttled, Vector
from recallq_worker.embedding.lanes import Batch, Call, Item, Lane
from recallq_worker.embedding.limiter import RateLimiter
from recallq_worker.embedding.usage import UsageCounter

log = logging.getLogger(__name__)

_TRIES = 2
"""How often a request is sent that fails in passing."""
_BACKOFF = 0.25
"""Seconds before it is sent again, about."""
_REFUSALS = 16
"""Requests refused one after the other, before it is asked whether any would be taken."""
_HARMLESS = "text"
_SHORTLY = 1.0
"""Seconds by which a probe may go before its time."""
_LOOK_EVERY = 0.2
"""Part of the patience after which it is looked whether somebody has lost it."""


class Outcomes(Protocol):
    """Who is told what became of texts."""

    def delivered(self, items: list[Item], vectors: list[Vector]) -> None: ...

    def failed(self, items: list[Item], error: JobError) -> None: ...

    def gave_up(self, call: Call, error: JobError) -> None: ...


class Dispatcher:
    """Sends what waits in its lanes. Times are those of the event loop, in seconds."""

    def __init__(
        self,
        embedder: Embedder,
        limiter: RateLimiter,
        outcomes: Outcomes,
        usage: UsageCounter,
        *,
        linger: float,
        at_once: int,
        timeout: float,
        patience: float,
    ) -> None:
        """Made on the event loop, with an embedder that is started."""
        self._embedder = embedder
        self._limiter = limiter
        self._outcomes = outcomes
        self._usage = usage
        self._timeout = timeout
        self._patience = patience
        self._at_once = min(at_once, embedder.most_at_once or at_once)
        self._doing = f"embedding with {embedder.model}"
        bounds = [embedder.most_request_tokens, limiter.most_tokens]
        most_tokens = min((each for each in bounds if each is not None), default=None)
        self._lanes = {
            # In this order.
            kind: Lane(
                kind,
                most_texts=embedder.most_texts,
                most_tokens=most_tokens,
                linger=linger,
            )
            for kind in (Kind.QUERY, Kind.DOCUMENT)
        }
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._soon: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._refusals = 0
        self._stopped = False
        limiter.listen(self.poke)

    # --- what is to be sent ---------------------------------------------------------------------

    def add(self, call: Call, item: Item) -> None:
        """Queues a text for a caller; `poke` sees to it that it goes."""
        self._lanes[item.kind].add(call, item, self._loop.time())

    def drop(self, item: Item) -> None:
        """Forgets a text that waits."""
        self._lanes[item.kind].drop(item)

    def poke(self) -> None:
        """Has it looked, soon, what may be sent."""
        if self._soon is None and not self._stopped:
            self._soon = self._loop.call_soon(self._dispatch)

    async def stop(self) -> None:
        """Ends the requests under way. Whoever waits must have been told before."""
        self._stopped = True
        self._limiter.forget(self.poke)
        for handle in (self._soon, self._timer, self._look):
            if handle is not None:
                handle.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- sending --------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        self._soon = None
        now = self._loop.time()
        wake: float | None = None
        for lane in self._lanes.values():
            while (ready := lane.ready_at(now)) is not None:
                wait = self._limiter.wait(now)
                if wait > self._patience:
                    self._give_up(wait)
                    break
                ready = max(ready, now + wait)
                if ready > now:
                    wake = ready if wake is None else min(wake, ready)
                    break
                if not self._room(lane):
                    break  # whatever ends comes here
                batch = lane.take(now)
                if batch is None:
                    break
                self._send(lane, batch, now)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if wake is None else self._loop.call_at(wake, self.poke)
        if self._look is None and any(lane.waiting for lane in self._lanes.values()):
            self._look = self._loop.call_later(self._patience * _LOOK_EVERY, self._look_around)

    def _room(self, lane: Lane) -> bool:
        limit = min(self._at_once, self._limiter.limit)
        under_way = sum(each.in_flight for each in self._lanes.values())
        if under_way >= limit or not self._limiter.room:
            return False
        # A place is kept free, so that a query never waits for a request with documents to end.
        return lane.kind is Kind.QUERY or limit < 4 or lane.in_flight < limit - 1

    def _send(self, lane: Lane, batch: Batch, now: float) -> None:
        if not all(item.waiters for item in batch.items):
            # Of what is sent again: meanwhile nobody wants it any more.
            unwanted = [item for item in batch.items if not item.waiters]
            self._outcomes.failed(unwanted, BackendUnavailable("nobody wants it"))
            batch.items = [item for item in batch.items if item.waiters]
            if not batch.items:
                return
        if batch.first_sent is None:
            batch.first_sent = now
        lane.in_flight += 1
        self._limiter.began(now, batch.tokens)
        task = self._loop.create_task(self._request(lane, batch, now))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _request(self, lane: Lane, batch: Batch, began: float) -> None:
        try:
            answer = await self._ask([item.text for item in batch.items], batch.kind)
            if isinstance(answer, Embedded):
                self._succeeded(batch, answer, began)
            elif isinstance(answer, Refused):
                await self._refused(lane, batch, answer)
            elif isinstance(answer, BackendUnavailable):
                self._failed_in_passing(lane, batch, answer, began)
            else:
                self._outcomes.failed(batch.items, answer)
        finally:
            lane.in_flight -= 1
            self._limiter.ended()

    async def _ask(self, texts: list[str], kind: Kind) -> Embedded | JobError:
        """One request, or the error that it ended in."""
        answer = await self._answer(texts, kind)
        self._usage.ended(answer.tokens if isinstance(answer, Embedded) else None)
        return answer

    async def _answer(self, texts: list[str], kind: Kind) -> Embedded | JobError:
        try:
            async with asyncio.timeout(self._timeout):
                embedded = await self._embedder.embed(texts, kind)
        except TimeoutError:
            return _TimedOut(f"{self._doing}: no answer within {self._timeout:g} s")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return BackendUnavailable(f"{self._doing}: it was cancelled")
        except JobError as error:
            return error
        except Exception as error:  # noqa: BLE001  # told below, without words that may quote texts
            log.error("a defect in %r: %s", self._embedder, _where(error))  # noqa: TRY400
            return BackendUnavailable(f"{self._doing}: {type(error).__name__}")
        if len(embedded.vectors) != len(texts):
            return BackendUnavailable(
                f"{self._doing}: {len(embedded.vectors)} vectors came for {len(texts)} texts"
            )
        return embedded

    # --- what becomes of it ---------------------------------------------------------------------

    def _succeeded(self, batch: Batch, answer: Embedded, began: float) -> None:
        self._refusals = 0
        self._limiter.succeeded(
            self._loop.time(), began=began, estimated=batch.tokens, tokens=answer.tokens
        )
        self._outcomes.delivered(batch.items, answer.vectors)

    def _failed_in_passing(
        self, lane: Lane, batch: Batch, error: BackendUnavailable, began: float
    ) -> None:
        now = self._loop.time()
        assert batch.first_sent is not None
        if isinstance(error, Throttled) or error.retry_after is not None:
            self._limiter.throttled(now, began=began, retry_after=error.retry_after)
            wait = self._limiter.wait(now)
            if now + wait - batch.first_sent <= self._patience:
                lane.again(batch, now + wait)
                return
            # Whoever was told so keeps to what was named.
            wait = max(wait, error.retry_after or 0.0)
            error = BackendUnavailable(str(error), retry_after=wait)
        else:
            batch.tries += 1
            if batch.tries < _TRIES and not isinstance(error, _TimedOut):
                lane.again(batch, now + _BACKOFF * random.uniform(0.5, 1.5))  # noqa: S311
                return
        self._outcomes.failed(batch.items, error)

    async def _refused(self, lane: Lane, batch: Batch, error: Refused) -> None:
        """Halves what was refused, unless nothing would be taken anyway."""
        self._refusals += 1
        items = batch.items
        if len(items) == 1 or (
            self._refusals > _REFUSALS and not await self._takes_anything(batch.kind)
        ):
            self._outcomes.failed(items, error)
            return
        now = self._loop.time()
        middle = len(items) // 2
        for half in (items[:middle], items[middle:]):
            lane.again(Batch(batch.kind, half), now)

    async def _takes_anything(self, kind: Kind) -> bool:
        """Whether a request with a harmless text is taken: then the texts are to blame."""
        try:
            await self.probe(kind)
        except Refused:
            return False
        except JobError:
            return True  # who knows; what is sent next will tell
        return True

    async def probe(self, kind: Kind = Kind.QUERY) -> None:
        """Sends one short text, past everything that waits. Raises what it fails with."""
        wait = self._limiter.wait(self._loop.time())
        if wait > _SHORTLY:
            raise BackendUnavailable(
                f"{self._doing}: the provider takes no requests for {wait:.0f} s", retry_after=wait
            )
        answer = await self._ask([_HARMLESS], kind)
        if isinstance(answer, JobError):
            raise answer
        self._refusals = 0

    # --- patience -------------------------------------------------------------------------------

    def _give_up(self, wait: float) -> None:
        """Tells all who wait that the provider takes nothing for longer than they would wait."""
        error = BackendUnavailable(
            f"{self._doing}: the provider takes no requests for {wait:.0f} s", retry_after=wait
        )
        for lane in self._lanes.values():
            calls, batches = lane.everything()
            lane.clear_again()
            for batch in batches:
                self._outcomes.failed(batch.items, error)
            for call in calls:
                self._outcomes.gave_up(call, error)

    def _look_around(self) -> None:
        """Tells those who have waited for too long that it is not their turn for now."""
        self._look = None
        now = self._loop.time()
        error = BackendUnavailable(
            f"{self._doing}: too much is to be embedded; no turn within {self._patience:g} s",
            retry_after=self._limiter.wait(now) or None,
        )
        for lane in self._lanes.values():
            for call in lane.everything()[0]:
                if now - call.moved > self._patience:
                    self._outcomes.gave_up(call, error)
        self.poke()


class _TimedOut(BackendUnavailable):
    """It has taken long enough."""


def _where(error: BaseException) -> str:
    """The type of an error and where it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" in {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return f"{type(error).__name__}{where}"
