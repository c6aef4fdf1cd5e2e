"""Packs concurrent calls into batches.

A Celery task costs a worker about a millisecond whatever it carries, so jobs of one lane and one
operation travel together. Nothing waits without need: while few batches are unanswered, a job
leaves at once, with whatever was called in the same turn of the event loop. Once `batch_window`
batches are out, jobs gather until one of them is answered, a batch is full, or `batch_linger` has
passed. Batches are so as large as the workers are busy.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from recallq.contract import AnyJob, Lane, Operation, Outcome
from recallq.errors import ClientClosed
from recallq.settings import ClientSettings


@dataclass(slots=True, eq=False)
class Draft:
    """A job on its way into a batch."""

    job: AnyJob
    size: int
    """Bytes it will take in the message, about."""
    came_at: float
    """When it was called, on the event loop's clock."""
    answer: asyncio.Future[Outcome | None]
    """What its caller awaits: how it settled or, without `waits`, nothing, once its batch is in the
    ledger and on the queue. Done before it leaves if the caller has given up."""
    waits: bool
    """Whether its caller waits until it has settled."""
    early: bool = False
    """Whether until it is stored is enough."""


Send = Callable[[Lane, Operation, list[Draft], Callable[[], None]], Awaitable[None]]
"""Sends a batch: returns once it is accepted, and calls what it was given once nobody waits for
jobs of it any more."""


@dataclass(slots=True)
class _Stream:
    """The jobs of one lane and operation."""

    lane: Lane
    operation: Operation
    waiting: deque[Draft] = field(default_factory=deque)
    size: int = 0
    records: int = 0
    unanswered: int = 0
    scheduled: bool = False
    timer: asyncio.TimerHandle | None = None


class _Flight:
    """A batch that is under way."""

    __slots__ = ("_land", "_stream")

    def __init__(self, stream: _Stream, land: Callable[[_Stream], None]) -> None:
        self._stream: _Stream | None = stream
        self._land = land

    def land(self) -> None:
        """It is answered, or was refused: another may leave. Counts once."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._land(stream)


class Batcher:
    """Collects drafts and hands them to `send` in batches, in the order in which they came."""

    def __init__(self, settings: ClientSettings, send: Send) -> None:
        self._settings = settings
        self._send = send
        self._streams: dict[tuple[Lane, Operation], _Stream] = {}
        self._sending: dict[asyncio.Task[None], list[Draft]] = {}
        self._closed = False

    def put(
        self,
        lane: Lane,
        operation: Operation,
        job: AnyJob,
        size: int,
        *,
        wait: bool,
        early: bool = False,
    ) -> Draft:
        """Queues `job`; with `wait`, the caller will wait for its outcome, with `early` only until
        it is stored."""
        if self._closed:
            raise ClientClosed("the client was stopped")
        loop = asyncio.get_running_loop()
        draft = Draft(job, size, loop.time(), loop.create_future(), wait, early)
        stream = self._streams.get((lane, operation))
        if stream is None:
            stream = self._streams[lane, operation] = _Stream(lane, operation)
        stream.waiting.append(draft)
        stream.size += size
        stream.records += job.weight
        # Not at once: what is called in the same turn of the loop shares the batch.
        self._pump_soon(stream)
        return draft

    async def close(self) -> None:
        """Fails what has not left yet and waits for what is being sent."""
        self._closed = True
        for stream in self._streams.values():
            if stream.timer is not None:
                stream.timer.cancel()
            while stream.waiting:
                _fail(stream.waiting.popleft(), ClientClosed("the client was stopped"))
        sending = dict(self._sending)
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        for task, drafts in sending.items():
            if task.cancelled():  # before its first step, perhaps
                for draft in drafts:
                    _fail(draft, ClientClosed("the client was stopped"))

    def _pump_soon(self, stream: _Stream) -> None:
        if not stream.scheduled:
            stream.scheduled = True
            asyncio.get_running_loop().call_soon(self._pump, stream)

    def _pump(self, stream: _Stream) -> None:
        """Sends what may leave, and sees to it that it is called again for the rest."""
        loop = asyncio.get_running_loop()
        linger = self._settings.batch_linger
        stream.scheduled = False
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None
        if self._closed:
            return
        while stream.waiting and (
            stream.unanswered < self._settings.batch_window
            or self._full(stream)
            or loop.time() >= stream.waiting[0].came_at + linger
        ):
            drafts = self._take(stream)
            if drafts:
                stream.unanswered += 1
                task = loop.create_task(self._dispatch(stream, drafts))
                self._sending[task] = drafts
                task.add_done_callback(self._sending.pop)
        if stream.waiting:
            # Counted from the oldest, however steadily others follow it.
            stream.timer = loop.call_at(stream.waiting[0].came_at + linger, self._pump, stream)

    def _full(self, stream: _Stream) -> bool:
        settings = self._settings
        return (
            len(stream.waiting) >= settings.batch_max_jobs
            or stream.size >= settings.batch_max_bytes
            or stream.records >= settings.batch_max_records
        )

    def _take(self, stream: _Stream) -> list[Draft]:
        """The next batch: within the limits, but at least one job however large."""
        settings = self._settings
        drafts: list[Draft] = []
        size = records = 0
        while stream.waiting and len(drafts) < settings.batch_max_jobs:
            draft = stream.waiting[0]
            weight = draft.job.weight
            too_much = (
                size + draft.size > settings.batch_max_bytes
                or records + weight > settings.batch_max_records
            )
            if drafts and too_much:
                break
            stream.waiting.popleft()
            stream.size -= draft.size
            stream.records -= weight
            if not draft.answer.done():  # else its caller gave up before it left
                drafts.append(draft)
                size += draft.size
                records += weight
        return drafts

    async def _dispatch(self, stream: _Stream, drafts: list[Draft]) -> None:
        flight = _Flight(stream, self._landed)
        try:
            await self._send(stream.lane, stream.operation, drafts, flight.land)
        except asyncio.CancelledError:
            for draft in drafts:
                _fail(draft, ClientClosed("the client was stopped while the call was being sent"))
            flight.land()
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the callers' to see
            for draft in drafts:
                _fail(draft, error)
            flight.land()
        else:
            waits = False
            for draft in drafts:
                if draft.waits:
                    waits = True
                elif not draft.answer.done():
                    draft.answer.set_result(None)
            if not waits:
                flight.land()

    def _landed(self, stream: _Stream) -> None:
        stream.unanswered -= 1
        if stream.waiting:
            # After those who were answered just now, who may have more to ask.
            self._pump_soon(stream)


def _fail(draft: Draft, error: BaseException) -> None:
    if not draft.answer.done():
        draft.answer.set_exception(error)
        # The caller may be gone: an exception that nobody fetches is not worth a log line.
        draft.answer.exception()
