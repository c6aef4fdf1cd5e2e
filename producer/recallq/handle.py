"""A job in the caller's hand.

A handle is nothing but its job's id and a client to ask: it can be rebuilt from the id in another
process, and holding or dropping one costs nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from recallq.contract import JobRef, JobState, Outcome, Wait, cancelled, failed
from recallq.errors import JobExpired, JobTimeout, UnknownJob

if TYPE_CHECKING:
    from recallq.client import MemoryClient

_FIRST_POLL = 0.02
_LONGEST_POLL = 0.5
_CLOCK_ERROR = 0.5
"""Seconds by which this machine's idea of the shared clock may differ from a worker's."""


class JobHandle:
    """One submitted job. Made by `MemoryClient.submit_add` and its siblings, or by
    `MemoryClient.handle` from an id."""

    def __init__(self, client: MemoryClient, job_id: str) -> None:
        self._client = client
        self._ref = JobRef.parse(job_id)
        self.id = job_id
        """Keep it to find the job again."""
        self._asked_deadline = False
        self._known_deadline: float | None = None

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"

    async def status(self) -> JobState:
        """The job's state now. Raises `UnknownJob` if there is no such job, or no longer.

        A job that waits for another attempt is queued, as one that was never begun.
        """
        found = await self._client.transport.fetch(self._ref)
        if found is None:
            raise self._unknown()
        if found.state is JobState.QUEUED and self._is_late(await self._deadline()):
            return JobState.EXPIRED
        return found.state

    async def result(self, timeout: float | None = None, *, wait: Wait | None = None) -> Any:
        """What the job returned, once it has settled.

        An `AddResult`, a list of `Hit`, a list of `StoredMessage` or a `DeleteResult`, after the
        operation. An add is waited for until its messages are ``"searchable"``, or ``"stored"``
        (`wait`; None: as the client's settings say). Raises the job's error if it failed,
        `JobTimeout` after `timeout` seconds (the job goes on), and `UnknownJob`.
        """
        early = self._client.waits_early(wait)
        try:
            async with asyncio.timeout(timeout):
                outcome = await self._settled(early=early)
        except TimeoutError:
            raise JobTimeout(
                f"job {self.id} has not settled within {timeout} s; it goes on",
                job_id=self.id,
            ) from None
        return self._client.value_of(outcome, self.id, early=early)

    async def cancel(self) -> bool:
        """Cancels the job if it is queued; says whether it did.

        One that runs is asked to stop, and False returned: it may end as cancelled within a few
        seconds, with a part of its work done, or come to its end. What is stored stays. Raises
        `UnknownJob`.
        """
        state = await self.status()
        if state.settled:
            return state is JobState.CANCELLED
        state_then = await self._client.transport.cancel(self._ref)
        if state_then is not None:
            return state_then is JobState.QUEUED
        return await self.status() is JobState.CANCELLED

    async def _settled(self, *, early: bool) -> Outcome:
        interval = _FIRST_POLL
        while True:
            transport = self._client.transport  # raises once the client is stopped
            # Listening first and looking second: a result that comes in between is not missed.
            news = transport.listen(self._ref, early=early)
            try:
                found = await transport.fetch(self._ref)
                if found is None:
                    raise self._unknown()
                if isinstance(found, Outcome) and (found.state.settled or early):
                    return found
                if isinstance(found, Outcome) and not await transport.is_open(self._ref):
                    # Answered meanwhile; or the ledger was lost, and nobody goes on with it.
                    last = await transport.fetch(self._ref)
                    if isinstance(last, Outcome) and last.state.settled:
                        return last
                    raise self._unknown("it is stored, but nothing is known of it any more")
                if found.state is JobState.CANCELLED:
                    return cancelled()
                # Nobody may be there to say that it has expired.
                if found.state is JobState.QUEUED and self._is_late(await self._deadline()):
                    return failed(JobExpired("the job's deadline passed before it was begun"))
                await asyncio.wait([news], timeout=interval)
                if news.done():
                    return news.result()
            finally:
                news.cancel()
                transport.give_up(self._ref.batch_id)
            # What its own client hears of, it need not ask for.
            own = self._ref.client_id == transport.client_id
            interval = min(interval * 1.5, _LONGEST_POLL * (4 if own else 1))

    async def _deadline(self) -> float | None:
        """The job's deadline; asked for once, for it takes reading the whole batch."""
        if not self._asked_deadline:
            self._known_deadline = await self._client.transport.deadline(self._ref)
            self._asked_deadline = True
        return self._known_deadline

    def _is_late(self, deadline: float | None) -> bool:
        """Whether no worker will begin a job any more, clocks being what they are."""
        return deadline is not None and self._client.transport.clock.now() > deadline + _CLOCK_ERROR

    def _unknown(
        self, why: str = "it was never accepted, or it settled longer ago than results are kept"
    ) -> UnknownJob:
        return UnknownJob(f"no job {self.id} is known here: {why}")
