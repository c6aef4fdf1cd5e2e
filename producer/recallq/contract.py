"""What producers and workers agree on: jobs, batches, results, queue and task names.

A Celery message carries one `Batch`: 1..N jobs of one operation and one lane. Its single argument
is the batch as a JSON string, which the producer writes with `encode_batch` and the worker reads
with `decode_batch`; its result is a `BatchResult`, one outcome per job in the same order. Both
sides check `PROTOCOL_VERSION`, so that a change of shape cannot be misread.

Job ids are ``<client>-<batch>-<index>``: whoever holds one can find the batch, its result and the
client that sent it without asking anybody.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, Self, TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from recallq.errors import (
    JobCancelled,
    JobError,
    JobExpired,
    ResultWithdrawn,
    UndecodableJob,
    UnknownJob,
    to_wire,
)

PROTOCOL_VERSION = 1
"""What clients write, in every batch. A worker leaves a batch of a newer version to newer workers,
so workers are upgraded before clients."""
OLDEST_PROTOCOL = 1
"""The oldest that workers still read. They answer as they were asked."""

DEFAULT_NAMESPACE = "recallq"
DEFAULT_TENANT = "default"
DEFAULT_SESSION = "default"


class Operation(StrEnum):
    """What a job does; one Celery task each."""

    ADD = "add"
    SEARCH = "search"
    LIST = "list"
    DELETE = "delete"
    HEALTH = "health"

    @property
    def task_name(self) -> str:
        return f"recallq.{self.value}"

    @property
    def writes(self) -> bool:
        """Whether a job of it that fails is worth keeping."""
        return self in (Operation.ADD, Operation.DELETE)


class Lane(StrEnum):
    """A queue with a purpose."""

    LIVE = "live"
    """Interactive work: an agent waits for it."""
    BULK = "bulk"
    """Ingestion."""
    SLOW = "slow"
    """LLM extraction and other work of seconds."""

    def queue(self, namespace: str = DEFAULT_NAMESPACE) -> str:
        """The Celery queue's name."""
        return f"{namespace}.{self.value}"


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose memory: `session_id` None means every session of the user."""

    tenant: str
    user_id: str
    session_id: str | None = None


# --- jobs ---------------------------------------------------------------------------------------


_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def _traceparent(value: object) -> str | None:
    return value if isinstance(value, str) and _TRACEPARENT.fullmatch(value) else None


class Job(BaseModel):
    """One call. Times are seconds since the epoch on the coordination Redis's clock."""

    model_config = ConfigDict(extra="ignore")

    id: str = ""
    """Empty until the job joins a batch."""
    scope: Scope
    submitted_at: float
    deadline: float | None = None
    """Not begun after this moment."""
    trace: Annotated[str | None, BeforeValidator(_traceparent)] = None
    """Of the span of the call that made it, if it is traced: a W3C ``traceparent``. What is none is
    left out: no job fails for it."""

    @property
    def weight(self) -> int:
        """How many records its result may hold: what bounds a batch besides jobs and bytes."""
        return 1


class AddJob(Job):
    messages: list[dict[str, Any]]
    """JSON objects. The producer holds them already encoded, as `orjson.Fragment`."""
    order: int = Field(ge=0, lt=2**53)
    """Order key: microseconds on the shared clock at submission, unique within a producer."""
    idempotency_key: str | None = None
    origin: str | None = None
    """Of a dead letter's replay: the job that died. What it had stored is not stored again."""
    infer: bool | None = None
    """Of backends that extract memories: whether an LLM does, or the messages themselves are
    stored. None leaves it to the backend's settings."""

    @property
    def again(self) -> str | None:
        """What is the same for a job and another that submits the same add once more; None if
        nothing can."""
        if self.idempotency_key is not None:
            return f"k{key_digest(self.scope, self.idempotency_key)}"
        return self.origin

    def record_ids(self) -> list[str]:
        """The id of the record that holds each message: the same however often the job runs.

        They sort by index, so (order key, record id) orders a session's messages.
        """
        prefix = self.again or self.id
        return [f"{prefix}-{index:05x}" for index in range(len(self.messages))]


class SearchJob(Job):
    query: str
    top_k: int = Field(ge=1)
    score_threshold: float | None = None

    @property
    def weight(self) -> int:
        return self.top_k


class ListJob(Job):
    offset: int = Field(ge=0)
    limit: int = Field(ge=1)

    @property
    def weight(self) -> int:
        return self.limit


class DeleteJob(Job):
    idempotency_key: str | None = None
    """Used once more, it removes nothing that was submitted after its first use."""


class HealthJob(Job):
    pass


def key_digest(scope: Scope, idempotency_key: str) -> str:
    """What stands for a key in a scope: keys of different scopes never meet."""
    digest = hashlib.sha256()
    for part in (scope.tenant, scope.user_id, scope.session_id or DEFAULT_SESSION, idempotency_key):
        encoded = part.encode()
        digest.update(b"%d:%b" % (len(encoded), encoded))
    return digest.hexdigest()[:32]


AnyJob: TypeAlias = AddJob | SearchJob | ListJob | DeleteJob | HealthJob
J = TypeVar("J", bound=Job)


