"""Lets a client's batches of writes through one after the other, in the order of the calls.

On connections of their own, a later batch could be in the ledger earlier, and be taken for all
there is of its user: extractions would see a conversation out of order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from recallq.errors import ServiceUnavailable


class InTurn:
    """The turns that batches take.

    However long Redis takes to answer one, the next waits for it. Only when one has failed because
    Redis is away, those that wait go all at once: each would else find that out after the time
    limits of all before it.
    """

    def __init__(self) -> None:
        self._last: asyncio.Future[None] | None = None
        """Done when the batch that came last has been through."""
        self._outage: asyncio.Future[None] | None = None
        """Done when those that wait for their turn need not."""

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Entered when it is the caller's turn, which ends with the block."""
        loop = asyncio.get_running_loop()
        before, mine = self._last, loop.create_future()
        self._last = mine
        try:
            if before is not None and not before.done():
                if self._outage is None:
                    self._outage = loop.create_future()
                await asyncio.wait((before, self._outage), return_when=asyncio.FIRST_COMPLETED)
            yield
        except ServiceUnavailable:
            if self._outage is not None:
                self._outage.set_result(None)
                self._outage = None
            raise
        finally:
            mine.set_result(None)
