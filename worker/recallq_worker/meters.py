"""Who is told what becomes of jobs: metrics (`recallq_worker.metrics`) and the log.

A line about a job carries the fields ``job``, ``batch``, ``operation``, ``lane``, ``tenant``,
``user`` (a digest, see `recallq.tracing.user_digest`), and ``trace`` if it is traced. Jobs that end
or are put off are logged at level INFO, dead letters at level WARNING.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from recallq.contract import AnyBatch, Job, JobState, Lane, Operation, Outcome
from recallq.errors import JobError
from recallq.tracing import unharmed, user_digest

log = logging.getLogger("recallq_worker.jobs")


class Meter(Protocol):
    """Who counts, times or logs jobs."""

    def ran(
        self,
        batch: AnyBatch,
        ended: Mapping[int, Outcome],
        *,
        began: float,
        ends: float | Mapping[int, float],
    ) -> None:
        """A run is over. `ended` has the outcomes of the jobs that came to their end in it, and
        `ends` says when all or each did; times are on the coordination Redis's clock."""
        ...

    def put_off(self, operation: Operation, lane: Lane, job: Job, error: JobError) -> None:
        """A job failed in passing, and is to be tried again."""
        ...


class Meters:
    """Tells all who are to be told; what fails in them fails no job."""

    def __init__(self, meters: Sequence[Meter] = ()) -> None:
        self._meters = meters

    def __bool__(self) -> bool:
        return bool(self._meters)

    def ran(
        self,
        batch: AnyBatch,
        ended: Mapping[int, Outcome],
        *,
        began: float,
        ends: float | Mapping[int, float],
    ) -> None:
        for meter in self._meters:
            with unharmed("counting jobs"):
                meter.ran(batch, ended, began=began, ends=ends)

    def put_off(self, operation: Operation, lane: Lane, job: Job, error: JobError) -> None:
        for meter in self._meters:
            with unharmed("counting jobs"):
                meter.put_off(operation, lane, job, error)


class JobLog:
    """A `Meter` that writes a line for each."""

    @staticmethod
    def is_wanted() -> bool:
        """Whether anything would come of it."""
        return log.isEnabledFor(logging.INFO)

    def ran(
        self,
        batch: AnyBatch,
        ended: Mapping[int, Outcome],
        *,
        began: float,
        ends: float | Mapping[int, float],
    ) -> None:
        for index, outcome in ended.items():
            job = batch.jobs[index]
            end = ends if isinstance(ends, float) else ends[index]
            log.info(
                "job ended",
                extra={
                    **fields_of(batch.operation, batch.lane, job),
                    "batch": batch.id,
                    "state": outcome.state.value,
                    "error": None if outcome.error is None else outcome.error.get("code"),
                    "queued_seconds": round(max(began - job.submitted_at, 0.0), 6),
                    "run_seconds": round(max(end - began, 0.0), 6),
                },
            )

    def put_off(self, operation: Operation, lane: Lane, job: Job, error: JobError) -> None:
        log.info(
            "job put off for another attempt",
            extra={**fields_of(operation, lane, job), "error": error.code},
        )


def tell_of_dead_letter(batch: AnyBatch, index: int, error: JobError, attempts: int) -> None:
    """Whatever else is logged: somebody should look at it."""
    with unharmed("telling of a dead letter"):
        log.warning(
            "job became a dead letter",
            extra={
                **fields_of(batch.operation, batch.lane, batch.jobs[index]),
                "batch": batch.id,
                "state": JobState.DEAD.value,
                "error": error.code,
                "attempts": attempts,
            },
        )


def fields_of(operation: Operation, lane: Lane, job: Job) -> dict[str, Any]:
    """Which job it is, for ``extra=``."""
    return {
        "job": job.id,
        "operation": operation.value,
        "lane": lane.value,
        "tenant": job.scope.tenant,
        "user": user_digest(job.scope.tenant, job.scope.user_id),
        "trace": None if job.trace is None else job.trace[3:35],
    }