class Batch(BaseModel, Generic[J]):
    """The jobs of one Celery message; its id is the Celery task id."""

    v: int = PROTOCOL_VERSION
    id: str
    lane: Lane
    operation: Operation
    backend: str | None = None
    """The backend the client insists on; None takes whatever the worker runs."""
    listed: bool = False
    """Whether the batch was entered in the ledger, as clients do and plain Celery does not."""
    jobs: list[J]


class AddBatch(Batch[AddJob]):
    operation: Literal[Operation.ADD] = Operation.ADD


class SearchBatch(Batch[SearchJob]):
    operation: Literal[Operation.SEARCH] = Operation.SEARCH


class ListBatch(Batch[ListJob]):
    operation: Literal[Operation.LIST] = Operation.LIST


class DeleteBatch(Batch[DeleteJob]):
    operation: Literal[Operation.DELETE] = Operation.DELETE


class HealthBatch(Batch[HealthJob]):
    operation: Literal[Operation.HEALTH] = Operation.HEALTH


AnyBatch: TypeAlias = AddBatch | SearchBatch | ListBatch | DeleteBatch | HealthBatch

_BATCHES: dict[Operation, type[Batch[Any]]] = {
    Operation.ADD: AddBatch,
    Operation.SEARCH: SearchBatch,
    Operation.LIST: ListBatch,
    Operation.DELETE: DeleteBatch,
    Operation.HEALTH: HealthBatch,
}
_batch_adapter: TypeAdapter[AnyBatch] = TypeAdapter(
    Annotated[AnyBatch, Field(discriminator="operation")]
)


def make_batch(
    batch_id: str, lane: Lane, operation: Operation, jobs: list[AnyJob], backend: str | None
) -> Batch[Any]:
    """A batch of validated jobs, which get their ids here."""
    for index, job in enumerate(jobs):
        job.id = f"{batch_id}-{index}"
    return _BATCHES[operation].model_construct(
        v=PROTOCOL_VERSION,
        id=batch_id,
        lane=lane,
        operation=operation,
        backend=backend,
        listed=True,
        jobs=jobs,
    )


def fields_of(value: Any) -> dict[str, Any]:
    """For ``orjson.dumps(default=)``: a model as the dictionary of its fields.

    orjson calls it for the models of a batch or a result and writes what they hold itself, which
    copies nothing, unlike ``model_dump``.
    """
    if isinstance(value, BaseModel):
        return value.__dict__
    raise TypeError(f"{type(value).__name__} cannot be sent")


def encode_batch(batch: Batch[Any]) -> str:
    """The JSON string that the Celery message carries. Messages in it are encoded only once."""
    jobs = [job.__dict__ for job in batch.jobs]
    return orjson.dumps({**batch.__dict__, "jobs": jobs}).decode()


class NewerProtocol(UndecodableJob):
    """The batch speaks a newer version of the protocol, so a newer worker may be able to read it:
    it is left to those, and no caller sees this."""


def decode_batch(payload: object) -> AnyBatch:
    """The batch in a Celery message's argument. Raises `UndecodableJob`, saying why, and
    `NewerProtocol` if a newer worker may be able to read it."""
    if not isinstance(payload, str):
        raise UndecodableJob(f"expected a JSON string, got {type(payload).__name__}")
    try:
        batch = _batch_adapter.validate_json(payload)
    except ValidationError as error:
        _check_version(_version_of(payload))  # a newer shape fails validation for that reason
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        # Of what came, nothing is quoted: this goes into logs.
        reason = "no such operation" if problem["type"] == "union_tag_invalid" else problem["msg"]
        raise UndecodableJob(f"{place or 'batch'}: {reason}") from error
    _check_version(batch.v)
    for index, job in enumerate(batch.jobs):
        # Whatever the sender wrote: record ids derive from it, and two jobs must not share them.
        job.id = f"{batch.id}-{index}"
    return batch


def speaks_newer(payload: object) -> bool:
    """Whether a Celery message's argument is a batch that only a newer worker can read."""
    version = _version_of(payload) if isinstance(payload, str) else None
    return isinstance(version, int) and version > PROTOCOL_VERSION


def _version_of(payload: str) -> object:
    try:
        return orjson.loads(payload)["v"]
    except (ValueError, TypeError, KeyError):
        return PROTOCOL_VERSION  # not even JSON: the validation error says it better


def _check_version(version: object) -> None:
    if isinstance(version, int) and OLDEST_PROTOCOL <= version <= PROTOCOL_VERSION:
        return
    spoken = f"{PROTOCOL_VERSION}"
    if OLDEST_PROTOCOL < PROTOCOL_VERSION:
        spoken = f"{OLDEST_PROTOCOL} to {PROTOCOL_VERSION}"
    kind = UndecodableJob
    if isinstance(version, int) and version > PROTOCOL_VERSION:
        kind = NewerProtocol
    told = version if isinstance(version, int | float) else f"of type {type(version).__name__}"
    raise kind(f"protocol version {told}; this worker speaks {spoken}")


# --- ids ----------------------------------------------------------------------------------------

