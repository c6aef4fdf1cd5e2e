"""How the fleet stands: one look at what Redis knows of lanes, workers and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recallq.contract import Lane
from recallq.keys import Keys
from recallq.redis_client import RedisClient
from recallq.workers import WorkerInfo, WorkerRegistry


@dataclass(frozen=True, slots=True)
class LaneState:
    """One lane."""

    lane: Lane
    outstanding: int
    """Jobs that were accepted and have not settled."""
    queued: int
    """Batches whose message waits for a worker."""
    oldest: float | None
    """Seconds for which the first of these has waited; None if there is none."""
    accepted: int
    """Jobs, since they were first counted here."""
    settled: int
    """The same, of those that have come to their end."""
    workers: int
    """Worker processes that take the lane."""


@dataclass(frozen=True, slots=True)
class FleetState:
    """Everything, at one moment."""

    at: float
    """Seconds since the epoch, on the coordination Redis's clock."""
    lanes: tuple[LaneState, ...]
    running: int
    """Batches that a worker holds under a lease."""
    delayed: int
    """Batches that wait for another attempt, or for the slow lane."""
    extracting: int
    """Users for whom writes wait in the slow lane, or are worked on."""
    indexing: int
    """Batches whose adds are stored and not yet searchable."""
    slow_waits: float | None
    """Seconds for which the first of these two that are due has waited for a worker; None if none
    waits."""
    dead_letters: int
    workers: tuple[WorkerInfo, ...]
    memory: int = 0
    """Bytes that the coordination Redis uses of those that count."""
    memory_limit: int = 0
    """Bytes from which on it takes no writes; 0 if there is no such limit."""

    @property
    def full(self) -> bool:
        """Whether Redis takes no writes, for want of memory. Then no worker gives a sign of life
        either."""
        return 0 < self.memory_limit <= self.memory

    @property
    def outstanding(self) -> int:
        """Jobs of all lanes."""
        return sum(each.outstanding for each in self.lanes)

    def lane(self, lane: Lane) -> LaneState:
        return next(each for each in self.lanes if each.lane is lane)


async def look(redis: RedisClient, keys: Keys) -> FleetState:
    """Asks the coordination Redis. Its errors are redis-py's."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.info("memory")
        pipe.hgetall(keys.outstanding)
        pipe.hgetall(keys.totals)
        for key in (keys.held, keys.delayed, keys.slow, keys.indexing, keys.dead):
            pipe.zcard(key)
        for key in (keys.slow, keys.indexing):
            pipe.zrange(key, 0, 0, withscores=True)
        for lane in Lane:
            pipe.zcard(keys.queued(lane.value))
            pipe.zrange(keys.queued(lane.value), 0, 0)
        (seconds, micros), memory, outstanding, totals, *counts = await pipe.execute()
    running, delayed, extracting, indexing, dead, *counts = counts
    first_due, queues = [*counts[0], *counts[1]], counts[2:]
    workers = await WorkerRegistry(redis, keys).alive()
    at = seconds + micros / 1e6
    # Of those that somebody works on, the score is when that lease ends.
    slow_waits = max((at - due / 1000 for _, due in first_due), default=-1.0)
    firsts = [found[0].decode() if found else None for found in queues[1::2]]
    waiting = await _waiting_since(redis, keys, firsts)
    lanes = []
    for lane, queued, since in zip(Lane, queues[::2], waiting, strict=True):
        lanes.append(
            LaneState(
                lane=lane,
                outstanding=int(outstanding.get(lane.value.encode(), 0)),
                queued=queued,
                oldest=None if since is None else max(at - since / 1000, 0.0),
                accepted=int(totals.get(b"accepted:%b" % lane.value.encode(), 0)),
                settled=int(totals.get(b"settled:%b" % lane.value.encode(), 0)),
                workers=sum(lane in each.lanes for each in workers),
            )
        )
    return FleetState(
        at=at,
        lanes=tuple(lanes),
        running=running,
        delayed=delayed,
        extracting=extracting,
        indexing=indexing,
        slow_waits=slow_waits if slow_waits > 0 else None,
        dead_letters=dead,
        workers=tuple(workers),
        memory=memory_used(memory),
        memory_limit=memory_limit(memory),
    )


def memory_used(info: Mapping[str, Any]) -> int:
    """Bytes that count against the limit, by what INFO says."""
    return max(int(info["used_memory"]) - int(info.get("mem_not_counted_for_evict", 0)), 0)


def memory_limit(info: Mapping[str, Any]) -> int:
    """Bytes from which on a Redis takes no writes; 0 if it has no limit, or throws keys away."""
    throws_away = info.get("maxmemory_policy", "noeviction") != "noeviction"
    return 0 if throws_away else int(info.get("maxmemory", 0))


async def _waiting_since(
    redis: RedisClient, keys: Keys, batch_ids: list[str | None]
) -> list[int | None]:
    """Since when (ms) the messages of batches have been in their queues; None where there is none.
    One that was run before, and is to be run again, was pushed a second time."""
    async with redis.pipeline(transaction=False) as pipe:
        for batch_id in batch_ids:
            pipe.hmget(keys.batch(batch_id or ""), ["q", "t"])
        found = await pipe.execute()
    return [next((int(each) for each in times if each is not None), None) for times in found]
