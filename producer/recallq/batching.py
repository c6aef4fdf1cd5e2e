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
from functools import partial

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
    accepted: asyncio.Future[None]
    """Done once its batch is in the ledger and on the queue."""
    outcome: asyncio.Future[Outcome] | None
    """How it settled; cancelled when nobody waits any longer, None if nobody ever will."""
    early: bool = False
    """Whether its caller waits only until it is stored."""


Send = Callable[[Lane, Operation, list[Draft]], Awaitable[None]]


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
        """Queues `job`; with `wait`, the caller will wait for its outcome too, with `early` only
        until it is stored."""
        if self._closed:
            raise ClientClosed("the client was stopped")
        loop = asyncio.get_running_loop()
        outcome = loop.create_future() if wait else None
        draft = Draft(job, size, loop.time(), loop.create_future(), outcome, early)
        stream = self._streams.get((lane, operation))
        if stream is None:
            stream = self._streams[lane, operation] = _Stream(lane, operation)
        stream.waiting.append(draft)
        stream.size += size
        stream.records += job.weight
        if not stream.scheduled:
            # Not at once: what is called in the same turn of the loop shares the batch.
            stream.scheduled = True
            loop.call_soon(self._pump, stream)
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
        for drafts in sending.values():  # of tasks that were cancelled before their first step
            for draft in drafts:
                _fail(draft, ClientClosed("the client was stopped"))

    def _pump(self, stream: _Stream) -> None:
        """Sends what may leave, and sees to it that it is called again for the rest."""
        loop = asyncio.get_running_loop()
        linger = self._settings.batch_linger
        stream.scheduled = False
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None
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
                task.add_done_callback(partial(self._answered, stream))
        if stream.waiting and not self._closed:
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
            if not draft.accepted.cancelled():  # its caller gave up before it left
                drafts.append(draft)
                size += draft.size
                records += weight
        return drafts

    async def _dispatch(self, stream: _Stream, drafts: list[Draft]) -> None:
        try:
            await self._send(stream.lane, stream.operation, drafts)
        except asyncio.CancelledError:
            for draft in drafts:
                _fail(draft, ClientClosed("the client was stopped while the call was being sent"))
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the callers' to see
            for draft in drafts:
                _fail(draft, error)
        else:
            for draft in drafts:
                if not draft.accepted.done():
                    draft.accepted.set_result(None)
            outcomes = [draft.outcome for draft in drafts if draft.outcome is not None]
            if outcomes:
                await asyncio.wait(outcomes)

    def _answered(self, stream: _Stream, task: asyncio.Task[None]) -> None:
        """A batch is answered, or was refused: another may leave."""
        del self._sending[task]
        stream.unanswered -= 1
        if not self._closed:
            self._pump(stream)


def _fail(draft: Draft, error: BaseException) -> None:
    if not draft.accepted.done():
        draft.accepted.set_exception(error)
        # The caller may be gone: an exception that nobody fetches is not worth a log line.
        draft.accepted.exception()
