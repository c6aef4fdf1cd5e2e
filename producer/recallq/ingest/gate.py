"""The gate before the service: closed for a while after trouble, and then passed in file order.

One gate for all calls, because trouble seldom concerns one of them alone, and because a message
that is tried again after those that follow it would stand behind them in its session.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 15.0


class Gate:
    """Where calls wait while the service is in trouble, and go on in file order."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """What holds calls back, if they are."""
        self.last_success = float("-inf")
        self._trouble_since: float | None = None
        self._pauses = 0
        self._opens_at = 0.0
        self._queue: list[tuple[int, asyncio.Future[None]]] = []
        self._let_go = 0
        """Calls that were told to go on and have not yet."""

    async def passed(self, sequence: int) -> None:
        """Returns at once while nothing is held back, else in the order of `sequence`."""
        mine = False
        while self.reason is not None or (self._let_go and not mine):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._queue, (sequence, turn))
            await turn
            mine = True
            self._let_go -= 1
            if not self._let_go and self.reason is None:
                self._release()

    def succeeded(self) -> None:
        self.last_success = time.monotonic()
        self._trouble_since = None
        self._pauses = 0

    def trouble(self) -> float:
        """Notes that a call could not be made; for how many seconds none has succeeded."""
        now = time.monotonic()
        if self._trouble_since is None:
            self._trouble_since = now
        return now - self._trouble_since

    def hold(self, reason: str, pause: float | None = None) -> None:
        """Holds calls back for `pause` seconds, by default longer each time without success."""
        loop = asyncio.get_running_loop()
        if pause is None:
            pause = min(_FIRST_PAUSE * 2 ** min(self._pauses, 10), _LONGEST_PAUSE)
            pause *= random.uniform(0.75, 1.25)  # noqa: S311 - not in step with other ingestions
        opens_at = loop.time() + pause
        if self.reason is None:
            self._pauses += 1
            loop.call_at(opens_at, self._open)
        elif opens_at <= self._opens_at:
            return
        self.reason, self._opens_at = reason, opens_at

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._opens_at:
            loop.call_at(self._opens_at, self._open)
            return
        self.reason = None
        self._release()

    def _release(self) -> None:
        """Lets all go on that wait; who comes before they have waits behind them."""
        while self._queue:
            _, turn = heapq.heappop(self._queue)
            if not turn.done():
                turn.set_result(None)
                self._let_go += 1
