"""Asking Redis until it answers: for what must not be given up half way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from recallq.redis_client import COMMAND_TIMEOUT, LOST

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
            log.warning("Redis does not answer yet: %s", type(error).__name__)
            await asyncio.sleep(delay)
            delay = min(delay * 2, 1.0)
