"""The ledger of outstanding batches, as the producer writes it and handles read it.

A batch is entered here in the same step that makes it a Celery message, and leaves when its result
is stored, so "accepted and not settled" is a fact in Redis rather than a guess: handles tell queued
from running from unknown by it, lanes count their jobs by it, and the message's copy in it lets a
lost message be sent again. The worker's side is `recallq_worker.ledger`.

A batch is in exactly one of three sorted sets: queued (one per lane), held by a worker under a
lease, or delayed until its next attempt. Its hash:

    s state   l lane   n jobs   e the jobs' deletion epochs   m the Celery message
    t time of publication (ms)   q, z when and how often its message was pushed again
    w worker   d deliveries since the last run that ended   a attempts that ended in trouble
    h history: a JSON line per attempt   o the jobs to be tried again: when, and how often they ran
    r the job that is run alone   k<i> how often job i was run alone and did not come to an end
    c, p indexes of the jobs that were cancelled while queued, asked to stop while running: "3,17,"
    x jobs that no longer count as outstanding   v how often it was left to newer workers
    y set once the open jobs were handed to the slow lane; then the batch is delayed until one of
      them is answered there   g<i> set while job i is worked on there   u<i> job i's answer

Deletion epochs: every job carries an epoch, and a delete concerns what has a lower one. They are
given inside the publishing script, so a job is before or after a delete beyond doubt. A delete's is
higher than all that its user was given before, and the user's later jobs have at least that. They
are taken from a clock that never goes back, so that epochs go on rising even if Redis lost its data
and a store elsewhere kept its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import orjson

from recallq.contract import AddJob, AnyJob, Batch, DeleteJob, JobState, Operation, key_digest
from recallq.errors import QueueFull
from recallq.keys import Keys
from recallq.redis_client import RedisClient

_KEYS_LIVE = 7 * 24 * 3600
"""Seconds for which the idempotency key of a delete is remembered."""

NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
"""Lua: `now` in milliseconds."""

# KEYS: batch, queued, outstanding, queue, result, clock, whether memories are extracted, totals,
#       then of each user the epoch hash and the set of adds, or deletes, that are on their way.
# ARGV: batch id, lane, jobs, high-water mark, operation, message, enqueue here (1/0),
#       "1,1,2": the user of each job, "3,3,0": the jobs' epochs where they are known already,
#       of deletes with idempotency keys "d1,,d3": each job's, seconds to remember these,
#       of adds "123,124,": their order keys; of deletes then: each job's session, "" for all.
# Repeating it after a lost reply is harmless: a batch that is in the ledger is not entered again,
# nor one that was answered in the meantime, where results are kept on the same Redis.
_PUBLISH = (
    """
if redis.call('EXISTS', KEYS[1], KEYS[5]) > 0 then return {1, 0} end
local outstanding = tonumber(redis.call('HGET', KEYS[3], ARGV[2]) or '0')
if outstanding >= tonumber(ARGV[4]) then return {0, outstanding} end
"""
    + NOW
    + """
