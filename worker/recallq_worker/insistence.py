"""For what must not be given up half way: asking Redis until it answers, and waiting until a write
that was begun has come to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from recallq.redis_client import COMMAND_TIMEOUT, LOST, trouble_of

log = logging.getLogger(__name__)

T = TypeVar("T")


async def insistently(work: Callable[[], Awaitable[T]]) -> T:
    """Does `work` as soon as Redis allows; `work` must bear being repeated."""
    delay = 0.05
    while True:
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT):
                return await work()
        except LOST as error:
            log.warning("Redis does not answer yet: %s", trouble_of(error))
            await asyncio.sleep(delay)
            delay = min(delay * 2, 1.0)


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Awaits a write to its end, also when it is cancelled meanwhile; then it raises."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()
