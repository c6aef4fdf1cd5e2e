"""The slow lane: what takes seconds, one thing at a time per user, many users at once.

Extractions and deletes of backends that extract memories; of stores, the second step that makes
what they keep searchable (`recallq_worker.slow_work`).

A worker that has the slow lane takes up users who are due, as many as it may at once, each in a
task of its own on the process's loop. So an LLM that takes seconds holds no slot that a search
needs, and no user waits for another. What happens in a user's turn, `recallq_worker.slow_turn`
says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random

from recallq.redis_client import COMMAND_TIMEOUT, LOST
from recallq_worker.backends.base import Superseded
from recallq_worker.insistence import insistently
from recallq_worker.ledger import RENEW_EVERY
from recallq_worker.seclusion import Seclusion
from recallq_worker.slow_ledger import DeleteGoesFirst, SlowLedger, Turn, TurnIsOver
from recallq_worker.slow_turn import ActiveTurn, Rules
from recallq_worker.slow_work import SlowWork

log = logging.getLogger(__name__)

_LOOK_EVERY = 0.1
"""Seconds after which a worker with room looks for users again, if nobody tells it before."""
_FAREWELL = 3.0
"""Seconds that handing turns back may take when the process stops."""


class SlowLane:
    """The part that one worker process has in the slow lane."""

    def __init__(
        self,
        work: SlowWork,
        ledger: SlowLedger,
        rules: Rules,
        seclusion: Seclusion,
        *,
        users_at_once: int,
        pause: float,
    ) -> None:
        """`pause` in seconds: for how long adds that are left after a turn wait for others."""
        self._work = work
        self._ledger = ledger
        self._rules = rules
        self._seclusion = seclusion
        self._users_at_once = users_at_once
        self._pause = pause
        self._active: dict[str, ActiveTurn] = {}
        self._news = asyncio.Event()
        self._stopping = False

    def look(self, delay: float = 0.0) -> None:
        """Says that somebody will be due, in `delay` seconds."""
        asyncio.get_running_loop().call_later(delay, self._news.set)

    async def work(self) -> None:
        """Takes up users and keeps their leases; for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take_up())
            group.create_task(self._keep_leases())

    async def stop(self, patience: float = 0.0) -> None:
        """Takes up nobody any more, and hands back what has not come to its end after `patience`
        seconds; what cannot be handed back in time is found by others."""
        self._stopping = True
        for wait in (patience, _FAREWELL + 1):
            tasks = [each.task for each in self._active.values()]
            if tasks and wait:
                await asyncio.wait(tasks, timeout=wait)
            for each in self._active.values():
                each.task.cancel()

    async def _take_up(self) -> None:
        while True:
            wait: float | None = None
            self._news.clear()
            room = self._users_at_once - len(self._active)
            if self._seclusion.claimed:
                room = 0  # other processes need not wait until somebody here has been alone
            if room > 0 and not self._stopping:
                try:
                    async with asyncio.timeout(COMMAND_TIMEOUT):
                        taken = await self._ledger.take(room, self._work.most_jobs)
                except LOST as error:
                    log.debug("cannot look into the slow lane: %s", type(error).__name__)
                    await asyncio.sleep(0.5)
                    continue
                wait = taken.wait
                if taken.newest:
                    log.warning(
                        "users in the slow lane are left to newer workers (protocol version %d); "
                        "upgrade this one",
                        taken.newest,
                    )
                for turn in taken.turns:
                    self._overtake(turn)
                    active = ActiveTurn(
                        turn, self._work, self._ledger, self._rules, self._seclusion
                    )
                    self._active[turn.token] = active
                    active.task = asyncio.create_task(self._have(active))
            nap = _LOOK_EVERY * random.uniform(0.7, 1.0)  # noqa: S311  # not all at one moment
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(nap if wait is None else min(wait, nap)):
                    await self._news.wait()

    def _overtake(self, turn: Turn) -> None:
        """Stops what still runs here for a user whose turn has begun anew."""
        for each in self._active.values():
            if each.turn.tag == turn.tag:
                each.lost = True
                each.interrupt()

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY)
            active = list(self._active.values())
            if not active:
                continue
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    told = await self._ledger.renew([each.turn for each in active])
            except LOST as error:
                log.warning("cannot renew leases yet: %s", type(error).__name__)
                continue
            for each, stop in zip(active, told, strict=True):
                each.lost = each.lost or stop is None
                if each.lost or each.running <= (stop or frozenset()):
                    each.interrupt()

    async def _have(self, active: ActiveTurn) -> None:
        """Works on a user's jobs, and ends the turn."""
        turn = active.turn
        try:
            with contextlib.suppress(DeleteGoesFirst):  # it is due at once
                await active.work()
            if active.postponed:
                jobs = active.postponed
                await insistently(lambda: self._ledger.postpone(turn, active.pause, jobs))
            else:
                pause = self._pause if active.extracted else 0.0
                await insistently(lambda: self._ledger.release(turn, pause))
        except (TurnIsOver, Superseded):
            log.info("a turn in the slow lane was taken over")
        except asyncio.CancelledError:
            # The process ends: another shall go on, at once.
            with contextlib.suppress(*LOST):
                async with asyncio.timeout(_FAREWELL):
                    await self._ledger.release(turn)
            raise
        except Exception:
            # Nothing is lost: the lease runs out, and another takes the user up.
            log.exception("a defect in the slow lane")
        finally:
            del self._active[turn.token]
            self._news.set()
