"""What is measured, on both sides alike."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NAP = 0.05
"""Seconds that a job waits that waits for a service."""
AT_ONCE = 100
"""Jobs that the service takes at once."""
USERS = 500
SEARCHED_USERS = 50
MESSAGES = 100
"""Of each user who is searched."""
_WORDS = (
    "morning coffee with Anna before the train, then peanuts from the market on the corner; "
    "she asked about order A-{n} and the blue bicycle that we had left at the station in "
    "October. We might hike up to the lake on Sunday if the weather holds, otherwise cook "
    "something with lentils and watch the match {n} "
)


def text(n: int, size: int = 300) -> str:
    """What somebody said, of about `size` bytes; no two say the same."""
    once = _WORDS.format(n=n)
    return (once * (size // len(once) + 1))[:size]


class Kind(StrEnum):
    """How calls are made."""

    ONE_AT_A_TIME = "one at a time"
    IN_FLIGHT = "in flight"
    FORGET = "submitted"
    """Whose answers nobody waits for."""
    BACKLOG = "backlog"
    """Submitted while the workers are frozen, so that they are all that is measured."""


@dataclass(frozen=True)
class Work:
    """Something to be done `times` times by each side."""

    name: str
    operation: str
    """``add``, ``search`` or ``nap``."""
    kind: Kind
    times: int
    """By RecallQ."""
    plain_times: int
    """By plain Celery, which takes as long for these: rates do not depend on it."""
    in_flight: int = 1
    size: int = 300
    """Bytes of a message."""


SINGLE = Work("one add_memory at a time", "add", Kind.ONE_AT_A_TIME, 300, 300)
ADDS = Work("add_memory, 200 in flight", "add", Kind.IN_FLIGHT, 20_000, 1_500, 200)
SEARCHES = Work(
    f"search_memory, 200 in flight, {MESSAGES} messages per user",
    "search", Kind.IN_FLIGHT, 10_000, 1_000, 200,
)  # fmt: skip
SUBMITTED = Work("submit_add, fire and forget", "add", Kind.FORGET, 50_000, 2_000, 200)
LARGE = Work("add_memory of 4 kB, 200 in flight", "add", Kind.IN_FLIGHT, 8_000, 1_000, 200, 4096)
NAPS = Work("jobs that wait 50 ms, 400 in flight", "nap", Kind.IN_FLIGHT, 6_000, 1_500, 400)
BACKLOG = Work("adds of a backlog", "add", Kind.BACKLOG, 20_000, 0, 200)
