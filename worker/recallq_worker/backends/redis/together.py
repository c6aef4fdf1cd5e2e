"""Scripts that are called at the same time go to Redis in one round trip.

The searches and pages of a batch run side by side, and each would pay for a round trip of its own:
on the processor more than on the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

from redis import exceptions
from redis.commands.core import AsyncScript

from recallq.errors import JobError
from recallq.redis_client import RedisClient
from recallq_worker.backends.redis.index_storage import Asking

_MOST = 100
"""Calls in one round trip."""


_Call: TypeAlias = tuple[AsyncScript, list[str], list[Any], asyncio.Future[Any]]


class Together:
    """Calls scripts, as they call themselves. Only for those that may be called again."""

    def __init__(
        self, redis: RedisClient, asking: Asking, worded: Callable[[Exception], JobError]
    ) -> None:
        """`worded` makes a backend's error of a driver's, as `asking` does."""
        self._redis = redis
        self._asking = asking
        self._worded = worded
        self._calls: list[_Call] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def call(self, script: AsyncScript, keys: list[str], args: list[Any]) -> Any:
        """What a script returns. Raises what `asking` raises."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        self._calls.append((script, keys, args, reply))
        if len(self._calls) == 1:
            loop.call_soon(self._send)
        return await reply

    def _send(self) -> None:
        calls, self._calls = self._calls, []
        for first in range(0, len(calls), _MOST):
            task = asyncio.get_running_loop().create_task(self._ask(calls[first : first + _MOST]))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _ask(self, calls: list[_Call]) -> None:
        failure: BaseException = asyncio.CancelledError()
        try:
            replies = await self._asking(self._replies(calls))
            for (*_, reply), said in zip(calls, replies, strict=True):
                if reply.done():
                    continue  # nobody waits any longer
                if isinstance(said, Exception):
                    reply.set_exception(self._worded(said))
                else:
                    reply.set_result(said)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the callers' to see
            failure = error
        finally:
            for *_, reply in calls:
                if not reply.done():
                    reply.set_exception(failure)

    async def _replies(self, calls: list[_Call]) -> list[Any]:
        for first_try in (True, False):
            pipe = self._redis.pipeline(transaction=False)
            for script, keys, args, _ in calls:
                pipe.evalsha(script.sha, len(keys), *keys, *args)
            # Not raised by the pipeline, which would quote the command: ids, and what users said.
            replies: list[Any] = await pipe.execute(raise_on_error=False)
            if not first_try or not any(
                isinstance(each, exceptions.NoScriptError) for each in replies
            ):
                return replies
            # The server was restarted.
            for text in {script.script for script, *_ in calls}:
                await self._redis.script_load(text)
        raise AssertionError("unreachable")
