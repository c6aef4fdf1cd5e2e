"""The use cases: what a batch of jobs does to a memory backend. Knows nothing of Celery.

A batch's adds go to the backend together; its other jobs run side by side. Whatever happens to one
job becomes that job's outcome and nobody else's. Jobs that failed in a way that may pass are left
open, to be tried again with the batch's next run; those run one by one from then on, and a batch of
which a worker has died runs strictly one job at a time, so that the culprit is found.

What takes longer than a batch may wait goes to the slow lane: writes of a backend that extracts
memories, and the second step of adds that are stored and not yet searchable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import orjson

from recallq.contract import (
    AddBatch,
    AddJob,
    AnyBatch,
    AnyJob,
    BatchResult,
    DeleteJob,
    Job,
    JobState,
    ListJob,
    Outcome,
    Scope,
    SearchJob,
    cancelled,
    failed,
    timestamp,
)
from recallq.errors import (
    BackendUnavailable,
    InternalError,
    JobCancelled,
    JobError,
    JobExpired,
    WorkerLost,
    WrongBackend,
    from_wire,
)
from recallq.models import made
from recallq.tracing import JobSpans, Tracer
from recallq_worker.backends.base import (
    Added,
    MemoryExtractor,
    MemoryStore,
    Record,
    Submission,
    takes_second_step,
)
from recallq_worker.ledger import Claim, Waiting
from recallq_worker.meters import Meters, tell_of_dead_letter
from recallq_worker.retries import RetryPolicy
from recallq_worker.seclusion import Seclusion
from recallq_worker.slow_ledger import Handover

log = logging.getLogger(__name__)

T = TypeVar("T")

_DUE_TOGETHER = 0.1
"""Seconds by which a job may be tried again early, to be run together with others."""
_DEATHS = 3
"""Workers that a job may take with it, running alone, before it is given up: one may be chance, as
when a machine is shut down."""


@dataclass(frozen=True, slots=True)
class Postponed:
    """Jobs to be tried again."""

    delay: float
    """Seconds until the first of them is due."""
    errors: dict[int, JobError]
    """What those that ran ended with this time."""
    waiting: dict[int, Waiting]
    """All of them."""


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of a batch after a run: some of its jobs, or all."""

    postponed: Postponed | None = None
    handed_over: list[Handover] = field(default_factory=list)
    """Jobs for the slow lane."""


class Observer(Protocol):
    """Whom a run keeps informed."""

    async def dead(
        self,
        index: int,
        error: JobError,
        attempts: int,
        history: Sequence[dict[str, Any]] | None = None,
    ) -> bool:
        """A write has failed for good, after so many runs. Whether it is kept as a dead letter;
        awaited before the job counts as settled. `history` is what the slow lane knows of it."""
        ...

    async def forget(self, scope: Scope, before_epoch: int) -> None:
        """A delete begins: older dead letters of the scope go, and none come any more."""
        ...

    async def alone(self, index: int | None) -> None:
        """A job of a suspicious batch begins, with nothing else of the batch beside it; None when
        it has survived."""
        ...


@dataclass(slots=True)
class _Run:
    """A batch while it runs."""

    batch: AnyBatch
    claim: Claim
    result: BatchResult
    observer: Observer
    draw: float = field(default_factory=random.random)
    """Where in their intervals the waits of this run lie: its jobs are tried again together."""
    waiting: dict[int, Waiting] = field(default_factory=dict)
    """Jobs to be tried again."""
    errors: dict[int, JobError] = field(default_factory=dict)
    """What those that ran ended with."""
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    """Who runs a job at this moment. Several jobs may be in one task."""
    stopped: set[int] = field(default_factory=set)
    """Jobs that were asked to stop."""
    ends: dict[int, float] = field(default_factory=dict)
    """When jobs came to an end that did not do so together."""
    spans: JobSpans[int] | None = None
    """Of those that are traced."""

    def attempts(self, index: int) -> int:
        """How often a job was run before this run."""
        waiting = self.claim.waiting.get(index)
        return 0 if waiting is None else waiting.attempts

    def epoch(self, index: int) -> int:
        return self.claim.epochs[index] if index < len(self.claim.epochs) else 0