_JOB_ID = re.compile(r"(?P<batch>(?P<client>[0-9a-f]{16})-[0-9a-f]{1,16})-(?P<index>[0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class JobRef:
    """A job id, taken apart."""

    client_id: str
    batch_id: str
    index: int

    @classmethod
    def parse(cls, job_id: str) -> Self:
        """Raises `UnknownJob` for what was never a job id."""
        match = _JOB_ID.fullmatch(job_id) if isinstance(job_id, str) else None
        if match is None:
            raise UnknownJob(f"{job_id!r} is not a job id")
        return cls(match["client"], match["batch"], int(match["index"]))


def client_of(batch_id: str) -> str:
    """The id of the client that sent a batch."""
    return batch_id.partition("-")[0]


# --- results ------------------------------------------------------------------------------------


Wait: TypeAlias = Literal["stored", "searchable"]
"""What an add is waited for: that its messages are kept, or that searches find them as well. Only
backends that take a second step for that, such as embedding them, tell the two apart."""


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    STORED = "stored"
    """An add whose messages are kept and listed; searches do not find them all yet."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """A read that failed: there is nothing to keep of it."""
    DEAD = "dead"
    """A write that failed for good: it is kept as a dead letter."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    settled: bool
    """Whether a job has come to its end. Asked for each job several times, so it is no property."""


for _state in JobState:
    _state.settled = _state not in (JobState.QUEUED, JobState.RUNNING, JobState.STORED)


class StoredMessage(BaseModel):
    """A message as a backend holds it. On the wire and in the worker it is a JSON object."""

    message: Any
    record_id: str
    session_id: str
    created_at: datetime
    """When it was submitted (UTC)."""


class Hit(StoredMessage):
    """A stored message that a search found; a higher score is a better match."""

    score: float


class AddResult(BaseModel):
    record_ids: list[str]
    """One per message, in order. Of a backend that extracts memories, those that came of the
    messages, and of the other adds that were extracted together with them."""
    added: int
    """How many were not stored before: fewer than the ids when an idempotency key was reused. Of
    memories that came of several adds together, the first counts them all, the others none."""
    merged: int = 1
    """How many adds were extracted together."""


class SearchResult(BaseModel):
    hits: list[Hit]


class ListResult(BaseModel):
    records: list[StoredMessage]


class DeleteResult(BaseModel):
    removed: int
    """Messages removed."""


class Health(BaseModel):
    """What a memory backend says of itself, after asking its real service."""

    ok: bool
    backend: str
    detail: str = ""


JobResult: TypeAlias = AddResult | SearchResult | ListResult | DeleteResult | Health

RESULT_TYPES: dict[Operation, type[BaseModel]] = {
    Operation.ADD: AddResult,
    Operation.SEARCH: SearchResult,
    Operation.LIST: ListResult,
    Operation.DELETE: DeleteResult,
    Operation.HEALTH: Health,
}


class Outcome(BaseModel):
    """How one job settled: a result, or an error as `recallq.errors.to_wire` writes it."""

    state: JobState
    result: dict[str, Any] | None = None
    """Of an add that failed after it was stored: what storing it came to."""
    error: dict[str, Any] | None = None
    operation: Operation | None = None
    """Not sent with each outcome: the reader takes it over from the batch result."""


def failed(error: JobError) -> Outcome:
    """The outcome of a job that ended with `error`."""
    state = _STATE_OF_ERROR.get(type(error), JobState.FAILED)
    return Outcome(state=state, error=to_wire(error))


def cancelled() -> Outcome:
    """The outcome of a job that was cancelled before it began."""
    return failed(never_begun())


def never_begun() -> JobCancelled:
    """What a job ends with that was cancelled before it began."""
    return JobCancelled("the job was cancelled before a worker began it")


_STATE_OF_ERROR: dict[type[JobError], JobState] = {
    JobCancelled: JobState.CANCELLED,
    JobExpired: JobState.EXPIRED,
    ResultWithdrawn: JobState.EXPIRED,
}


class BatchResult(BaseModel):
    """What the result backend holds for a batch: an outcome per job, None while one is pending; one
    that is stored is yet to have its last."""

    v: int = PROTOCOL_VERSION
    operation: Operation | None = None
    # Not in the repr, which Celery writes to its log: it holds what users said.
    outcomes: list[Outcome | None] = Field(default_factory=list, repr=False)
    error: dict[str, Any] | None = None
    """Set when the batch failed as a whole, because the worker could not read it."""
    users: list[str] = Field(default_factory=list, repr=False)
    """Of reads: the hash tag of each job's user."""
    epochs: list[int] = Field(default_factory=list)
    """Of reads: each job's deletion epoch. A deletion with a higher one withdraws the answer."""

    @property
    def reached(self) -> int:
        """How far the jobs have come altogether: two steps to settle, of which being stored is
        one."""
        return sum(2 if each.state.settled else 1 for each in self.outcomes if each is not None)


PARTIAL = "PARTIAL"
"""Celery state of a batch of which some jobs have settled and others still run."""


def timestamp(order: int) -> datetime:
    """The submission time in an order key."""
    return datetime.fromtimestamp(order / 1_000_000, UTC)
