"""One batch's way through a worker: claimed, run, and settled, postponed or handed back.

The runner holds the leases of what runs in this process. Whatever it asks of Redis it asks until
Redis answers: the batch is ours and stays in the ledger meanwhile, so nothing is lost by waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Sequence
from enum import Enum
from functools import partial
from typing import Any

from recallq.clock import FleetClock
from recallq.contract import AddJob, AnyBatch, BatchResult, DeleteJob, JobState, Operation, Scope
from recallq.dead_letters import of_job
from recallq.errors import JobError, to_wire
from recallq.keys import Keys
from recallq.redis_client import COMMAND_TIMEOUT, LOST
from recallq_worker.dead_letters import DeadLetters
from recallq_worker.insistence import insistently
from recallq_worker.ledger import RENEW_EVERY, Claim, NextRun, WorkerLedger
from recallq_worker.service import Left, MemoryService, Postponed
from recallq_worker.slow_lane import SlowLane
from recallq_worker.slow_ledger import SlowLedger

log = logging.getLogger(__name__)

_SUSPECTS_WAIT = 1.0
"""Seconds after which a suspicious batch asks again whether it may run here, or elsewhere."""
_NEWER_MAY_COME = 60.0
"""Seconds for which a batch that speaks a newer protocol stays away, at the most. It is the longer
the more often it was left, for thousands of them would keep old workers from all else; and it is
not always the same, so that the same worker does not meet the same batch again and again."""
_FAREWELL = 3.0
"""Seconds that handing a batch back may take when the process stops."""


class Settled(Enum):
    """How a run ended that left nothing open."""

    NOW = "now"
    """Its result is to be stored."""
    ELSEWHERE = "elsewhere"
    """It was answered before, or another worker runs it: there is nothing to do."""


class BatchRunner:
    """Runs the batches of one worker process."""

    def __init__(
        self,
        service: MemoryService,
        ledger: WorkerLedger,
        dead_letters: DeadLetters,
        keys: Keys,
        clock: FleetClock,
        slow_ledger: SlowLedger,
        slow_lane: SlowLane | None,
    ) -> None:
        """`slow_lane` is None in a process that takes no part in it."""
        self._service = service
        self._ledger = ledger
        self._dead_letters = dead_letters
        self._keys = keys
        self._clock = clock
        self._slow_ledger = slow_ledger
        self._slow_lane = slow_lane
        self._held: set[str] = set()
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, batch: AnyBatch, result: BatchResult) -> Settled | Left:
        """Runs `batch`, entering outcomes into `result` as they come.

        After `Settled.NOW` the batch stays held until `done` is called: its result is not stored
        yet. After anything that is not `Settled` call `put_off`, once the outcomes there are have
        been stored.
        """
        if batch.id in self._held:
            return Settled.ELSEWHERE  # a second delivery of what runs here
        self._held.add(batch.id)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        kept = False
        try:
            claim = await insistently(lambda: self._ledger.claim(batch))
            if claim is None:
                log.info("batch %s runs elsewhere or was answered; not run again", batch.id)
                return Settled.ELSEWHERE
            if claim.deliveries > 1 and self._service.is_suspicious:
                # It would only take the place of others here while it waits.
                await insistently(lambda: self._ledger.release(batch.id, _SUSPECTS_WAIT))
                return Settled.ELSEWHERE
            if not claim.first:
                before = await insistently(lambda: self._ledger.answer(batch.id))
                if before is not None:
                    result.outcomes = before[0].outcomes
                    if before[1]:  # stored, and the worker died before it was struck off
                        kept = True
                        return Settled.NOW
            if not batch.operation.writes and batch.operation is not Operation.HEALTH:
                users = [self._keys.user_tag(*_owner(job.scope)) for job in batch.jobs]
                result.users, result.epochs = users, claim.epochs
            observer = _Observer(batch, claim, self._ledger, self._dead_letters, self._clock)
            left = await self._service.run(batch, claim, result, observer)
            if self._service.extracts and not claim.handed_over:
                await self._tell_refused(batch, result)
            if claim.deliveries > 1 and batch.operation.writes:
                await self._withdraw_letters(batch, result)
        except asyncio.CancelledError:
            # The process ends: another shall run the batch, at once.
            with contextlib.suppress(*LOST):
                async with asyncio.timeout(_FAREWELL):
                    await self._ledger.release(batch.id)
            raise
        except Exception:
            # Not settled, so not lost: the lease runs out, and the batch is run again.
            log.exception("a defect in running batch %s", batch.id)
            return Settled.ELSEWHERE
        else:
            kept = True
            return left or Settled.NOW
        finally:
            self._running.discard(task)
            if not kept:
                self._held.discard(batch.id)

    async def _tell_refused(self, batch: AnyBatch, result: BatchResult) -> None:
        """Says which writes will not come to the slow lane."""
        for job, outcome in zip(batch.jobs, result.outcomes, strict=True):
            if outcome is not None and isinstance(job, AddJob | DeleteJob):
                await insistently(partial(self._slow_ledger.refused, job))

    async def _withdraw_letters(self, batch: AnyBatch, result: BatchResult) -> None:
        """Removes the dead letters of jobs that have succeeded after all: the worker that wrote
        them died before it could say so."""
        for job, outcome in zip(batch.jobs, result.outcomes, strict=True):
            if outcome is not None and outcome.state in (JobState.STORED, JobState.SUCCEEDED):
                await insistently(partial(self._dead_letters.withdraw, job.id, job.scope))

    async def stop(self) -> None:
        """Hands back what still runs; what cannot be handed back in time is found by others."""
        running = list(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=_FAREWELL + 1)

    async def put_off(self, batch: AnyBatch, left: Left) -> None:
        """Ends a run of which jobs are left: to be tried again, or to the slow lane."""
        self._held.discard(batch.id)
        next_run = None if left.postponed is None else self._next_run(left.postponed)
        handed_over = left.handed_over
        if handed_over:
            await insistently(lambda: self._slow_ledger.park(batch, handed_over, next_run))
            if self._slow_lane is not None:
                self._slow_lane.look(min(each.pause for each in handed_over))
        elif next_run is not None:
            await insistently(lambda: self._ledger.postpone(batch.id, next_run))

    def _next_run(self, postponed: Postponed) -> NextRun:
        errors = {
            str(index): "{code}: {message}".format_map(to_wire(error))
            for index, error in postponed.errors.items()
        }
        return NextRun(
            postponed.delay, {"at": self._clock.now(), "errors": errors}, postponed.waiting
        )

    async def leave(self, batch_id: str, reason: str) -> bool:
        """Leaves a batch that cannot be read here to newer workers, after a while, for as long as
        there are none. False if the ledger knows nothing of it."""

        def delay(times: int) -> float:
            return random.uniform(0.5, 1.0) * min(4 * 2.0**times, _NEWER_MAY_COME)  # noqa: S311

        known = await insistently(lambda: self._ledger.leave(batch_id, delay))
        if known:
            log.warning(
                "batch %s is left to newer workers (%s); upgrade this one", batch_id, reason
            )
        return known

    def done(self, batch_id: str) -> None:
        """The batch's result is stored, or will never be."""
        self._held.discard(batch_id)

    async def keep_leases(self) -> None:
        """Renews the leases of what runs here, and passes on who is asked to stop; for ever."""
        while True:
            await asyncio.sleep(RENEW_EVERY)
            if not self._held:
                continue
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    told = await self._ledger.renew(list(self._held))
            except LOST as error:
                log.warning("cannot renew leases yet: %s", type(error).__name__)
                continue
            for batch_id, stop in told.items():
                if stop:
                    self._service.stop(batch_id, stop)