class MemoryService:
    """Runs batches against one backend."""

    def __init__(
        self,
        backend: MemoryStore | MemoryExtractor,
        *,
        now: Callable[[], float],
        job_timeout: float,
        parallel_jobs: int,
        retries: RetryPolicy,
        pause: float = 0.0,
        seclusion: Seclusion | None = None,
        meters: Meters | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`pause` in seconds: for how long an extraction waits for others to join it. `seclusion`
        is the process's own."""
        self._backend = backend
        self._extractor = backend if isinstance(backend, MemoryExtractor) else None
        # Adds come this far only where it is one.
        self._store = cast("MemoryStore", backend)
        self._indexes = takes_second_step(backend)
        self._pause = pause
        self._now = now
        self._job_timeout = job_timeout
        self._parallel_jobs = parallel_jobs
        self._retries = retries
        self._runs: dict[str, _Run] = {}
        self._seclusion = seclusion or Seclusion()
        self._meters = meters or Meters()
        self._tracer = tracer

    async def run(
        self, batch: AnyBatch, claim: Claim, result: BatchResult, observer: Observer
    ) -> Left | None:
        """Runs what is open of `batch`, entering each outcome into `result` as soon as it is there.

        Jobs that have settled in `result` already are not run again. Returns those that are to be
        tried again, which have no outcome, and those that are for the slow lane, which have none or
        are stored.
        """
        result.operation = batch.operation
        result.outcomes += [None] * (len(batch.jobs) - len(result.outcomes))
        run = _Run(batch, claim, result, observer)
        self._runs[batch.id] = run
        began = self._now()
        before = {} if claim.first or not self._meters else _settled(result)
        if self._tracer is not None:
            run.spans = self._begin_spans(self._tracer, run)
        interrupted = False
        try:
            if claim.handed_over:
                await self._collect(run)
            runnable, for_slow_lane = await self._open_jobs(run)
            if self._extractor is not None and batch.operation.writes:
                return await self._what_is_left(run, for_slow_lane + runnable)
            if claim.deliveries > 1:
                # The culprit may be in another such batch, or in the slow lane. Where that extracts
                # memories, callers would not wait for so long; and it is found there, too.
                reads_only = self._extractor is not None
                async with self._seclusion.ahead() if reads_only else self._seclusion.alone():
                    await self._one_at_a_time(run, runnable)
            elif isinstance(batch, AddBatch) and claim.attempts == 0:
                await self._add_together(run, batch.jobs, runnable)
            else:
                await self._each(run, runnable)
            return await self._what_is_left(run, for_slow_lane + self._stored_among(run, runnable))
        except asyncio.CancelledError:
            interrupted = True  # it is handed back, and what came of it so far is not stored
            raise
        except Exception:
            log.exception("a defect in running batch %s", batch.id)
            for index, outcome in enumerate(result.outcomes):
                if outcome is None or not outcome.state.settled:
                    await self._failed(run, index, InternalError("see the worker's log"))
            return None
        finally:
            self._runs.pop(batch.id, None)
            if self._meters and not interrupted:
                self._measure(run, began, before)
            if run.spans is not None:
                self._end_spans(run.spans, run, interrupted=interrupted)

    def _measure(self, run: _Run, began: float, before: Mapping[int, Outcome]) -> None:
        batch, ended, now = run.batch, _settled(run.result), self._now()
        for index in before:
            del ended[index]
        ends = {index: run.ends.get(index, now) for index in ended} if run.ends else now
        self._meters.ran(batch, ended, began=began, ends=ends)
        for index, error in run.errors.items():
            self._meters.put_off(batch.operation, batch.lane, batch.jobs[index], error)

    def _begin_spans(self, tracer: Tracer, run: _Run) -> JobSpans[int] | None:
        batch, outcomes = run.batch, run.result.outcomes
        open_jobs = {
            index: job
            for index, job in enumerate(batch.jobs)
            if job.trace is not None
            and not ((outcome := outcomes[index]) is not None and outcome.state.settled)
        }
        more = {
            "recallq.batch": batch.id,
            "recallq.batch_jobs": len(batch.jobs),
            "recallq.delivery": run.claim.deliveries,
        }
        return tracer.running(f"recallq.run {batch.operation.value}", open_jobs, more)

    def _end_spans(self, spans: JobSpans[int], run: _Run, *, interrupted: bool) -> None:
        if interrupted:
            return spans.over("interrupted")
        for index, outcome in _settled(run.result).items():
            code = None if outcome.error is None else str(outcome.error.get("code"))
            spans.ended(index, outcome.state.value, code)
        for index, error in run.errors.items():
            spans.ended(index, "put_off", error.code)
        for index in run.waiting:
            spans.ended(index, "put_off")
        return spans.over("to_the_slow_lane")

    async def _open_jobs(self, run: _Run) -> tuple[list[int], list[int]]:
        """Those to be run now, and those for the slow lane, of which only that lane can say what
        comes. Answers those that are not run at all."""
        runnable: list[int] = []
        for_slow_lane: list[int] = []
        for index, job in enumerate(run.batch.jobs):
            outcome = run.result.outcomes[index]
            if outcome is not None and outcome.state.settled:
                continue
            if outcome is not None and not self._indexes and self._extractor is None:
                # The store was set up otherwise before, and finds what it keeps as it is.
                outcome.state = JobState.SUCCEEDED
                continue
            if outcome is not None or (run.claim.handed_over and self._extractor is not None):
                for_slow_lane.append(index)
                continue
            if index not in run.claim.begun and await self._refused(run, index, job):
                continue
            waiting = run.claim.waiting.get(index)
            if waiting is not None and waiting.due > self._now() + _DUE_TOGETHER:
                run.waiting[index] = waiting
            else:
                runnable.append(index)
        return runnable, for_slow_lane

    def stop(self, batch_id: str, indexes: Iterable[int]) -> None:
        """Asks jobs that run to stop. One that is being stored together with others, which go on,
        is not torn out."""
        run = self._runs.get(batch_id)
        if run is None:
            return
        asked = set(indexes) - run.stopped
        run.stopped |= asked
        for task in {run.tasks[index] for index in asked if index in run.tasks}:
            if all(index in run.stopped for index, each in run.tasks.items() if each is task):
                task.cancel()

    # --- by way of the slow lane ----------------------------------------------------------------

    async def _hand_over(self, run: _Run, indexes: list[int]) -> list[Handover]:
        """Leaves writes to the slow lane."""
        handed_over = []
        for index in indexes:
            job, epoch = run.batch.jobs[index], run.epoch(index)
            assert isinstance(job, AddJob | DeleteJob)  # the others do not write
            if isinstance(job, DeleteJob):
                await run.observer.forget(job.scope, epoch)
            outcome = run.result.outcomes[index]
            handed_over.append(
                Handover(
                    index,
                    job,
                    epoch,
                    self._pause_of(job, epoch),
                    stored=None if outcome is None else outcome.result,
                    again=run.claim.handed_over,
                )
            )
        return handed_over

    @staticmethod
    def _stored_among(run: _Run, indexes: list[int]) -> list[int]:
        """Those that are stored and not yet searchable."""
        found = []
        for index in indexes:
            outcome = run.result.outcomes[index]
            if outcome is not None and outcome.state is JobState.STORED:
                found.append(index)
        return found

    def _pause_of(self, job: AddJob | DeleteJob, epoch: int) -> float:
        if isinstance(job, DeleteJob) or self._extractor is None:
            return 0.0
        try:
            return self._pause if self._extractor.tokens(Submission.of(job, epoch)) else 0.0
        except Exception:
            log.exception("unexpected error in backend %s", self._extractor.name)
            return 0.0  # extracting it will show what is wrong with it

    async def _collect(self, run: _Run) -> None:
        """Enters what came of jobs in the slow lane."""
        for index, answer in run.claim.answers.items():
            before = run.result.outcomes[index]
            if before is not None and before.state.settled:
                continue
            found = orjson.loads(answer)
            if "error" not in found:
                run.result.outcomes[index] = _succeeded(found["result"])
                continue
            error = from_wire(found["error"], job_id=run.batch.jobs[index].id)
            await self._failed(run, index, error, found)

    async def _refused(self, run: _Run, index: int, job: Job) -> bool:
        """Whether a job is not run at all; then it has its outcome."""
        batch, claim = run.batch, run.claim
        if index in claim.cancelled:
            run.result.outcomes[index] = cancelled()
            return True
        error: JobError | None = None
        if batch.backend is not None and batch.backend != self._backend.name:
            error = WrongBackend(
                f"the job asks for backend {batch.backend} and this worker runs "
                f"{self._backend.name}"
            )
        elif claim.deaths.get(index, 0) >= _DEATHS:
            error = WorkerLost(
                f"{claim.deaths[index]} workers died while they ran this job and nothing else of "
                "its batch"
            )
        elif not self._may_be_stored(job, claim):
            error = self._lateness(job, first=claim.first)
        if error is not None:
            await self._failed(run, index, error)
        return error is not None

    def _may_be_stored(self, job: Job, claim: Claim) -> bool:
        """Whether a worker may have died after it stored an add, that nobody has yet made
        searchable: it must not end here."""
        return self._indexes and isinstance(job, AddJob) and claim.deliveries > 1

    @property
    def extracts(self) -> bool:
        """Whether adds go through the slow lane."""
        return self._extractor is not None

    @property
    def is_suspicious(self) -> bool:
        """Whether something runs here of which a worker has died; nothing else of the kind is run
        beside it."""
        return self._seclusion.claimed

    def _lateness(self, job: Job, *, first: bool = True) -> JobExpired | None:
        late = self._now() - job.deadline if job.deadline is not None else 0.0
        if late <= 0:
            return None
        what = "begin" if first else "be run again; a part of it may be done"
        return JobExpired(f"the job's deadline passed {late:.1f} s before it could {what}")

    async def _failed(
        self,
        run: _Run,
        index: int,
        error: JobError,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """A job failed for good. `told` is what the slow lane says: after how many attempts, and
        what it came to before."""
        told = told or {}
        outcome = failed(error)
        outcome.result = told.get("stored")
        attempts = told.get("attempts") or run.attempts(index) + run.claim.deliveries
        if (
            outcome.state is JobState.FAILED
            and run.batch.operation.writes
            and await run.observer.dead(index, error, attempts, told.get("history"))
        ):
            outcome.state = JobState.DEAD
            tell_of_dead_letter(run.batch, index, error, attempts)
        run.result.outcomes[index] = outcome

    async def _settle(self, run: _Run, index: int, done: Outcome | JobError) -> None:
        """A job came to an end, which may not be its last."""
        if not isinstance(done, JobError):
            run.result.outcomes[index] = done
            return
        wait = self._wait(run, index, done)
        if wait is None:
            await self._failed(run, index, done)
        else:
            run.waiting[index] = Waiting(self._now() + wait, run.attempts(index) + 1)
            run.errors[index] = done

    def _wait(self, run: _Run, index: int, error: JobError) -> float | None:
        deadline = run.batch.jobs[index].deadline
        left = None if deadline is None else deadline - self._now()
        return self._retries.wait(error, run.attempts(index) + 1, left=left, draw=run.draw)

    async def _what_is_left(self, run: _Run, for_slow_lane: list[int]) -> Left | None:
        """The jobs that have not settled: those to be tried again, and when the first may be, and
        those for the slow lane."""
        handed_over = await self._hand_over(run, for_slow_lane)
        postponed = None
        if run.waiting:
            first = min(each.due for each in run.waiting.values())
            postponed = Postponed(max(first - self._now(), 0.0), run.errors, run.waiting)
        return Left(postponed, handed_over) if postponed or handed_over else None

    # --- together -------------------------------------------------------------------------------

    async def _add_together(self, run: _Run, jobs: Sequence[AddJob], runnable: list[int]) -> None:
        """Stores all jobs' records in one call. If it fails and that will not pass, each job gets a
        call of its own: the records are the same, so those that were stored already are not stored
        twice."""
        records = {
            index: Submission.of(jobs[index], run.epoch(index)).records() for index in runnable
        }
        everything = [record for each in records.values() for record in each]
        together: list[Added] | JobError = []
        if everything:
            together = await self._watched(
                run, runnable, lambda: self._guarded(lambda: self._store.add(everything))
            )
        if isinstance(together, JobError):
            # Those that would end with this error are given a chance of their own: it may be due to
            # another. The others have time.
            last = [index for index in runnable if self._wait(run, index, together) is None]
            if len(runnable) > 1 and last:
                log.warning("adds failed together (%s); adding job by job", type(together).__name__)
                await self._each(run, last, begun=True)
            else:
                last = []
            for index in set(runnable).difference(last):
                await self._settle(run, index, together)
            return
        start = 0
        for index in runnable:
            mine = records[index]
            added = together[start : start + len(mine)]
            run.result.outcomes[index] = self._added(jobs[index], mine, added)
            start += len(mine)

    # --- job by job -----------------------------------------------------------------------------

    async def _each(self, run: _Run, runnable: list[int], *, begun: bool = False) -> None:
        """Runs jobs side by side."""
        most = self._parallel_jobs
        # For those who would wait for their turn. It is not free.
        slots = asyncio.Semaphore(most) if len(runnable) > most else contextlib.nullcontext()

        async def settle(index: int) -> None:
            async with slots:
                # It may have waited long for its turn. What was begun is past expiring.
                late = None if begun else self._lateness(run.batch.jobs[index])
                done = late or await self._run_one(run, index)
            if self._meters:
                run.ends[index] = self._now()
            await self._settle(run, index, done)

        async with asyncio.TaskGroup() as group:
            for index in runnable:
                group.create_task(settle(index))

    async def _one_at_a_time(self, run: _Run, runnable: list[int]) -> None:
        """Runs jobs one after the other, leaving word of which one it is."""
        log.warning("batch %s is run again, one job at a time", run.batch.id)
        for index in runnable:
            late = None
            if not self._may_be_stored(run.batch.jobs[index], run.claim):
                late = self._lateness(run.batch.jobs[index], first=False)
            if late is None:
                await run.observer.alone(index)
            await self._settle(run, index, late or await self._run_one(run, index))
        if runnable:
            await run.observer.alone(None)

    async def _run_one(self, run: _Run, index: int) -> Outcome | JobError:
        job, epoch = run.batch.jobs[index], run.epoch(index)
        if index in run.stopped:
            return cancelled()
        return await self._watched(
            run, [index], lambda: self._guarded(lambda: self._one(run, job, epoch))
        )

    async def _watched(
        self, run: _Run, indexes: list[int], work: Callable[[], Awaitable[T | JobError]]
    ) -> T | JobError:
        """Does `work` for jobs in such a way that `stop` reaches it."""
        task = asyncio.current_task()
        assert task is not None
        run.tasks |= dict.fromkeys(indexes, task)
        try:
            if run.spans is None:
                return await work()
            name = f"{self._backend.name}.{run.batch.operation.value}"
            with run.spans.calling(name, indexes) as span:
                done = await work()
                if span is not None and isinstance(done, JobError):
                    span.failed(done.code)
                return done
        except asyncio.CancelledError:
            if task.cancelling() != 1 or not run.stopped.issuperset(indexes):
                raise  # it is the whole worker that is to stop
            task.uncancel()
            return JobCancelled("the job was stopped while it ran; a part of it may be done")
        finally:
            for index in indexes:
                del run.tasks[index]

    async def _one(self, run: _Run, job: AnyJob, epoch: int) -> Outcome:
        match job:
            case AddJob():
                records = Submission.of(job, epoch).records()
                return self._added(job, records, await self._store.add(records))
            case SearchJob():
                hits = await self._backend.search(
                    job.scope, job.query, top_k=job.top_k, score_threshold=job.score_threshold
                )
                return _succeeded(
                    {"hits": [{**_stored(hit.record), "score": hit.score} for hit in hits]}
                )
            case ListJob():
                page = await self._backend.list(job.scope, offset=job.offset, limit=job.limit)
                return _succeeded({"records": [_stored(record) for record in page]})
            case DeleteJob():
                await run.observer.forget(job.scope, epoch)
                removed = await self._backend.delete(job.scope, before_epoch=epoch)
                return _succeeded({"removed": removed})
            case _:
                return _succeeded((await self._backend.health()).model_dump())

    async def _guarded(self, work: Callable[[], Awaitable[T]]) -> T | JobError:
        """What `work` returns, or the error that its job ends with."""
        try:
            async with asyncio.timeout(self._job_timeout):
                return await work()
        except JobError as error:
            return error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # it is we who are to stop
            return InternalError(
                f"a call in backend {self._backend.name} was cancelled from within"
            )
        except TimeoutError:
            return BackendUnavailable(
                f"{self._backend.name} did not finish within {self._job_timeout:g} s"
            )
        except Exception as error:
            # Named, not quoted: what an unexpected error says may hold what users said.
            log.exception("unexpected error in backend %s", self._backend.name)
            return InternalError(
                f"{type(error).__name__} in backend {self._backend.name}; see the worker's log"
            )

    def _added(self, job: AddJob, records: Sequence[Record], added: Sequence[Added]) -> Outcome:
        count = added.count(Added.NEW)
        if job.idempotency_key is None and job.origin is None:
            # The ids are the job's own: it was this job that stored them, when it ran before.
            count += added.count(Added.KNOWN)
        outcome = _succeeded({"record_ids": [each.record_id for each in records], "added": count})
        if self._indexes:
            outcome.state = JobState.STORED
        return outcome


def _settled(result: BatchResult) -> dict[int, Outcome]:
    """The jobs that have come to their end."""
    return {
        index: outcome
        for index, outcome in enumerate(result.outcomes)
        if outcome is not None and outcome.state.settled
    }


def _stored(record: Record) -> dict[str, Any]:
    """A record as `recallq.contract.StoredMessage` reads it."""
    return {
        "message": record.message,
        "record_id": record.record_id,
        "session_id": record.scope.session_id,
        "created_at": timestamp(record.order),
    }


def _succeeded(result: dict[str, Any]) -> Outcome:
    return made(Outcome, state=JobState.SUCCEEDED, result=result, error=None, operation=None)
