"""The sweeper: sees to it that what is in the ledger goes on.

Every worker process sweeps for the whole fleet: batches whose worker died go back to their queue
when their lease has run out, messages that vanished between queue and worker are sent again, and
jobs that wait for another attempt are sent when it is due. Each step is one script, so sweepers
never send the same batch twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from recallq.contract import Lane
from recallq.redis_client import COMMAND_TIMEOUT, LOST
from recallq_worker.ledger import RENEW_EVERY, WorkerLedger

log = logging.getLogger(__name__)

_TAKE_OVER_EVERY = 1.0
_SEND_AGAIN_EVERY = 2.0
_GRACE = RENEW_EVERY + 1.0
"""Seconds after an interruption in which the leases of live workers have not been renewed yet."""
_LONGEST_NAP = 0.5
_SHORTEST_NAP = 0.02


class Sweeper:
    """Sweeps for the fleet, in one worker process."""

    def __init__(
        self, ledger: WorkerLedger, swept: Callable[[str, int], None] | None = None
    ) -> None:
        """`swept` is told of batches that were sent again, and why."""
        self._ledger = ledger
        self._swept = swept or (lambda why, batches: None)

    async def sweep(self) -> None:
        """Sends what is due or lost; for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._try_again())
            group.create_task(self._recover())

    async def _try_again(self) -> None:
        while True:
            wait: float | None = None
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    wait = await self._ledger.try_again()
            except LOST as error:
                log.debug("cannot look for jobs to be tried again: %s", type(error).__name__)
            nap = _LONGEST_NAP if wait is None else min(max(wait, _SHORTEST_NAP), _LONGEST_NAP)
            await asyncio.sleep(nap)

    async def _recover(self) -> None:
        heard = 0.0  # when Redis last answered; at first, it may just have come back
        resume_at = 0.0
        send_at = 0.0
        while True:
            # Not all workers at the same moment.
            await asyncio.sleep(_TAKE_OVER_EVERY * random.uniform(0.8, 1.2))  # noqa: S311
            now = time.monotonic()
            if now - heard > 2 * _TAKE_OVER_EVERY:
                # While nobody could reach Redis, nobody could renew a lease: live workers first.
                resume_at = now + _GRACE
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    if now < resume_at:
                        await self._ledger.ping()
                    else:
                        await self._sweep_once(send=now >= send_at)
                        send_at = now + _SEND_AGAIN_EVERY if now >= send_at else send_at
                heard = time.monotonic()
            except LOST as error:
                log.debug("cannot look for lost batches: %s", type(error).__name__)

    async def _sweep_once(self, *, send: bool) -> None:
        taken = await self._ledger.take_over()
        if taken:
            log.warning("%d batches of workers that are gone are run again", taken)
            self._swept("taken_over", taken)
        if send:
            for lane in Lane:
                lost = await self._ledger.send_again(lane)
                if lost:
                    log.warning("%d lost messages of lane %s are sent again", lost, lane.value)
                    self._swept("lost", lost)
