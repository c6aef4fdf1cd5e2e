"""How fast a provider may be asked: one limiter for all that share an account.

Three things hold requests back: a limit that was set, of requests or tokens a minute; the wait that
a provider names; and what is learnt from a provider that names none. That is done as TCP does it:
whoever is told to slow down halves what it has under way and waits, twice as long each time, and
then takes a little more with each success.

Nothing here waits by itself: whoever sends asks when it may, and is told when there is room again.
A limiter belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import Callable

_FIRST_PAUSE = 1.0
"""Seconds to wait when a provider first says that it is too much, and names no time."""
_LONGEST_PAUSE = 30.0
_LONGEST_NAMED = 900.0
"""Seconds of a wait that a provider names after which it is asked again all the same: it may have
meant that request only, or be mistaken, and nothing else would find out."""
_SHARE = 5.0
"""Seconds whose tokens one request may take, of those that are allowed a minute: for so long
everything else waits behind it."""
_CEILING = 256.0
"""Requests at once that are never learnt to be too many."""
_GAIN = 0.25
"""Requests at once by which the limit grows while as many succeed as may run at once."""
_BURST = 1.0
"""Seconds whose share of a minute's limit may be used at once; providers count these, too."""


class Pace:
    """So many a minute, evenly."""

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self._seconds = 60.0 / per_minute
        self._ahead = max(0.0, _BURST - self._seconds)
        self._used_until = 0.0

    def wait(self, now: float) -> float:
        """Seconds until some more may be used."""
        return max(0.0, self._used_until - self._ahead - now)

    def use(self, now: float, amount: float) -> None:
        """Takes note of what is used, at once or long before its time; a negative amount is what
        was noted too much."""
        self._used_until = max(self._used_until, now) + amount * self._seconds


class RateLimiter:
    """What an account allows. Times are those of the event loop, in seconds."""

    def __init__(self) -> None:
        self._requests: Pace | None = None
        self._tokens: Pace | None = None
        self._limit = _CEILING
        self._in_flight = 0
        self._paused_until = 0.0
        self._slowed_at = -1.0
        self._strikes = 0
        self._listeners: list[Callable[[], None]] = []

    def configure(self, *, rpm: float | None, tpm: float | None) -> None:
        """Sets requests and tokens a minute; None leaves what is set."""
        if rpm is not None and (self._requests is None or self._requests.per_minute != rpm):
            self._requests = Pace(rpm)
        if tpm is not None and (self._tokens is None or self._tokens.per_minute != tpm):
            self._tokens = Pace(tpm)

    @property
    def most_tokens(self) -> int | None:
        """Tokens that one request should not go beyond; None if nothing is known against more."""
        return None if self._tokens is None else int(self._tokens.per_minute / 60 * _SHARE)

    # --- asking ---------------------------------------------------------------------------------

    def wait(self, now: float) -> float:
        """Seconds until another request may be sent, if there is `room` for it."""
        waits = [pace.wait(now) for pace in (self._requests, self._tokens) if pace is not None]
        return max(0.0, self._paused_until - now, *waits)

    @property
    def room(self) -> int:
        """How many requests more may run now."""
        return max(0, int(self._limit) - self._in_flight)

    @property
    def limit(self) -> int:
        """How many requests may run at once."""
        return int(self._limit)

    # --- telling --------------------------------------------------------------------------------

    def began(self, now: float, tokens: int) -> None:
        """A request with about so many tokens is sent."""
        self._in_flight += 1
        if self._requests is not None:
            self._requests.use(now, 1)
        if self._tokens is not None:
            self._tokens.use(now, tokens)

    def ended(self) -> None:
        """A request has come to its end, whichever."""
        self._in_flight -= 1
        for listener in list(self._listeners):
            listener()

    def succeeded(self, now: float, *, began: float, estimated: int, tokens: int) -> None:
        """A request that began at `began` was answered, and took so many tokens."""
        if self._tokens is not None and tokens:
            self._tokens.use(now, tokens - estimated)
        if began >= self._paused_until:
            self._strikes = 0
            self._limit = min(_CEILING, self._limit + _GAIN / self._limit)

    def throttled(self, now: float, *, began: float, retry_after: float | None) -> None:
        """A request that began at `began` was too much; the provider named a time, or did not."""
        # Of requests that were under way together, the first says it all.
        if began > self._slowed_at:
            self._slowed_at = now
            self._limit = max(1.0, min(self._limit, self._in_flight) / 2)
            if retry_after is None:
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0**self._strikes)
                self._strikes += 1
                self._pause_until(now + pause * random.uniform(0.75, 1.25))  # noqa: S311
        if retry_after is not None:
            # Not all processes at the same moment.
            late = random.uniform(0.0, min(1.0, 0.05 * retry_after))  # noqa: S311
            self._pause_until(now + min(retry_after, _LONGEST_NAMED) + late)

    def _pause_until(self, until: float) -> None:
        self._paused_until = max(self._paused_until, until)

    # --- hearing of room ------------------------------------------------------------------------

    def listen(self, listener: Callable[[], None]) -> None:
        """Has `listener` called whenever a request has come to its end."""
        self._listeners.append(listener)

    def forget(self, listener: Callable[[], None]) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)


_limiters: weakref.WeakValueDictionary[tuple[int, str], RateLimiter] = weakref.WeakValueDictionary()


def shared_limiter(account: str) -> RateLimiter:
    """The limiter of `account` on the running event loop; it lives as long as somebody has it."""
    key = (id(asyncio.get_running_loop()), account)
    limiter = _limiters.get(key)
    if limiter is None:
        limiter = _limiters[key] = RateLimiter()
    return limiter
