"""What a memory backend is.

A backend is a class named by an entry point of the group ``recallq.backends`` (see `registry`),
made with ``from_settings`` and used by one process on one event loop. `MemoryStore` is for
backends that keep records themselves. Whatever library a backend uses, its errors end here: it
raises `recallq.errors.BackendUnavailable` where a later try may succeed, `BackendError` where none
will, and nothing else on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from recallq.contract import Health, Scope
from recallq_worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class Record:
    """One stored message."""

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


class Added(Enum):
    """What became of a record that was to be added."""

    NEW = "new"
    KNOWN = "known"
    """It was stored already."""
    FENCED = "fenced"
    """A delete that was submitted after it has been here before it: it is not stored."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A record that a search found; a higher score is a better match."""

    record: Record
    score: float


@runtime_checkable
class MemoryStore(Protocol):
    """A backend that keeps records itself.

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

    async def add(self, records: Sequence[Record]) -> list[Added]:
        """Stores records of any users; says what became of each.

        A record whose id is stored already stays as it is, but for its epoch, which becomes the
        later of the two: a delete between them leaves it. One that a delete has fenced off (its
        epoch is below the scope's fence) is not stored. All or some are stored when it raises.
        """
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

        From its first step on, records with a lower epoch are not stored any more. Repeating it
        after a crash finishes the work.
        """
        ...

    async def health(self) -> Health:
        """Asks the real service. Does not raise."""
        ...
