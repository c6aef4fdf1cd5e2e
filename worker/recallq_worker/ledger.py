"""The worker's side of the ledger: which batches are whose, and what becomes of lost ones.

A worker claims a batch under a lease that it renews while it runs it. A second delivery of a batch
that a live worker holds, or that has been answered, finds nothing to do, so Celery may deliver as
often as it likes. A batch whose lease has run out, or whose message vanished on its way, is pushed
again from the copy in the ledger. The batch's hash and sets are described in `recallq.ledger`.

A batch is settled - its result stored, its entry removed - by the result backend in one step
(`recallq_worker.results`). So a message whose batch is not in the ledger is a leftover: its work
was done and answered, and only the acknowledgement was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import orjson
from celery.states import READY_STATES

from recallq.contract import AnyBatch, Batch, BatchResult, Lane, encode_batch
from recallq.envelope import CeleryEnvelope
from recallq.keys import Keys
from recallq.ledger import NOW, ProducerLedger, indexes
from recallq.redis_client import RedisClient
from recallq.signing import Signer

LEASE = 5.0
"""Seconds for which a worker that is silent keeps the batches it runs."""
RENEW_EVERY = 1.5
LOST_AFTER = 5.0
"""Seconds after which a message that left its queue, and that nobody has begun, counts as lost."""

_UNLIMITED = 2**53
_AT_ONCE = 100
"""Batches that one step of a sweep pushes again."""

# Lua: pushes a batch's message again, to where it is taken next, or last, with a delivery tag of
# its own: kombu tells the messages that it has not acknowledged apart by their tags. What users
# said cannot be taken for the tag, for its quotes are escaped.
REQUEUE = (
    NOW
    + """
local function requeue(batch, id, here, queued, queues, last)
  local message, lane, at, times = unpack(redis.call('HMGET', batch, 'm', 'l', 't', 'z'))
  local tag = '"delivery_tag":"' .. redis.sha1hex(id .. now .. (times or '')) .. '"'
  message = string.gsub(message, '"delivery_tag":"[^"]*"', tag, 1)
  redis.call('HSET', batch, 's', 'queued', 'q', now)
  redis.call('ZADD', queued .. lane, at, id)
  if here == '1' then
    redis.call(last and 'LPUSH' or 'RPUSH', queues .. lane, message)
    message = ''
  end
  return {lane, message}
end
"""
)

# KEYS: batch, held, delayed. ARGV: batch id, worker id, lease (ms), prefix of the queued sets.
# A worker that holds the batch already asks because the reply to its first claim was lost.
_CLAIM = (
    NOW
    + """
