"""``python -m recallq_worker reindex``: brings the search indexes of the redis backend up to date.

Workers do so by themselves, for each user whose index they come across and find to be of another
version; this does it for all of them, before anybody has to wait for it. They may go on meanwhile.
With a search strategy that needs vectors, messages that have none get theirs.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

from recallq.contract import Scope
from recallq.errors import BackendUnavailable, ConfigurationError
from recallq_worker.backends.redis import RedisStore
from recallq_worker.retries import RetryPolicy
from recallq_worker.settings import WorkerSettings

T = TypeVar("T")

_PATIENCE = 120.0
"""Seconds for which somebody who watches may be kept waiting at a time."""


@dataclass(slots=True)
class Reindexed:
    """What came of it."""

    users: int = 0
    """Whose indexes were looked at."""
    rebuilt: int = 0
    messages: int = 0
    """In indexes that were rebuilt."""
    embedded: int = 0
    """Messages that got a vector."""
    refused: int = 0
    """Messages that the embedding model will not take: they are found by their words."""
    skipped: int = 0
    """Users whose messages get none here, since their ids are too long to be told from their keys:
    they get theirs as they are added."""

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


async def reindex(
    settings: WorkerSettings,
    user: Scope | None = None,
    *,
    everything: bool = False,
    advance: Callable[[Reindexed], None] = lambda so_far: None,
) -> Reindexed:
    """Rebuilds indexes that are not as they should be, of a user or of all; with `everything`, all
    of them.

    `advance` is told after each user. May be interrupted at any moment, and begun again. Raises
    `ConfigurationError` for a backend that has none, `BackendUnavailable`, `BackendError`.
    """
    if settings.backend != RedisStore.name:
        raise ConfigurationError(
            f"the {settings.backend} backend has no index of RecallQ's that could be rebuilt; that "
            f"is the {RedisStore.name} backend's"
        )
    store = RedisStore.from_settings(settings)
    retries = RetryPolicy(settings.retry_attempts, settings.retry_base, settings.retry_cap)

    async def patiently(work: Callable[[], Awaitable[T]]) -> T:
        """What is unavailable for a while does not end it: others wait behind this user."""
        for attempt in itertools.count(1):
            try:
                return await work()
            except BackendUnavailable as error:
                wait = retries.wait(error, attempt, left=_PATIENCE)
                if wait is None:
                    raise  # with how long it is to take, where that is known
                await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    done = Reindexed()
    try:
        await store.start()
        async for base in store.users(user):
            messages = await patiently(partial(store.reindex, base, anyway=everything))
            done.users += 1
            if messages is not None:
                done.rebuilt += 1
                done.messages += messages
            if store.indexes:
                found = await patiently(partial(store.embed, base))
                if found is None:
                    done.skipped += 1
                else:
                    done.embedded += found.embedded
                    done.refused += found.refused
            advance(done)
    finally:
        await store.stop()
    return done
