"""The worker's side of the ledger: claiming a batch, and what a claim tells.

A batch is settled - its result stored, its entry removed - by the result backend in one step
(`recallq_worker.results`). So a message whose batch is not in the ledger is a leftover: its work
was done and answered, and only the acknowledgement was lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import orjson
from celery.states import READY_STATES

from recallq.contract import AnyBatch, Operation
from recallq.keys import Keys
from recallq.redis_client import RedisClient

# KEYS: batch. ARGV: worker id.
_CLAIM = """
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
redis.call('HSET', KEYS[1], 's', 'running', 'w', ARGV[1])
local cancelled = {}
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  cancelled[#cancelled + 1] = string.match(field, '^c(%d+)$')
end
return {redis.call('HINCRBY', KEYS[1], 'd', 1), redis.call('HGET', KEYS[1], 'e') or '',
        table.concat(cancelled, ',')}
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a worker learns as it begins a batch."""

    epochs: list[int]
    """Deletion epoch of each job; empty for reads."""
    deliveries: int = 1
    """How often the batch has been begun, this time included."""
    cancelled: frozenset[int] = field(default_factory=frozenset)
    """Indexes of the jobs that were cancelled while they were queued."""


class WorkerLedger:
    """Claims batches for one worker process."""

    def __init__(self, redis: RedisClient, results: RedisClient, keys: Keys) -> None:
        self._redis = redis
        self._results = results
        self._keys = keys
        self._claim = redis.register_script(_CLAIM)

    async def claim(self, batch: AnyBatch, worker_id: str) -> Claim | None:
        """Begins `batch`; None if the ledger does not know it."""
        found = await self._claim(keys=[self._keys.batch(batch.id)], args=[worker_id])
        if found is None:
            return None
        deliveries, epochs, cancelled = found
        return Claim(
            epochs=[int(each) for each in epochs.split(b",") if each],
            deliveries=int(deliveries),
            cancelled=frozenset(int(each) for each in cancelled.split(b",") if each),
        )

    async def claim_unlisted(self, batch: AnyBatch) -> Claim:
        """Begins a batch that was published without a ledger, as submitted at this moment."""
        epochs: list[int] = []
        for job in batch.jobs:
            key = self._keys.epochs(job.scope.tenant, job.scope.user_id)
            if batch.operation is Operation.DELETE:
                epochs.append(int(await self._redis.hincrby(key, "n", 1)))
            elif batch.operation is Operation.ADD:
                epochs.append(int(await self._redis.hget(key, "n") or 0))
        return Claim(epochs)

    async def has_result(self, batch_id: str) -> bool:
        """Whether the batch was answered, and not only in part."""
        stored = await self._results.get(self._keys.result(batch_id))
        return stored is not None and orjson.loads(stored).get("status") in READY_STATES
