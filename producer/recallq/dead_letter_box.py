"""Dead letters in the caller's hand: list, look at, replay, purge.

A replayed job is as old as it was: it keeps its order key, its deletion epochs and the ids of its
records. So what a delete has removed stays away, the messages take their old places, and what the
dead job had stored already is not stored twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from recallq.contract import (
    AddBatch,
    AddJob,
    AnyJob,
    Batch,
    DeleteJob,
    Lane,
    Operation,
    Scope,
    decode_batch,
    encode_batch,
    make_batch,
)
from recallq.dead_letters import DeadLetter
from recallq.envelope import unwrap
from recallq.errors import InvalidInput, UndecodableJob, UnknownJob
from recallq.handle import JobHandle

if TYPE_CHECKING:
    from recallq.client import MemoryClient


class DeadLetterBox:
    """The dead letters of a namespace. Every call may raise `ServiceUnavailable`."""

    def __init__(self, client: MemoryClient) -> None:
        self._client = client
        self._transport = client.transport
        self._office = self._transport.dead_letters

    async def count(self) -> int:
        """How many there are."""
        async with self._transport.asking("cannot count the dead letters"):
            return await self._office.count()

    async def list(
        self,
        user_id: str | None = None,
        session_id: str | None = None,
        *,
        before: datetime | None = None,
        limit: int | None = None,
    ) -> list[DeadLetter]:
        """The letters, oldest first: all, or those of a user or session of the client's tenant, or
        those that died `before` a time, and at most `limit` of them."""
        found: list[DeadLetter] = []
        async for letter in self._every(user_id, session_id, before):
            if limit is not None and len(found) >= limit:
                break
            found.append(letter)
        return found

    async def get(self, letter_id: str) -> DeadLetter:
        """Raises `UnknownJob` if there is no such letter."""
        async with self._transport.asking("cannot read the dead letter"):
            letter = await self._office.get(letter_id)
        if letter is None:
            raise UnknownJob(
                f"there is no dead letter {letter_id}: it was replayed or purged, or went with a "
                "deletion of its user or session"
            )
        return letter

    async def replay(self, letter: DeadLetter | str, *, unsigned: bool = False) -> JobHandle:
        """Submits the job again, without a deadline, and forgets the letter.

        A process that dies in between leaves a letter whose job runs: replaying it once more does
        no harm. `unsigned`: also what may be anybody's, for workers found no good signature. It is
        signed by this, so whoever replays it vouches for it. Raises `UnknownJob`, also for what has
        been deleted since, `QueueFull`, and `InvalidInput` for what cannot be read, or is not
        signed.
        """
        if isinstance(letter, str):
            letter = await self.get(letter)
        if letter.unsigned and not unsigned:
            raise InvalidInput(
                f"dead letter {letter.id} may be anybody's, for no signature on it was good; if "
                "you know who wrote it, replay it with --unsigned (unsigned=True): that signs it"
            )
        batch, epochs = await self._without_deleted(self._revived(letter), letter.epochs)
        if not batch.jobs:
            await self.purge(letter)
            raise UnknownJob(f"what dead letter {letter.id} was to add has been deleted since")
        await self._transport.publish(batch, encode_batch(batch), epochs)
        await self.purge(letter)
        return JobHandle(self._client, batch.jobs[0].id)

    async def purge(self, letter: DeadLetter | str) -> bool:
        """Forgets a letter for good; False if it was gone already."""
        if isinstance(letter, str):
            letter = await self.get(letter)
        async with self._transport.asking("cannot purge the dead letter"):
            return await self._office.remove(letter)

    async def _every(
        self, user_id: str | None, session_id: str | None, before: datetime | None
    ) -> AsyncIterator[DeadLetter]:
        if user_id is None and session_id is not None:
            raise InvalidInput("a session_id needs the user_id that it belongs to")
        scope = None
        if user_id is not None:
            scope = Scope(self._client.settings.tenant, user_id, session_id)
        async with self._transport.asking("cannot read the dead letters", timeout=60.0):
            async for letter in self._office.every(scope=scope, before=before):
                yield letter

    async def _without_deleted(
        self, batch: Batch[Any], epochs: Sequence[int]
    ) -> tuple[Batch[Any], Sequence[int]]:
        """A batch without its adds that a deletion has come after, and the epochs of the others.
        Backends refuse these as well, but do not remember deletions for as long as a letter lies
        here."""
        if len(epochs) != len(batch.jobs):
            # Nobody knows how old they are: as old as can be, so that any deletion counts.
            epochs = [0] * len(batch.jobs)
        left: list[tuple[AnyJob, int]] = []
        async with self._transport.asking("cannot look for deletions"):
            for job, epoch in zip(batch.jobs, epochs, strict=True):
                if not isinstance(job, AddJob) or epoch >= await self._office.fence(job.scope):
                    left.append((job, epoch))
        jobs = [job for job, _ in left]
        return (
            make_batch(batch.id, batch.lane, batch.operation, jobs, batch.backend),
            [epoch for _, epoch in left],
        )

    def _revived(self, letter: DeadLetter) -> Batch[Any]:
        """A batch of the letter's jobs, under a new id."""
        if letter.job is not None:
            job = _job_in(letter)
            if isinstance(job, AddJob):
                job.origin = job.origin or letter.id
            job.deadline = None
            return make_batch(
                self._transport.next_batch_id(),
                letter.lane or Lane.LIVE,
                letter.operation or Operation.DELETE,
                [job],
                letter.backend,
            )
        try:
            # What no task could take was kept as it came, and may hold a batch all the same.
            batch = decode_batch(unwrap(letter.payload or "") or letter.payload)
        except UndecodableJob as error:
            raise _unreadable(letter, str(error)) from error
        if isinstance(batch, AddBatch):
            for each in batch.jobs:
                each.origin = each.origin or each.id
        return make_batch(
            self._transport.next_batch_id(),
            batch.lane,
            batch.operation,
            [*batch.jobs],
            batch.backend,
        )


def _job_in(letter: DeadLetter) -> AddJob | DeleteJob:
    kind = AddJob if letter.operation is Operation.ADD else DeleteJob
    try:
        return kind.model_validate(letter.job)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        # Not from the error, which quotes the job.
        raise _unreadable(letter, reason) from None


def _unreadable(letter: DeadLetter, reason: str) -> InvalidInput:
    return InvalidInput(
        f"dead letter {letter.id} cannot be read by this version: {reason}; replay it with the one "
        "that wrote it, or purge it"
    )