class _Observer:
    """What the service tells of one run, and where it is written."""

    def __init__(
        self,
        batch: AnyBatch,
        claim: Claim,
        ledger: WorkerLedger,
        dead_letters: DeadLetters,
        clock: FleetClock,
    ) -> None:
        self._batch = batch
        self._claim = claim
        self._ledger = ledger
        self._dead_letters = dead_letters
        self._clock = clock

    async def dead(
        self,
        index: int,
        error: JobError,
        attempts: int,
        history: Sequence[dict[str, Any]] | None = None,
    ) -> bool:
        if history is None and self._claim.attempts:
            runs = await insistently(lambda: self._ledger.history(self._batch.id))
            history = [
                {"at": each["at"], "error": each["errors"][str(index)]}
                for each in runs
                if str(index) in each["errors"]
            ]
        letter = of_job(
            self._batch.jobs[index],
            self._batch.operation,
            self._batch.lane,
            self._batch.backend,
            epoch=self._claim.epochs[index] if index < len(self._claim.epochs) else 0,
            error=to_wire(error),
            attempts=attempts,
            history=[*(history or ())],
            at=self._clock.now(),
        )
        return await insistently(lambda: self._dead_letters.keep(letter))

    async def forget(self, scope: Scope, before_epoch: int) -> None:
        await insistently(lambda: self._dead_letters.forget(scope, before_epoch))

    async def alone(self, index: int | None) -> None:
        await insistently(lambda: self._ledger.alone(self._batch.id, index))


def _owner(scope: Scope) -> tuple[str, str]:
    return scope.tenant, scope.user_id
