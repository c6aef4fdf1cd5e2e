"""When a job that failed is tried again.

Full jitter (Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): each wait
is drawn from the whole of an interval that doubles, so that jobs which failed together do not come
back together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from recallq.errors import BackendUnavailable, JobError

_LONGEST_REQUEST = 24 * 3600.0
"""Seconds: a backend that asks for more patience than this is not taken at its word."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and after how long. Times are in seconds."""

    attempts: int
    """Most runs of a job, the first included."""
    base: float
    """Longest wait after the first run; it doubles with each further run."""
    cap: float
    """Longest wait that the doubling comes to."""

    def wait(
        self, error: JobError, attempts: int, *, left: float | None, draw: float | None = None
    ) -> float | None:
        """How long to wait after run number `attempts` (from 1) ended with `error`.

        `draw`, from 0 to 1, is where in its interval the wait lies: jobs that shall be tried again
        together share one.

        None if the job shall not be tried again: because the error would come again, because it has
        been tried often enough, or because the time that is `left` before its deadline is too short
        for the wait. A wait that the backend asked for is kept in full.
        """
        if not isinstance(error, BackendUnavailable) or attempts >= self.attempts:
            return None
        longest = min(self.cap, self.base * 2.0 ** min(attempts - 1, 60))
        wait = longest * (random.random() if draw is None else draw)  # noqa: S311  # spreads load
        if error.retry_after is not None:
            wait += min(max(error.retry_after, 0.0), _LONGEST_REQUEST)
        return None if left is not None and wait >= left else wait


def retry_after(headers: Mapping[str, str] | None) -> float | None:
    """The wait that an HTTP server asked for, in seconds: ``Retry-After``, or the variant in
    milliseconds that OpenAI sends. Names of headers in lower case."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        said = (headers or {}).get(name)
        if said is None:
            continue
        try:
            seconds = float(said) * scale
        except ValueError:
            try:
                until = parsedate_to_datetime(said)
            except ValueError:
                continue
            if until.tzinfo is None:
                until = until.replace(tzinfo=UTC)
            seconds = (until - datetime.now(UTC)).total_seconds()
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None
