"""What is measured, on both sides alike."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

NAP = 0.05
"""Seconds that a job waits that waits for a service."""
AT_ONCE = 100
"""Jobs that the service takes at once."""
USERS = 500
SEARCHED_USERS = 50
MESSAGES = 100
"""Of each user who is searched."""
_POOL = 1_000
_SYLLABLES = [
    "ba",
    "ko",
    "ri",
    "ten",
    "mul",
    "sa",
    "dor",
    "vin",
    "pel",
    "ga",
    "shu",
    "mon",
    "ter",
    "li",
    "fen",
]
_chance = random.Random(1)
_WORDS = [
    "".join(_chance.choices(_SYLLABLES, k=_chance.choice((1, 2, 2, 3)))) for _ in range(2_000)
]
_OFTEN = list(itertools.accumulate(1 / rank for rank in range(1, len(_WORDS) + 1)))
"""A few words are said all the time, and most hardly ever (Zipf)."""


@cache
def _pool(size: int) -> list[str]:
    return [
        " ".join(_chance.choices(_WORDS, cum_weights=_OFTEN, k=size // 4))[: size - 8]
        for _ in range(_POOL)
    ]


def text(n: int, size: int = 300) -> str:
    """What somebody said, of about `size` bytes; no two say the same."""
    return f"{_pool(size)[n % _POOL]} A-{n}"


def query(n: int) -> str:
    """Three words of what `text` says."""
    return " ".join(_pool(300)[n % _POOL].split()[3:6])


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
SUBMITTED = Work("submit_add, fire and forget", "add", Kind.FORGET, 50_000, 2_000, 1_000)
LARGE = Work("add_memory of 4 kB, 200 in flight", "add", Kind.IN_FLIGHT, 8_000, 1_000, 200, 4096)
NAPS = Work("jobs that wait 50 ms, 400 in flight", "nap", Kind.IN_FLIGHT, 6_000, 1_500, 400)
BACKLOG = Work("searches of a backlog", "search", Kind.BACKLOG, 6_000, 0, 1_000)
"""What a worker has most to do for, and Redis least: elsewhere two cores are too few to show more
workers at work."""
