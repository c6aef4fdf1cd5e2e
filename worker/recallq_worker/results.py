"""The result backend: Celery's for Redis, taught to settle batches.

What differs from Celery's own: a result is announced on the sending client's one channel instead
of a channel per task, it is encoded once, and storing it also removes the batch from the ledger -
in the same step where both live on one Redis, so that no crash falls between the two.
"""

from __future__ import annotations

from typing import Any

import orjson
from celery.backends.redis import RedisBackend
from celery.states import READY_STATES
from redis import Redis

from recallq.contract import client_of, fields_of
from recallq.keys import Keys
from recallq_worker import settings as worker_settings

# KEYS: batch, ledger, outstanding. ARGV: batch id.
_SETTLE = """
local entry = redis.call('HMGET', KEYS[1], 'l', 'n')
if entry[1] then
  redis.call('DEL', KEYS[1])
  redis.call('ZREM', KEYS[2], ARGV[1])
  if redis.call('HINCRBY', KEYS[3], entry[1], -entry[2]) <= 0 then
    redis.call('HDEL', KEYS[3], entry[1])
  end
end
"""


class ResultBackend(RedisBackend):  # type: ignore[misc]  # Celery has no annotations
    """Stores, announces and settles. Named in the app's ``result_backend`` setting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = worker_settings.current()
        self._keys = Keys(settings.namespace)
        self._coordination: Redis | None = None
        if settings.coordination_url != settings.result_url:
            self._coordination = Redis.from_url(settings.coordination_url)

    def encode(self, data: Any) -> bytes:
        return orjson.dumps(data, default=fields_of)

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        # Celery reads the stored result first, so as not to overwrite a success. Here the ledger
        # sees to that: a batch that was settled is not begun again.
        meta = self._get_result_meta(
            result=result, state=state, traceback=traceback, request=request
        )
        meta["task_id"] = task_id
        stored = self.encode(meta)
        self.ensure(self._store_and_settle, (task_id, stored, state in READY_STATES))
        return result

    def _store_and_settle(self, task_id: str, stored: bytes, final: bool) -> None:
        channel = self._keys.reply_channel(client_of(task_id))
        with self.client.pipeline(transaction=True) as pipe:
            pipe.set(self.get_key_for_task(task_id), stored, ex=self.expires or None)
            pipe.publish(channel, task_id.encode() + b"\n" + stored)
            if final and self._coordination is None:
                self._settle(pipe, task_id)
            pipe.execute()
        if final and self._coordination is not None:
            self._settle(self._coordination, task_id)

    def _settle(self, redis: Any, task_id: str) -> None:
        redis.eval(
            _SETTLE,
            3,
            self._keys.batch(task_id),
            self._keys.ledger,
            self._keys.outstanding,
            task_id,
        )
