"""The result backend: Celery's for Redis, taught to settle batches.

What differs from Celery's own: a result is announced on the sending client's one channel instead
of a channel per task, it is encoded once, and storing it also removes the batch from the ledger -
in the same step where both live on one Redis, so that no crash falls between the two.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import orjson
from celery.backends.redis import RedisBackend
from celery.states import READY_STATES
from redis import Redis
from redis.commands.core import Script

from recallq.contract import PARTIAL, BatchResult, Outcome, client_of, failed, fields_of
from recallq.errors import InternalError
from recallq.keys import Keys
from recallq.redis_client import LOST, NO_INTRODUCTION, connect_threads, tls_options
from recallq_worker import settings as worker_settings

# KEYS: batch, held, delayed, outstanding, totals. ARGV: batch id, prefix of the queued sets.
_SETTLE = """
local function settle(batch, held, delayed, outstanding, totals, id, queued)
  local lane, jobs, gone = unpack(redis.call('HMGET', batch, 'l', 'n', 'x'))
  if lane then
    redis.call('DEL', batch)
    redis.call('ZREM', held, id)
    redis.call('ZREM', delayed, id)
    redis.call('ZREM', queued .. lane, id)
    -- As text: Lua would make "-0" of none, which Redis does not take for a number.
    local left = string.format('%d', (gone or 0) - jobs)
    if redis.call('HINCRBY', outstanding, lane, left) <= 0 then
      redis.call('HDEL', outstanding, lane)
    end
    redis.call('HINCRBY', totals, 'settled:' .. lane, jobs)
  end
end
"""

# KEYS: result, batch, held, delayed, outstanding, totals.
# ARGV: batch id, prefix of the queued sets, result, seconds to keep it, channel, announcement,
#       final (1/0), settle here (1/0).
# A final result stays as it is: a batch that two workers ran, because one was taken for dead, is
# answered once, and no late part of an answer takes its place. Nor does a part take the place of
# one that goes further.
_STORE = (
    _SETTLE
    + """
local function reached(stored)
  return tonumber(string.match(string.sub(stored, 1, 60), '"PARTIAL","reached":(%d+)') or '0')
end
local before = redis.call('GET', KEYS[1])
if before and ARGV[7] == '0' and reached(before) > reached(ARGV[3]) then return end
if not before or string.find(string.sub(before, 1, 40), 'PARTIAL', 1, true) then
  redis.call('SET', KEYS[1], ARGV[3])
  if ARGV[7] == '0' then
    -- However long the rest takes: the jobs in it must not run again. The final one follows.
    redis.call('EXPIRE', KEYS[1], 604800)
  elseif ARGV[4] ~= '0' then
    redis.call('EXPIRE', KEYS[1], ARGV[4])
  end
  redis.call('PUBLISH', ARGV[5], ARGV[6])
elseif ARGV[7] == '0' then
  return
end
if ARGV[7] == '1' and ARGV[8] == '1' then
  settle(KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], ARGV[1], ARGV[2])
end
"""
)

# KEYS: as settle takes them, then the result. The batch may still be on its way into the ledger
# once more, after a lost reply: where results are kept elsewhere, this tells that it was answered.
# Never in place of a result: the two may be one server by two names.
_SETTLE += """
settle(KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[1], ARGV[2])
redis.call('SET', KEYS[6], 'elsewhere', 'EX', 300, 'NX')
"""


def _can_be_sent(outcome: Outcome | None) -> bool:
    try:
        orjson.dumps(outcome, default=fields_of)
    except TypeError:
        return False
    return True


class ResultBackend(RedisBackend):  # type: ignore[misc]  # Celery has no annotations
    """Stores, announces and settles. Named in the app's ``result_backend`` setting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = worker_settings.current()
        self._keys = Keys(settings.namespace)
        self._coordination: Redis | None = None
        if settings.coordination_url != settings.result_url:
            self._coordination = connect_threads(settings.coordination_url)

    def _add_driver_info(self) -> None:
        self.connparams.update(tls_options(self.connparams), **NO_INTRODUCTION)

    @cached_property
    def _store(self) -> Script:
        return self.client.register_script(_STORE)  # type: ignore[no-any-return]  # see above

    def exception_safe_to_retry(self, exc: Exception) -> bool:
        # Celery takes only a lost connection for passing. A Redis that is full or read-only for a
        # while says so in a reply, and a result that is not stored is a batch that never settles.
        return isinstance(exc, LOST)

    def encode(self, data: Any) -> bytes:
        try:
            return orjson.dumps(data, default=fields_of)
        except TypeError:
            # What a backend returned: text that is no Unicode, say. The other jobs are well.
            for place, outcome in enumerate(data["result"].outcomes):
                if not _can_be_sent(outcome):
                    error = InternalError("the backend's answer cannot be written as JSON")
                    data["result"].outcomes[place] = failed(error)
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
        # Celery reads the stored result first, so as not to overwrite a success, and then writes.
        # Here the script does both at once.
        meta = self._get_result_meta(
            result=result, state=state, traceback=traceback, request=request
        )
        meta["task_id"] = task_id
        if state == PARTIAL and isinstance(result, BatchResult):
            meta = {"status": state, "reached": result.reached, **meta}
        stored = self.encode(meta)
        self.ensure(self._store_and_settle, (task_id, stored, state in READY_STATES))
        return result

    def _store_and_settle(self, task_id: str, stored: bytes, final: bool) -> None:
        keys = self._keys
        ledger = [keys.batch(task_id), keys.held, keys.delayed, keys.outstanding, keys.totals]
        whose = (task_id, keys.queued_prefix)
        channel = keys.reply_channel(client_of(task_id))
        news = task_id.encode() + b"\n" + stored
        together = self._coordination is None
        self._store(
            keys=[self.get_key_for_task(task_id), *ledger],
            args=[
                *whose,
                *(stored, self.expires or 0, channel, news),
                *("1" if final else "0", "1" if together else "0"),
            ],
        )
        if final and self._coordination is not None:
            answered = keys.result(task_id)
            self._coordination.eval(_SETTLE, 1 + len(ledger), *ledger, answered, *whose)
