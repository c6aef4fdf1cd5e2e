"""What a memory backend is.

A backend is a class named by an entry point of the group ``recallq.backends`` (see `registry`),
made with ``from_settings`` and used by one process on one event loop. `MemoryStore` is for
backends that keep records themselves, `MemoryExtractor` for those that make memories of messages
with an LLM. Whatever library a backend uses, its errors end here: it raises
`recallq.errors.BackendUnavailable` where a later try may succeed, `BackendError` where none will,
and nothing else on purpose.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Protocol, Self, TypeAlias, TypeGuard, runtime_checkable

from recallq.contract import DEFAULT_SESSION, AddJob, Health, Scope
from recallq.errors import JobError
from recallq_worker.settings import WorkerSettings


@dataclass(slots=True)
class Record:
    """One stored message. Nobody changes one; that it could be is four times as fast to make."""

    record_id: str
    """The same whenever the same message of the same job is stored."""
    scope: Scope
    """With a session."""
    order: int
    """Order key, in microseconds since the epoch; ties are broken by the record id."""
    epoch: int
    """What its user's deletions are told by: one with a higher epoch was submitted after it."""
    message: dict[str, Any]
    """A JSON object."""
    fixed: bool = False
    """Whether it never comes again with another order key, so that a store may find it by that.
    One with an idempotency key may."""


class Added(Enum):
    """What became of a record that was to be added."""

    NEW = "new"
    KNOWN = "known"
    """It was stored already."""
    FENCED = "fenced"
    """A delete that was submitted after it has been here before it: it is not stored."""


@dataclass(slots=True)
class Hit:
    """A record that a search found; a higher score is a better match."""

    record: Record
    score: float


class MemoryBackend(Protocol):
    """What every backend does.

    `scope.session_id` None means all of the user's sessions, except in a record's own scope.
    """

    name: ClassVar[str]
    single_process: ClassVar[bool]
    """Whether the data lives in the process, so that a second worker must not start."""

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> Self:
        """Makes the backend without connecting. Raises `ConfigurationError`, `MissingExtra`."""
        ...

    async def start(self) -> None:
        """Connects, on the event loop that will use it."""
        ...

    async def stop(self) -> None:
        """Disconnects. Called once, also after a failed start."""
        ...

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        """The best matches, best first; ties by recency."""
        ...

    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]:
        """Records by (order, record id), oldest first."""
        ...

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        """Removes every record with a lower epoch, however many, and says how many there were.

        Repeating it after a crash finishes the work.
        """
        ...

    async def health(self) -> Health:
        """Asks the real service. Does not raise."""
        ...


@runtime_checkable
class MemoryStore(MemoryBackend, Protocol):
    """A backend that keeps records itself.

    From the first step of a delete on, records with a lower epoch are not stored any more.
    """

    async def add(self, records: Sequence[Record]) -> list[Added]:
        """Stores records of any users; says what became of each.

        A record whose id is stored already stays as it is, but for its epoch, which becomes the
        later of the two: a delete between them leaves it. Its order key becomes the earlier of the
        two, where a store can move a record: what was submitted first may come second. One that a
        delete has fenced off (its epoch is below the scope's fence) is not stored. All or some are
        stored when it raises.
        """
        ...


@runtime_checkable
class IndexedStore(MemoryStore, Protocol):
    """A store that may need a second step until a search finds what it keeps: an embedding, or a
    search index that follows in its own time. `add` does without; the slow lane does the rest."""

    indexes: bool
    """Whether it takes the second step, as it is set up."""

    async def index(
        self, records: Sequence[Record], *, patience: float
    ) -> Sequence[JobError | None]:
        """Makes stored records of any users searchable; returns when a search finds them.

        Says of each what it failed with; of one that is not there any more, nothing. What is done
        already is not done, or paid, again. One that no search finds after `patience` seconds ends
        as `BackendUnavailable`: the others need not wait for it. Raises what all fail with. May be
        cancelled at any moment.
        """
        ...


def takes_second_step(backend: object) -> TypeGuard[IndexedStore]:
    """Whether adds to a backend are stored first and searchable later."""
    return isinstance(backend, IndexedStore) and backend.indexes


# --- extractors ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Submission:
    """The messages of one add. Nobody changes one, as with records."""

    job_id: str
    scope: Scope
    """With a session."""
    order: int
    """Order key of the add, in microseconds since the epoch."""
    epoch: int
    messages: Sequence[dict[str, Any]]
    """JSON objects."""
    record_ids: Sequence[str]
    """One per message, for memories that are a message as it was; the same whenever it is run."""
    infer: bool | None
    """Whether an LLM extracts; None leaves it to the backend's settings."""
    fixed: bool = False
    """Whether it is never submitted again with another order key."""

    @classmethod
    def of(cls, job: AddJob, epoch: int) -> Self:
        """What a job submits."""
        scope = job.scope
        if not scope.session_id:
            scope = Scope(scope.tenant, scope.user_id, DEFAULT_SESSION)
        return cls(
            job_id=job.id,
            scope=scope,
            order=job.order,
            epoch=epoch,
            messages=job.messages,
            record_ids=job.record_ids(),
            infer=job.infer,
            fixed=job.idempotency_key is None,
        )

    def records(self) -> list[Record]:
        """Its messages as stores keep them."""
        return [
            Record(record_id, self.scope, self.order, self.epoch, message, self.fixed)
            for record_id, message in zip(self.record_ids, self.messages, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Extracted:
    """What came of one submission."""

    record_ids: list[str]
    """Of the memories that came of it and of those extracted together with it."""
    added: int
    """How many memories are new; of several submissions together, the first has them all."""
    merged: int = 1
    """How many submissions were extracted together."""


def together(ids: Sequence[str], count: int) -> list[Extracted]:
    """What came of `count` submissions that were extracted together."""
    return [Extracted([*ids], 0 if place else len(ids), count) for place in range(count)]


class Superseded(Exception):
    """The work must not go on: a deletion or another worker has taken its place."""


REPEATABLE = "repeatable"
"""In a journal, whether whoever does it once more stores the same under the same ids. Then nothing
of it is to be undone when somebody has."""

Journal: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
"""Writes down, beyond a crash, what is about to be stored. Raises `Superseded`."""


@runtime_checkable
class MemoryExtractor(MemoryBackend, Protocol):
    """A backend that makes memories of messages, mostly in seconds and for money.

    The slow lane (`recallq_worker.slow_lane`) sees to it that at any moment one call of `extract`,
    `recover` or `delete` runs for a user in the whole fleet, in the order of submission.
    """

    def group(self, submission: Submission) -> Hashable:
        """Submissions of a user whose groups are equal may be extracted together."""
        ...

    def tokens(self, submission: Submission) -> int:
        """About how many tokens of an LLM's prompt a submission takes; 0 if no LLM is asked."""
        ...

    async def extract(self, submissions: Sequence[Submission], journal: Journal) -> list[Extracted]:
        """Makes and stores memories of one user's submissions of one group, in their order; says
        what came of each.

        Before anything is stored, `journal` must have returned; what it was told last is what
        `recover` gets if this process dies. May be cancelled at any moment before.
        """
        ...

    async def recover(
        self, submissions: Sequence[Submission], intent: dict[str, Any]
    ) -> list[Extracted] | None:
        """After an `extract` that did not come to its end: finds out whether it had stored
        everything that its journal speaks of, and what came of it.

        None if it had not, or if there are no `submissions` any more: then nothing of it is left.
        """
        ...
