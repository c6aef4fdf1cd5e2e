"""How the fleet stands: one look at what Redis knows of lanes, workers and what went wrong."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Batches that no worker has begun."""
    oldest: float | None
    """Seconds since the first of these was published; None if there is none."""
    accepted: int
    """Jobs, ever since the namespace was first used."""
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
    dead_letters: int
    workers: tuple[WorkerInfo, ...]

    def lane(self, lane: Lane) -> LaneState:
        return next(each for each in self.lanes if each.lane is lane)


async def look(redis: RedisClient, keys: Keys) -> FleetState:
    """Asks the coordination Redis. Its errors are redis-py's."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.hgetall(keys.outstanding)
        pipe.hgetall(keys.totals)
        for key in (keys.held, keys.delayed, keys.slow, keys.indexing, keys.dead):
            pipe.zcard(key)
        for lane in Lane:
            pipe.zcard(keys.queued(lane.value))
            pipe.zrange(keys.queued(lane.value), 0, 0, withscores=True)
        (seconds, micros), outstanding, totals, *counts = await pipe.execute()
    running, delayed, extracting, indexing, dead, *queues = counts
    workers = await WorkerRegistry(redis, keys).alive()
    at = seconds + micros / 1e6
    lanes = []
    for lane, queued, first in zip(Lane, queues[::2], queues[1::2], strict=True):
        lanes.append(
            LaneState(
                lane=lane,
                outstanding=int(outstanding.get(lane.value.encode(), 0)),
                queued=queued,
                oldest=max(at - first[0][1] / 1000, 0.0) if first else None,
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
        dead_letters=dead,
        workers=tuple(workers),
    )