local epochs = ARGV[9]
if epochs == '' then
  local clock = tonumber(redis.call('GET', KEYS[6]) or '0')
  if now > clock then
    clock = now
    redis.call('SET', KEYS[6], clock)
  end
  local each, digests = {}, {}
  for digest in string.gmatch(ARGV[10], '([^,]*),') do digests[#digests + 1] = digest end
  for user in string.gmatch(ARGV[8], '%d+') do
    local key = KEYS[7 + 2 * tonumber(user)]
    local last = tonumber(redis.call('HGET', key, 'n') or '0')
    if ARGV[5] == 'delete' then
      local digest = digests[#each + 1] or ''
      local known = digest ~= '' and redis.call('GET', key .. ':' .. digest)
      local epoch = known or string.format('%d', math.max(last + 1, clock))
      if not known then redis.call('HSET', key, 'n', epoch) end
      if digest ~= '' then redis.call('SET', key .. ':' .. digest, epoch, 'EX', ARGV[11]) end
      each[#each + 1] = epoch
    else
      each[#each + 1] = string.format('%d', math.max(last, clock - 1))
    end
  end
  epochs = table.concat(each, ',')
end
local delete = ARGV[5] == 'delete'
if (delete or ARGV[12] ~= '') and redis.call('GET', KEYS[7]) ~= '0' then
  -- Extractions wait for what was submitted before; before the first worker there may be some as
  -- well. Remembered for as long as what came of an add is.
  local index, users = 0, {}
  for user in string.gmatch(ARGV[8], '%d+') do users[#users + 1] = tonumber(user) end
  for place in string.gmatch(delete and epochs or ARGV[12], '%d+') do
    local coming = KEYS[8 + 2 * users[index + 1]]
    local session = delete and '|' .. ARGV[13 + index] or ''
    redis.call('ZADD', coming, place, ARGV[1] .. '-' .. index .. session)
    redis.call('EXPIRE', coming, 2592000)
    index = index + 1
  end
end
redis.call('HSET', KEYS[1], 's', 'queued', 'l', ARGV[2], 'n', ARGV[3],
           'e', epochs, 'm', ARGV[6], 't', now)
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('HINCRBY', KEYS[3], ARGV[2], ARGV[3])
redis.call('HINCRBY', KEYS[8], 'accepted:' .. ARGV[2], ARGV[3])
if ARGV[7] == '1' then redis.call('LPUSH', KEYS[4], ARGV[6]) end
return {1, outstanding}
"""
)

# KEYS: batch, outstanding. ARGV: the job's index.
# A cancelled job gives back its place below the high-water mark at once.
_CANCEL = """
local state, jobs, lane = unpack(redis.call('HMGET', KEYS[1], 's', 'n', 'l'))
if not jobs or tonumber(ARGV[1]) >= tonumber(jobs) then return false end
local there, answered = unpack(redis.call('HMGET', KEYS[1], 'g' .. ARGV[1], 'u' .. ARGV[1]))
if there or answered then state = 'running' end
local field = state == 'queued' and 'c' or 'p'
local marks = redis.call('HGET', KEYS[1], field) or ''
local mark = ARGV[1] .. ','
if not string.find(',' .. marks, ',' .. mark, 1, true) then
  redis.call('HSET', KEYS[1], field, marks .. mark)
  if field == 'c' then
    redis.call('HINCRBY', KEYS[1], 'x', 1)
    redis.call('HINCRBY', KEYS[2], lane, -1)
  end
end
return state
"""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What the ledger says of one job of an outstanding batch."""

    state: JobState
    jobs: int


class ProducerLedger:
    """Enters batches, and answers for jobs that have not settled."""

    def __init__(self, redis: RedisClient, keys: Keys, high_water_mark: int) -> None:
        self._redis = redis
        self._keys = keys
        self._high_water_mark = high_water_mark
        self._publish = redis.register_script(_PUBLISH)
        self._cancel = redis.register_script(_CANCEL)

    async def enter(
        self,
        batch: Batch[AnyJob],
        message: bytes,
        *,
        enqueue: bool,
        epochs: Sequence[int] | None = None,
    ) -> None:
        """Enters `batch`, and with `enqueue` pushes `message` onto its queue in the same step.

        `epochs` are given for jobs that were submitted before, and are as old as they were then.
        Raises `QueueFull`, in which case nothing was written.
        """
        users: dict[str, int] = {}
        user_of_job: list[str] = []
        if batch.operation is not Operation.HEALTH:
            for job in batch.jobs:
                tag = self._keys.user_tag(job.scope.tenant, job.scope.user_id)
                user_of_job.append(str(users.setdefault(tag, len(users) + 1)))
        queue = batch.lane.queue(self._keys.namespace)
        accepted, outstanding = await self._publish(
            keys=[
                self._keys.batch(batch.id),
                self._keys.queued(batch.lane.value),
                self._keys.outstanding,
                queue,
                self._keys.result(batch.id),
                self._keys.clock,
                self._keys.extracts,
                self._keys.totals,
                *(key for tag in users for key in self._of_user(tag, batch.operation)),
            ],
            args=[
                batch.id,
                batch.lane.value,
                len(batch.jobs),
                self._high_water_mark,
                batch.operation.value,
                message,
                "1" if enqueue else "0",
                ",".join(user_of_job),
                ",".join(map(str, epochs or ())),
                _digests(batch),
                _KEYS_LIVE,
                "".join(f"{job.order}," for job in batch.jobs if isinstance(job, AddJob)),
                *(job.scope.session_id or "" for job in batch.jobs if isinstance(job, DeleteJob)),
            ],
        )
        if not accepted:
            raise QueueFull(
                f"lane {batch.lane.value} holds {outstanding:,} outstanding jobs and its "
                f"high-water mark is {self._high_water_mark:,}; try again later, "
                "or start more workers",
                retry_after=1.0,
            )

    def _of_user(self, tag: str, operation: Operation) -> tuple[str, str]:
        deletes = operation is Operation.DELETE
        on_their_way = self._keys.deleting(tag) if deletes else self._keys.coming(tag)
        return self._keys.epochs_of(tag), on_their_way

    async def look_up(self, batch_id: str, index: int) -> LedgerEntry | None:
        """The state of job `index`; None if the batch is not outstanding."""
        fields = ["s", "n", "c", f"g{index}", f"u{index}"]
        found = await self._redis.hmget(self._keys.batch(batch_id), fields)
        state, jobs, cancelled, worked_on, answered = cast("list[bytes | None]", found)
        if state is None or jobs is None:
            return None
        if worked_on is not None or answered is not None:
            return LedgerEntry(JobState.RUNNING, int(jobs))
        if index in indexes(cancelled):
            return LedgerEntry(JobState.CANCELLED, int(jobs))
        return LedgerEntry(JobState(state.decode()), int(jobs))

    async def deadline(self, batch_id: str, index: int) -> float | None:
        """The deadline of a job that is in the ledger, if it has one. Reads the whole batch."""
        message = await self._redis.hget(self._keys.batch(batch_id), "m")
        try:
            (payload,), _, _ = orjson.loads(orjson.loads(message or b"")["body"])
            deadline = orjson.loads(payload)["jobs"][index]["deadline"]
        except (ValueError, TypeError, LookupError):
            return None  # settled in the meantime, or not written by us
        return None if deadline is None else float(deadline)

    async def trouble(self, batch_id: str, index: int) -> str | None:
        """What the last attempt at a job that has not settled ended with, if there was one."""
        history = cast("bytes | None", await self._redis.hget(self._keys.batch(batch_id), "h"))
        if history is None:
            return None
        last: dict[str, str] = orjson.loads(history.splitlines()[-1])["errors"]
        return last.get(str(index))

    async def cancel(self, batch_id: str, index: int) -> JobState | None:
        """Marks a job as cancelled, or as asked to stop if a worker has begun its batch.

        Returns the batch's state, None if the ledger does not know the job.
        """
        state = await self._cancel(
            keys=[self._keys.batch(batch_id), self._keys.outstanding], args=[index]
        )
        return None if state is None else JobState(cast("bytes", state).decode())


def _digests(batch: Batch[AnyJob]) -> str:
    """Of deletes: ``d1,,d3,``, what stands for each job's idempotency key; else nothing."""
    if batch.operation is not Operation.DELETE:
        return ""
    keys = [job.idempotency_key if isinstance(job, DeleteJob) else None for job in batch.jobs]
    if not any(keys):
        return ""
    return "".join(
        (key_digest(job.scope, key) if key else "") + ","
        for job, key in zip(batch.jobs, keys, strict=True)
    )


def indexes(marks: bytes | None) -> frozenset[int]:
    """The job indexes in ``3,17,``."""
    return frozenset(int(each) for each in (marks or b"").split(b",") if each)
