"""What breaks, and when: seeded moments at which a part of the system is hit.

Faults come in rounds, each kind once per round in an order of its own, so that even a short run
meets all of them. Most are over at once; a frozen worker stays frozen while others strike.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from redis.exceptions import RedisError

from recallq.embedded import EmbeddedRedis
from recallq.keys import Keys
from recallq.redis_client import RedisClient
from tests.chaos.fleet import Fleet, Member
from tests.chaos.weather import STORM, set_weather
from tests.support import redis_at


class Fault(StrEnum):
    KILL_WORKER = "workers killed"
    STOP_WORKER = "workers stopped"
    FREEZE_WORKER = "workers frozen"
    KILL_PRODUCER = "producers killed"
    CUT_CONNECTIONS = "rounds of connections cut"
    CUT_SUBSCRIPTIONS = "rounds of subscriptions cut"
    RESTART_REDIS = "Redis restarted"
    KILL_REDIS = "Redis killed"
    STORM = "backend storms"


class Faults:
    """Breaks a fleet and its Redis."""

    def __init__(
        self,
        fleet: Fleet,
        server: EmbeddedRedis,
        *,
        namespace: str,
        weather_file: Path,
        weather: dict[str, float],
        kinds: Sequence[Fault],
        every: float,
        longest_freeze: float,
        chance: random.Random,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.recoveries: list[float] = []
        """Seconds from each kill of a worker until all that it held had settled."""
        self._fleet = fleet
        self._server = server
        self._keys = Keys(namespace)
        self._weather_file = weather_file
        self._weather = weather
        self._kinds = list(kinds)
        self._every = every
        self._longest_freeze = longest_freeze
        self._chance = chance
        self._background: set[asyncio.Task[None]] = set()

    async def strike(self) -> None:
        """One fault after another, for ever."""
        set_weather(self._weather_file, self._weather)
        while self._kinds:
            for fault in self._chance.sample(self._kinds, len(self._kinds)):
                await asyncio.sleep(self._chance.uniform(0.5, 1.5) * self._every)
                await self._do(fault)

    async def calm_down(self) -> None:
        """Waits for what is still under way, and ends bad weather."""
        await asyncio.gather(*self._background)
        set_weather(self._weather_file, {})

    async def _do(self, fault: Fault) -> None:
        match fault:
            case Fault.KILL_WORKER | Fault.STOP_WORKER | Fault.FREEZE_WORKER:
                workers = self._fleet.free(self._fleet.workers)
                if workers:
                    self._in_background(self._hit(fault, self._chance.choice(workers)))
            case Fault.KILL_PRODUCER:
                for producer in self._fleet.free(self._fleet.producers)[:1]:
                    await self._fleet.kill_producer(producer)
                    self.counts[fault] += 1
            case Fault.CUT_CONNECTIONS:
                await self._cut(fault, "normal")
            case Fault.CUT_SUBSCRIPTIONS:
                await self._cut(fault, "pubsub")
            case Fault.RESTART_REDIS | Fault.KILL_REDIS:
                await self._restart_redis(fault)
            case Fault.STORM:
                self._in_background(self._storm())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _hit(self, fault: Fault, worker: Member) -> None:
        self.counts[fault] += 1
        match fault:
            case Fault.KILL_WORKER:
                pid = worker.pid
                with self._fleet.holding(worker):
                    await self._wait_until_busy(pid)
                    at = await worker.kill()
                await self._time_recovery(pid, at)
            case Fault.STOP_WORKER:
                if not await self._fleet.stop_and_replace(worker):
                    self.counts["workers that did not stop when told"] += 1
            case _:
                seconds = self._chance.uniform(1, self._longest_freeze)
                with self._fleet.holding(worker):
                    await self._wait_until_busy(worker.pid)
                    await worker.freeze(seconds)

    async def _cut(self, fault: Fault, kind: str) -> None:
        async with redis_at(self._server.url) as redis:
            with contextlib.suppress(RedisError, OSError):
                cut = await redis.client_kill_filter(_type=kind)
                self.counts["connections cut"] += int(cut)
                self.counts[fault] += 1

    async def _restart_redis(self, fault: Fault) -> None:
        if fault is Fault.KILL_REDIS:
            await asyncio.to_thread(self._server.kill)
            await asyncio.sleep(self._chance.uniform(0, 1.0))
            await asyncio.to_thread(self._server.start)
        else:
            await asyncio.to_thread(self._server.restart)
        await keep_every_write(self._server)
        self.counts[fault] += 1

    async def _storm(self) -> None:
        self.counts[Fault.STORM] += 1
        set_weather(self._weather_file, STORM)
        await asyncio.sleep(self._chance.uniform(0.5, 2.0))
        set_weather(self._weather_file, self._weather)

    # --- what workers hold ----------------------------------------------------------------------

    async def _wait_until_busy(self, pid: int) -> None:
        """Waits for a moment at which it hurts, for a second at most; now and then, for none."""
        deadline = time.monotonic() + self._chance.choice((0.0, 1.0, 1.0))
        async with redis_at(self._server.url) as redis:
            while time.monotonic() < deadline:
                with contextlib.suppress(RedisError, OSError):
                    if await self._held_by(redis, pid):
                        return
                await asyncio.sleep(0.002)

    async def _time_recovery(self, pid: int, killed_at: float) -> None:
        """How long it takes until nothing is left of what a killed worker held."""
        async with redis_at(self._server.url) as redis:
            held: list[bytes] | None = None
            while time.monotonic() < killed_at + 60:
                try:
                    if held is None:
                        held = await self._held_by(redis, pid)
                    left = await redis.exists(*map(self._batch_key, held)) if held else 0
                except (RedisError, OSError):
                    left = None
                if left == 0:
                    break
                await asyncio.sleep(0.1)
            if held:
                self.recoveries.append(time.monotonic() - killed_at)

    async def _held_by(self, redis: RedisClient, pid: int) -> list[bytes]:
        """The batches that the ledger says a worker process was running."""
        batches = cast("list[bytes]", await redis.zrange(self._keys.held, 0, -1))
        async with redis.pipeline(transaction=False) as pipe:
            for batch in batches:
                pipe.hget(self._batch_key(batch), "w")
            workers = await pipe.execute()
        return [
            batch
            for batch, worker in zip(batches, workers, strict=True)
            if worker is not None and f"-{pid}-".encode() in worker
        ]

    def _batch_key(self, batch: bytes) -> str:
        return self._keys.batch(batch.decode())


async def keep_every_write(server: EmbeddedRedis) -> None:
    """Has Redis hand each write to the kernel before it answers.

    With ``appendfsync everysec`` it may hold writes back for two seconds while the disk is busy,
    and a SIGKILL would lose what it has confirmed. That is its operator's choice and none of what
    is tested here: data that the kernel has survives the process.
    """
    async with redis_at(server.url) as redis:
        for _ in range(100):
            try:
                await redis.config_set("appendfsync", "no")
            except (RedisError, OSError):
                await asyncio.sleep(0.05)
            else:
                return
    raise TimeoutError("Redis does not come back")