local state, lane, jobs, worker = unpack(redis.call('HMGET', KEYS[1], 's', 'l', 'n', 'w'))
if not jobs then return {'unknown'} end
local mine = state == 'running' and worker == ARGV[2]
local lease = redis.call('ZSCORE', KEYS[2], ARGV[1])
if state == 'running' and not mine and lease and tonumber(lease) > now then return {'busy'} end
local due = redis.call('ZSCORE', KEYS[3], ARGV[1])
if due and tonumber(due) > now then return {'busy'} end
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', ARGV[4] .. lane, ARGV[1])
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[3]), ARGV[1])
redis.call('HSET', KEYS[1], 's', 'running', 'w', ARGV[2])
redis.call('HDEL', KEYS[1], 'z', 'r')
local deliveries = redis.call('HINCRBY', KEYS[1], 'd', mine and 0 or 1)
local e, c, p, a, o, y = unpack(redis.call('HMGET', KEYS[1], 'e', 'c', 'p', 'a', 'o', 'y'))
local suspects = {}
if deliveries > 1 then
  for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
    local index = string.match(field, '^k(%d+)$')
    if index then suspects[#suspects + 1] = index .. ':' .. redis.call('HGET', KEYS[1], field) end
  end
end
local answers, begun = {}, {}
if y then
  for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
    local index = string.match(field, '^u(%d+)$')
    begun[#begun + 1] = string.match(field, '^g(%d+)$')
    if index then
      answers[#answers + 1] = index
      answers[#answers + 1] = redis.call('HGET', KEYS[1], field)
    end
  end
end
return {'claimed', deliveries, e or '', (c or '') .. (p or ''), a or '0',
        table.concat(suspects, ','), o or '{}', y or '', answers, begun}
"""
)

# KEYS: held, delayed. ARGV: worker id, lease (ms), prefixes of batches and queued sets, batch ids.
# Returns of each batch the indexes of the jobs that are asked to stop; "-" if it is not ours.
# One that was taken for lost, and that nobody has begun since, is ours again.
_RENEW = (
    NOW
    + """
local told = {}
for i = 5, #ARGV do
  local id, batch = ARGV[i], ARGV[3] .. ARGV[i]
  local worker, state, lane, c, p = unpack(redis.call('HMGET', batch, 'w', 's', 'l', 'c', 'p'))
  if worker ~= ARGV[1] then
    told[#told + 1] = '-'
  else
    told[#told + 1] = (c or '') .. (p or '')
    if state == 'running' or not redis.call('ZSCORE', KEYS[2], id) then
      redis.call('HSET', batch, 's', 'running')
      redis.call('ZREM', ARGV[4] .. lane, id)
      redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), id)
    end
  end
end
return told
"""
)

# KEYS: batch. ARGV: the index of the job that is run alone from now on, "" for none.
# The job that was, has survived it.
_ALONE = """
local survivor = redis.call('HGET', KEYS[1], 'r')
if survivor == ARGV[1] then return end
if survivor then redis.call('HDEL', KEYS[1], 'r', 'k' .. survivor) end
if ARGV[1] ~= '' and redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HSET', KEYS[1], 'r', ARGV[1])
  redis.call('HINCRBY', KEYS[1], 'k' .. ARGV[1], 1)
end
"""

# KEYS: batch, held, delayed. ARGV: batch id, worker id, delay (ms), line of history, open jobs.
_POSTPONE = (
    NOW
    + """
local worker, state = unpack(redis.call('HMGET', KEYS[1], 'w', 's'))
if worker ~= ARGV[2] or state ~= 'running' then return 0 end
local history = redis.call('HGET', KEYS[1], 'h') or ''
redis.call('HSET', KEYS[1], 's', 'queued', 'd', 0, 'h', history .. ARGV[4], 'o', ARGV[5])
redis.call('HDEL', KEYS[1], 'w')
redis.call('HINCRBY', KEYS[1], 'a', 1)
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[3], now + tonumber(ARGV[3]), ARGV[1])
return 1
"""
)

# KEYS: batch, held, delayed. ARGV: batch id, worker id, push here (1/0), prefixes of queued sets
#       and queues, delay (ms).
_RELEASE = (
    REQUEUE
    + """
local worker, state = unpack(redis.call('HMGET', KEYS[1], 'w', 's'))
if worker ~= ARGV[2] or state ~= 'running' then return false end
redis.call('HINCRBY', KEYS[1], 'd', -1)
local alone = redis.call('HGET', KEYS[1], 'r')
if alone then
  redis.call('HDEL', KEYS[1], 'r')
  redis.call('HINCRBY', KEYS[1], 'k' .. alone, -1)
end
redis.call('HDEL', KEYS[1], 'w')
redis.call('ZREM', KEYS[2], ARGV[1])
if ARGV[6] ~= '0' then
  redis.call('HSET', KEYS[1], 's', 'queued')
  redis.call('ZADD', KEYS[3], now + tonumber(ARGV[6]), ARGV[1])
  return false
end
return requeue(KEYS[1], ARGV[1], ARGV[3], ARGV[4], ARGV[5])
"""
)

# KEYS: held, or delayed. ARGV: push here (1/0), prefixes of queued sets, queues and batches, limit.
# Batches whose lease has run out, or whose next attempt is due. Returns the time (ms) of the next
# one, and what was pushed.
_DUE = (
    REQUEUE
    + """
local pushed = {}
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[5])
for _, id in ipairs(due) do
  redis.call('ZREM', KEYS[1], id)
  if redis.call('EXISTS', ARGV[4] .. id) == 1 then
    -- One whose jobs are in the slow lane is only looked after, and goes behind the others.
    local last = redis.call('HEXISTS', ARGV[4] .. id, 'y') == 1
    pushed[#pushed + 1] = requeue(ARGV[4] .. id, id, ARGV[1], ARGV[2], ARGV[3], last)
  end
end
local next = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return {next[2] and math.max(0, next[2] - now) or -1, pushed}
"""
)

# KEYS: queued. ARGV: push here (1/0), prefixes of queued sets, queues and batches, limit,
#       time (ms) before which what is queued has left its queue, patience (ms).
# The patience doubles with each push, so that a mistake about what left its queue stays cheap.
_LOST = (
    REQUEUE
    + """
local pushed = {}
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[6], 'LIMIT', 0, ARGV[5])
for _, id in ipairs(ids) do
  local batch = ARGV[4] .. id
  local state, at, again, times = unpack(redis.call('HMGET', batch, 's', 't', 'q', 'z'))
  if state ~= 'queued' then
    redis.call('ZREM', KEYS[1], id)
  elseif now - tonumber(again or at) >= tonumber(ARGV[7]) * 2 ^ math.min(times or 0, 10) then
    redis.call('HINCRBY', batch, 'z', 1)
    pushed[#pushed + 1] = requeue(batch, id, ARGV[1], ARGV[2], ARGV[3])
  end
end
return pushed
"""
)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that is to be tried again."""

    due: float
    """Not before this moment, in seconds since the epoch."""
    attempts: int
    """How often it has been run."""


@dataclass(frozen=True, slots=True)
class NextRun:
    """Of a batch of which jobs are to be tried again."""

    delay: float
    """Seconds until the first of them is due."""
    history: Mapping[str, Any]
    """``at``, and ``errors`` by index, of the run that has ended."""
    waiting: Mapping[int, Waiting]
    """The jobs."""

    def arguments(self) -> list[str | int | bytes]:
        """For scripts: delay (ms), line of history, open jobs."""
        jobs = {str(index): (each.due, each.attempts) for index, each in self.waiting.items()}
        line = orjson.dumps(self.history) + b"\n"
        return [int(self.delay * 1000), line, orjson.dumps(jobs)]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a worker learns as it begins a batch."""

    epochs: list[int]
    """Deletion epoch of each job."""
    deliveries: int = 1
    """How often the batch was begun since a run of it last came to an end, this time included: more
    than once means that a worker died, or was taken for dead, while it ran the batch."""
    attempts: int = 0
    """How many runs ended with jobs that were to be tried again."""
    cancelled: frozenset[int] = field(default_factory=frozenset)
    """Indexes of the jobs that were cancelled."""
    waiting: dict[int, Waiting] = field(default_factory=dict)
    """The jobs that are to be tried again."""
    deaths: dict[int, int] = field(default_factory=dict)
    """How often a worker died while it ran nothing of the batch but the job of this index."""
    handed_over: bool = False
    """Whether the jobs that are open were handed to the slow lane."""
    answers: dict[int, bytes] = field(default_factory=dict)
    """What the slow lane says of them, of those that it is done with."""
    begun: frozenset[int] = field(default_factory=frozenset)
    """Indexes of those that the slow lane has begun, or that were stored before they came there."""

    @property
    def first(self) -> bool:
        """Whether nobody has begun the batch before."""
        return self.deliveries == 1 and self.attempts == 0 and not self.handed_over


class WorkerLedger:
    """The ledger as one worker process uses it."""

    def __init__(
        self,
        redis: RedisClient,
        broker: RedisClient,
        results: RedisClient,
        keys: Keys,
        worker_id: str,
        *,
        one_step: bool,
        signer: Signer | None = None,
    ) -> None:
        """`one_step`: whether `redis` is the broker's too, so that a script can push messages.
        `signer` signs those that are written here."""
        self._signer = signer
        self._redis = redis
        self._broker = broker
        self._results = results
        self._keys = keys
        self.worker_id = worker_id
        self._here = "1" if one_step else "0"
        self._queue_prefix = f"{keys.namespace}."
        self._unlisted = ProducerLedger(redis, keys, _UNLIMITED)
        self._claim = redis.register_script(_CLAIM)
        self._renew = redis.register_script(_RENEW)
        self._alone = redis.register_script(_ALONE)
        self._postpone = redis.register_script(_POSTPONE)
        self._release = redis.register_script(_RELEASE)
        self._due = redis.register_script(_DUE)
        self._lost = redis.register_script(_LOST)

    # --- one batch ------------------------------------------------------------------------------

    async def claim(self, batch: AnyBatch) -> Claim | None:
        """Begins `batch`; None if it was answered, or if a live worker runs it, or if its next
        attempt is not due.

        A batch that a client entered in the ledger and that is there no more was settled, however
        long ago. Only one that plain Celery published was never there; it is entered now.
        """
        verdict, *found = await self._try_to_claim(batch.id)
        if verdict == b"unknown" and not batch.listed and await self.answer(batch.id) is None:
            listed = batch.model_copy(update={"listed": True})
            message = self._envelope.wrap(
                batch.id,
                batch.operation,
                encode_batch(listed),
                batch.lane.queue(self._keys.namespace),
            )
            await self._unlisted.enter(cast("Batch[Any]", batch), message, enqueue=False)
            verdict, *found = await self._try_to_claim(batch.id)
        if verdict != b"claimed":
            return None
        (
            deliveries,
            epochs,
            cancelled,
            attempts,
            suspects,
            waiting,
            handed_over,
            answers,
            begun,
        ) = found
        return Claim(
            epochs=_epochs(epochs),
            deliveries=int(deliveries),
            attempts=int(attempts),
            cancelled=indexes(cancelled),
            waiting={
                int(index): Waiting(due, times)
                for index, (due, times) in orjson.loads(waiting).items()
            },
            deaths={
                int(index): int(times)
                for index, _, times in (each.partition(b":") for each in suspects.split(b","))
                if index
            },
            handed_over=bool(handed_over),
            answers={
                int(index): answer
                for index, answer in zip(answers[::2], answers[1::2], strict=True)
            },
            begun=frozenset(map(int, begun)),
        )

    @cached_property
    def _envelope(self) -> CeleryEnvelope:
        return CeleryEnvelope(self.worker_id, self._signer)

    async def _try_to_claim(self, batch_id: str) -> list[Any]:
        keys = [self._keys.batch(batch_id), self._keys.held, self._keys.delayed]
        args: list[str | int] = [
            batch_id,
            self.worker_id,
            int(LEASE * 1000),
            self._keys.queued_prefix,
        ]
        return cast("list[Any]", await self._claim(keys=keys, args=args))

    async def answer(self, batch_id: str) -> tuple[BatchResult, bool] | None:
        """What has been stored of a batch's result, and whether that is all of it."""
        stored = await self._results.get(self._keys.result(batch_id))
        if stored is None:
            return None
        meta = orjson.loads(stored)
        final = meta.get("status") in READY_STATES
        result = meta.get("result")
        if final and not (isinstance(result, dict) and "outcomes" in result):
            return BatchResult(), True  # what Celery says of a task that failed
        return BatchResult.model_validate(result), final

    async def entry(self, batch_id: str) -> tuple[Lane, list[int]] | None:
        """Lane and epochs of an outstanding batch."""
        found = await self._redis.hmget(self._keys.batch(batch_id), ["l", "e"])
        lane, epochs = cast("list[bytes | None]", found)
        if lane is None:
            return None
        return Lane(lane.decode()), _epochs(epochs)

    async def alone(self, batch_id: str, index: int | None) -> None:
        """Says that of the batch only job `index` runs from now on; None ends it."""
        await self._alone(keys=[self._keys.batch(batch_id)], args=["" if index is None else index])

    async def history(self, batch_id: str) -> list[dict[str, Any]]:
        """What `postpone` was told, oldest first."""
        lines = await self._redis.hget(self._keys.batch(batch_id), "h")
        return [orjson.loads(line) for line in (lines or b"").splitlines()]

    async def postpone(self, batch_id: str, next_run: NextRun) -> bool:
        """Ends a run of which jobs are left to be tried again. False if the batch is not ours any
        more."""
        keys = [self._keys.batch(batch_id), self._keys.held, self._keys.delayed]
        args = [batch_id, self.worker_id, *next_run.arguments()]
        return bool(await self._postpone(keys=keys, args=args))

    async def release(self, batch_id: str, delay: float = 0.0) -> None:
        """Hands a batch back that was begun and shall be run by another, or later."""
        pushed = await self._release(
            keys=[self._keys.batch(batch_id), self._keys.held, self._keys.delayed],
            args=[
                batch_id,
                self.worker_id,
                self._here,
                self._keys.queued_prefix,
                self._queue_prefix,
                int(delay * 1000),
            ],
        )
        await self.push([pushed] if pushed else [])

    async def leave(self, batch_id: str, delay: Callable[[int], float]) -> bool:
        """Hands back a batch that was delivered here, for another to run. False if it is not
        outstanding. `delay` says for how long it stays away when it is left for the nth time."""
        state = (await self._try_to_claim(batch_id))[0]
        if state == b"claimed":
            times = await self._redis.hincrby(self._keys.batch(batch_id), "v", 1)
            await self.release(batch_id, delay(times))
        return bool(state != b"unknown")

    @property
    def script_arguments(self) -> list[str]:
        """What scripts that push batches take: push here (1/0), and the prefixes of queued sets,
        queues and batches."""
        keys = self._keys
        return [self._here, keys.queued_prefix, self._queue_prefix, keys.batch_prefix]

    async def ping(self) -> None:
        """Whether Redis answers."""
        await self._redis.ping()

    # --- all batches ----------------------------------------------------------------------------

    async def renew(self, batch_ids: Sequence[str]) -> dict[str, frozenset[int] | None]:
        """Keeps the leases of batches that run here.

        Returns the indexes of the jobs that are asked to stop, None for a batch that another worker
        has taken over.
        """
        keys = self._keys
        told = await self._renew(
            keys=[keys.held, keys.delayed],
            args=[
                self.worker_id,
                int(LEASE * 1000),
                keys.batch_prefix,
                keys.queued_prefix,
                *batch_ids,
            ],
        )
        return {
            batch_id: None if stop == b"-" else indexes(stop)
            for batch_id, stop in zip(batch_ids, told, strict=True)
        }

    async def take_over(self) -> int:
        """Pushes the batches again whose worker has let its lease run out; says how many."""
        _, pushed = await self._due(keys=[self._keys.held], args=self._sweeping())
        await self.push(pushed)
        return len(pushed)

    async def try_again(self) -> float | None:
        """Pushes the batches whose next attempt is due; returns the seconds until one will be."""
        wait, pushed = await self._due(keys=[self._keys.delayed], args=self._sweeping())
        await self.push(pushed)
        return None if wait < 0 else float(wait) / 1000

    async def send_again(self, lane: Lane) -> int:
        """Pushes the batches again whose message left its queue and never came to be begun.

        A queue is first in, first out: what was published before the message that is next in it has
        left it.
        """
        seconds, micros = await self._redis.time()
        before = seconds * 1000 + micros // 1000 - int(LOST_AFTER * 1000)
        queued = self._keys.queued(lane.value)
        if not await self._redis.zcount(queued, "-inf", f"({before}"):
            return 0
        next_message = await self._broker.lindex(lane.queue(self._keys.namespace), -1)
        if next_message is not None:
            at = await self._redis.hget(self._keys.batch(_task_id(next_message)), "t")
            if at is None:
                return 0  # a leftover, or not ours: somebody will take it, and then we see
            before = min(before, int(at))
        args = [*self._sweeping(), before, int(LOST_AFTER * 1000)]
        pushed = await self._lost(keys=[queued], args=args)
        await self.push(pushed)
        return len(pushed)

    def _sweeping(self) -> list[str | int]:
        return [*self.script_arguments, _AT_ONCE]

    async def push(self, messages: Iterable[Sequence[bytes]]) -> None:
        """Pushes what a script could not, because the broker is another Redis. What is lost by a
        crash before this counts as lost like any other message, and is sent again."""
        for lane, message in messages:
            if message:
                await self._broker.rpush(self._queue_prefix + lane.decode(), message)


def _epochs(joined: bytes | None) -> list[int]:
    return [int(each) for each in (joined or b"").split(b",") if each]


def _task_id(message: bytes | str) -> str:
    """The id of the task in a queue's message; empty if there is none to be read."""
    try:
        return str(orjson.loads(message)["headers"]["id"])
    except (ValueError, TypeError, LookupError):
        return ""
