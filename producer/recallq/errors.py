"""Every error RecallQ raises, on both sides of the queue.

    RecallQError
    ├── InvalidInput (ValueError)             the call itself is wrong; nothing was enqueued
    ├── ConfigurationError                    settings that cannot work
    │   └── MissingExtra                      an optional dependency is not installed
    ├── ServiceUnavailable (ConnectionError)  Redis cannot be reached
    │   └── AccessDenied                      it refuses the user, or what the user asks for
    ├── QueueFull                             the lane is at its high-water mark; try again later
    ├── ClientClosed                          the client was stopped, or never started
    ├── UnknownJob (LookupError)              no such job, or its result has expired
    └── JobError                              what became of one job
        ├── JobTimeout (TimeoutError)         no answer within the caller's timeout
        ├── JobExpired                        its deadline passed before a worker began it
        ├── JobCancelled                      cancelled before a worker began it, or stopped
        ├── ResultWithdrawn                   a read's answer from before a deletion
        └── JobFailed                         a worker ran it and it failed
            ├── BackendError                  the memory backend refused it; a retry would not help
            ├── BackendUnavailable            the memory backend cannot be reached or is overloaded
            ├── WrongBackend                  the worker runs another backend than the job asked for
            ├── UndecodableJob                the worker could not read the message
            ├── WorkerLost                    whichever worker ran it died of it
            └── InternalError                 a defect in RecallQ itself

Errors cross the wire as ``{"code", "message", ...}``: `to_wire` and `from_wire` are the only
places that know how. A code this version does not know becomes a plain `JobFailed`, so an old
client can talk to a newer worker.
"""

from __future__ import annotations

from typing import Any, ClassVar


class RecallQError(Exception):
    """Base of everything RecallQ raises on purpose."""


class InvalidInput(RecallQError, ValueError):
    """The call is wrong as it stands; says what is wrong and what to do. Nothing was enqueued."""


class ConfigurationError(RecallQError):
    """Settings that cannot work together, or name something that does not exist."""


class MissingExtra(ConfigurationError):
    """A backend or command needs an optional dependency that is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(what, extra)
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.args[0]} needs an extra: pip install 'recallq[{self.extra}]'"


class ServiceUnavailable(RecallQError, ConnectionError):
    """Redis (broker, coordination or result backend) cannot be reached, or what an import reads."""


class AccessDenied(ServiceUnavailable):
    """Redis refuses the credentials, or the user lacks a right, as the message says. To try again
    does not help."""


class QueueFull(RecallQError):
    """The lane holds as many outstanding jobs as its high-water mark allows.

    `retry_after` is in seconds. Nothing of the refused call was enqueued.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ClientClosed(RecallQError):
    """The client is not started, or was stopped while the call was pending."""


class UnknownJob(RecallQError, LookupError):
    """No job has this id, or it settled so long ago that its result has expired."""


class JobError(RecallQError):
    """What became of one job. `job_id` is None where the job never got one."""

    code: ClassVar[str] = "job_error"

    def __init__(self, message: str, *, job_id: str | None = None) -> None:
        super().__init__(message)
        self.job_id = job_id


class JobTimeout(JobError, TimeoutError):
    """No answer within the caller's timeout.

    The job's deadline has passed with it, so a worker that has not begun it never will; one that
    had begun may still finish it. `MemoryClient.handle(job_id)` tells.
    """

    code = "timeout"


class JobExpired(JobError):
    """The job's deadline passed before a worker began it; it was not run."""

    code = "expired"


class JobCancelled(JobError):
    """The job was cancelled before a worker began it, or stopped while one ran it: the message says
    which. What a stopped job had done already stays done."""

    code = "cancelled"


class ResultWithdrawn(JobError):
    """Memories of the user were deleted after the read was submitted, so its stored answer is not
    shown any more; ask again."""

    code = "withdrawn"


class JobFailed(JobError):
    """A worker ran the job and it failed."""

    code = "failed"


class BackendError(JobFailed):
    """The memory backend refused the job for good; the same call would fail again."""

    code = "backend_error"


class BackendUnavailable(JobFailed):
    """The memory backend cannot be reached, timed out or is overloaded; a later call may succeed.

    `retry_after` is in seconds, where the backend named a time.
    """

    code = "backend_unavailable"

    def __init__(
        self, message: str, *, job_id: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message, job_id=job_id)
        self.retry_after = retry_after


class WrongBackend(JobFailed):
    """The client asked for one backend and the worker that took the job runs another."""

    code = "wrong_backend"


class UndecodableJob(JobFailed):
    """The worker could not read the message; it is kept among the dead letters."""

    code = "undecodable"


class WorkerLost(JobFailed):
    """Each worker that ran the job died while it did, so it is not run again by itself."""

    code = "worker_lost"


class InternalError(JobFailed):
    """A defect in RecallQ: the worker met an error that nothing there expects."""

    code = "internal"


_BY_CODE: dict[str, type[JobError]] = {
    cls.code: cls
    for cls in (
        JobError,
        JobTimeout,
        JobExpired,
        JobCancelled,
        ResultWithdrawn,
        JobFailed,
        BackendError,
        BackendUnavailable,
        WrongBackend,
        UndecodableJob,
        WorkerLost,
        InternalError,
    )
}


def to_wire(error: JobError) -> dict[str, Any]:
    """The JSON object that carries `error` from worker to client."""
    # A library's error may quote bytes that are no text.
    message = str(error).encode(errors="backslashreplace").decode()
    wire: dict[str, Any] = {"code": error.code, "message": message}
    if isinstance(error, BackendUnavailable) and error.retry_after is not None:
        wire["retry_after"] = error.retry_after
    return wire


def from_wire(wire: dict[str, Any], *, job_id: str | None) -> JobError:
    """The error that `to_wire` described; an unknown code becomes a plain `JobFailed`."""
    code = wire.get("code")
    cls = _BY_CODE.get(code, JobFailed) if isinstance(code, str) else JobFailed
    message = str(wire.get("message", "the job failed"))
    if cls is BackendUnavailable:
        after = wire.get("retry_after")
        known = isinstance(after, (int, float)) and not isinstance(after, bool)
        return BackendUnavailable(message, job_id=job_id, retry_after=after if known else None)
    return cls(message, job_id=job_id)
