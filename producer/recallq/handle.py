"""A job in the caller's hand.

A handle is nothing but its job's id and a client to ask: it can be rebuilt from the id in another
process, and holding or dropping one costs nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from recallq.contract import JobRef, JobState, Outcome, cancelled
from recallq.errors import JobTimeout, UnknownJob

if TYPE_CHECKING:
    from recallq.client import MemoryClient

_FIRST_POLL = 0.02
_LONGEST_POLL = 0.5


class JobHandle:
    """One submitted job. Made by `MemoryClient.submit_add` and its siblings, or by
    `MemoryClient.handle` from an id."""

    def __init__(self, client: MemoryClient, job_id: str) -> None:
        self._client = client
        self._ref = JobRef.parse(job_id)
        self.id = job_id
        """Keep it to find the job again."""

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"

    async def status(self) -> JobState:
        """The job's state now. Raises `UnknownJob` if there is no such job, or no longer."""
        found = await self._client.transport.fetch(self._ref)
        if found is None:
            raise self._unknown()
        return found.state

    async def result(self, timeout: float | None = None) -> Any:
        """What the job returned, once it has settled.

        An `AddResult`, a list of `Hit`, a list of `StoredMessage` or a `DeleteResult`, after the
        operation. Raises the job's error if it failed, `JobTimeout` after `timeout` seconds (the
        job goes on), and `UnknownJob`.
        """
        try:
            async with asyncio.timeout(timeout):
                outcome = await self._settled()
        except TimeoutError:
            raise JobTimeout(
                f"job {self.id} has not settled within {timeout} s; it goes on",
                job_id=self.id,
            ) from None
        return self._client.value_of(outcome, self.id)

    async def cancel(self) -> bool:
        """Cancels the job if no worker has begun its batch; says whether it did.

        Raises `UnknownJob`.
        """
        if await self._client.transport.cancel(self._ref):
            return True
        return await self.status() is JobState.CANCELLED

    async def _settled(self) -> Outcome:
        interval = _FIRST_POLL
        while True:
            transport = self._client.transport  # raises once the client is stopped
            # Listening first and looking second: a result that comes in between is not missed.
            news = transport.listen(self._ref)
            try:
                found = await transport.fetch(self._ref)
                if found is None:
                    raise self._unknown()
                if isinstance(found, Outcome):
                    return found
                if found.state is JobState.CANCELLED:
                    return cancelled()
                await asyncio.wait([news], timeout=interval)
                if news.done():
                    return news.result()
            finally:
                news.cancel()
            interval = min(interval * 1.5, _LONGEST_POLL)

    def _unknown(self) -> UnknownJob:
        return UnknownJob(
            f"no job {self.id} is known here: it was never accepted, or it settled longer ago than "
            "results are kept"
        )
