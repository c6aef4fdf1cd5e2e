"""The fleet's clock: order keys and deadlines on the coordination Redis's time.

Machines' clocks differ, so each process measures its offset to Redis TIME once at start and again
now and then, taking the quickest of a few round trips: the error is at most half of that. Order
keys never repeat or go back within one clock, whatever the calibration does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from recallq.redis_client import COMMAND_TIMEOUT, LOST, RedisClient

_PROBES = 5
_RECALIBRATE = 30.0
"""Seconds; also how long it may take to follow a step of Redis's clock."""
_TICKS = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""A step of the machine's wall clock cannot move it, and it goes on while the machine sleeps, as on
Linux the monotonic clock does not."""


def _ticks_us() -> int:
    return time.clock_gettime_ns(_TICKS) // 1000


class FleetClock:
    """Redis's time, read locally. Not calibrated, it is this machine's own."""

    def __init__(self) -> None:
        self._offset_us = time.time_ns() // 1000 - _ticks_us()
        self._last_order = 0

    async def calibrate(self, redis: RedisClient) -> None:
        """Measures the offset to `redis`; a handful of round trips."""
        best: tuple[int, int] | None = None
        for _ in range(_PROBES):
            before = _ticks_us()
            seconds, micros = await redis.time()
            after = _ticks_us()
            offset = seconds * 1_000_000 + micros - (before + after) // 2
            if best is None or after - before < best[0]:
                best = (after - before, offset)
        if best is not None:
            self._offset_us = best[1]

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._now_us() / 1_000_000

    def next_order(self) -> int:
        """An order key: microseconds since the epoch, larger than any this clock gave before."""
        self._last_order = max(self._now_us(), self._last_order + 1)
        return self._last_order

    def _now_us(self) -> int:
        return _ticks_us() + self._offset_us


async def keep_time(clock: FleetClock, redis: RedisClient) -> None:
    """Calibrates `clock` now and then, for ever; what a client or a worker runs as a task."""
    while True:
        await asyncio.sleep(_RECALIBRATE)
        with contextlib.suppress(*LOST):
            async with asyncio.timeout(COMMAND_TIMEOUT):
                await clock.calibrate(redis)
