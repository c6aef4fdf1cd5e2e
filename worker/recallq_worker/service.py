"""The use cases: what a batch of jobs does to a memory backend. Knows nothing of Celery.

A batch's adds go to the backend together; its other jobs run side by side. Whatever happens to one
job becomes that job's outcome and nobody else's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from recallq.contract import (
    DEFAULT_SESSION,
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
    JobError,
    JobExpired,
    WrongBackend,
)
from recallq_worker.backends.base import MemoryStore, Record
from recallq_worker.ledger import Claim

log = logging.getLogger(__name__)

T = TypeVar("T")


class MemoryService:
    """Runs batches against one backend."""

    def __init__(
        self,
        store: MemoryStore,
        *,
        now: Callable[[], float],
        job_timeout: float,
        parallel_jobs: int,
    ) -> None:
        self._store = store
        self._now = now
        self._job_timeout = job_timeout
        self._parallel_jobs = parallel_jobs

    async def run(self, batch: AnyBatch, claim: Claim, result: BatchResult) -> None:
        """Runs `batch`, entering each outcome into `result` as soon as it is there."""
        result.operation = batch.operation
        result.outcomes = [None] * len(batch.jobs)
        runnable: list[int] = []
        for index, job in enumerate(batch.jobs):
            refusal = self._refusal(batch, index, job, claim)
            if refusal is None:
                runnable.append(index)
            else:
                result.outcomes[index] = refusal
        if isinstance(batch, AddBatch):
            await self._add_together(batch.jobs, runnable, claim, result)
        else:
            await self._each(batch.jobs, runnable, claim, result)

    def _refusal(self, batch: AnyBatch, index: int, job: Job, claim: Claim) -> Outcome | None:
        """Why a job is not run at all, if so."""
        if batch.backend is not None and batch.backend != self._store.name:
            return failed(
                WrongBackend(
                    f"the job asks for backend {batch.backend} and this worker runs "
                    f"{self._store.name}"
                )
            )
        if index in claim.cancelled:
            return cancelled()
        return self._lateness(job)

    def _lateness(self, job: Job) -> Outcome | None:
        late = self._now() - job.deadline if job.deadline is not None else 0.0
        if late <= 0:
            return None
        return failed(JobExpired(f"the job's deadline passed {late:.1f} s before it could begin"))

    # --- add ------------------------------------------------------------------------------------

    async def _add_together(
        self, jobs: Sequence[AddJob], runnable: list[int], claim: Claim, result: BatchResult
    ) -> None:
        """Stores all jobs' records in one call. If it fails, each job gets a call of its own: the
        records are the same, so those that were stored already are not stored twice."""
        records = {index: _records(jobs[index], _epoch(claim, index)) for index in runnable}
        everything = [record for each in records.values() for record in each]
        together: list[bool] | JobError = []
        if everything:
            together = await self._guarded(lambda: self._store.add(everything))
        if isinstance(together, JobError) and len(runnable) > 1:
            log.warning("a batch of adds failed (%s); adding job by job", type(together).__name__)
            await self._each(jobs, runnable, claim, result, begun=True)
            return
        start = 0
        for index in runnable:
            if isinstance(together, JobError):
                result.outcomes[index] = failed(together)
                continue
            mine = records[index]
            result.outcomes[index] = _added(mine, together[start : start + len(mine)])
            start += len(mine)

    # --- job by job -----------------------------------------------------------------------------

    async def _each(
        self,
        jobs: Sequence[AnyJob],
        runnable: list[int],
        claim: Claim,
        result: BatchResult,
        *,
        begun: bool = False,
    ) -> None:
        slots = asyncio.Semaphore(self._parallel_jobs)

        async def settle(index: int) -> None:
            async with slots:
                # It may have waited long for its turn. What was begun is past expiring.
                if not begun and (late := self._lateness(jobs[index])):
                    result.outcomes[index] = late
                    return
                done = await self._guarded(lambda: self._one(jobs[index], _epoch(claim, index)))
            result.outcomes[index] = failed(done) if isinstance(done, JobError) else done

        async with asyncio.TaskGroup() as group:
            for index in runnable:
                group.create_task(settle(index))

    async def _one(self, job: AnyJob, epoch: int) -> Outcome:
        match job:
            case AddJob():
                records = _records(job, epoch)
                return _added(records, await self._store.add(records))
            case SearchJob():
                hits = await self._store.search(
                    job.scope, job.query, top_k=job.top_k, score_threshold=job.score_threshold
                )
                return _succeeded(
                    {"hits": [{**_stored(hit.record), "score": hit.score} for hit in hits]}
                )
            case ListJob():
                page = await self._store.list(job.scope, offset=job.offset, limit=job.limit)
                return _succeeded({"records": [_stored(record) for record in page]})
            case DeleteJob():
                removed = await self._store.delete(job.scope, before_epoch=epoch)
                return _succeeded({"removed": removed})
            case _:
                return _succeeded((await self._store.health()).model_dump())

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
            return InternalError(f"a call in backend {self._store.name} was cancelled from within")
        except TimeoutError:
            return BackendUnavailable(
                f"{self._store.name} did not finish within {self._job_timeout:g} s"
            )
        except Exception as error:
            # Named, not quoted: what an unexpected error says may hold what users said.
            log.exception("unexpected error in backend %s", self._store.name)
            return InternalError(
                f"{type(error).__name__} in backend {self._store.name}; see the worker's log"
            )


def _epoch(claim: Claim, index: int) -> int:
    return claim.epochs[index] if index < len(claim.epochs) else 0


def _records(job: AddJob, epoch: int) -> list[Record]:
    session_id = job.scope.session_id or DEFAULT_SESSION
    scope = Scope(job.scope.tenant, job.scope.user_id, session_id)
    return [
        Record(job.record_id(index), scope, job.order, epoch, message)
        for index, message in enumerate(job.messages)
    ]


def _added(records: Sequence[Record], new: Sequence[bool]) -> Outcome:
    return _succeeded({"record_ids": [record.record_id for record in records], "added": sum(new)})


def _stored(record: Record) -> dict[str, Any]:
    """A record as `recallq.contract.StoredMessage` reads it."""
    return {
        "message": record.message,
        "record_id": record.record_id,
        "session_id": record.scope.session_id,
        "created_at": timestamp(record.order),
    }


def _succeeded(result: dict[str, Any]) -> Outcome:
    return Outcome.model_construct(state=JobState.SUCCEEDED, result=result, error=None)
