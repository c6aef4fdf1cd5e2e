"""The processes that make the calls, one for each side, told what to do line by line.

Each stays up for the whole run, so that nothing is measured that happens once; a line that it is
given is a `Work`, and the line that it answers is a `Done`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, Self

from redis.asyncio import Redis

from recallq import MemoryClient
from tests.benchmarks.speed import plain
from tests.benchmarks.speed.works import MESSAGES, SEARCHED_USERS, USERS, Kind, Work, query, text
from tests.support import clean_environment, wait_or_kill

_NAPPING_THREADS = 100
_LOOK_EVERY = 0.02


@dataclass
class Done:
    """What came of a work."""

    times: int
    seconds: float
    """From the first call to the last answer, or until everything submitted was accepted."""
    cpu: float
    """Seconds of this process's processor time."""
    latencies: list[float] = field(default_factory=list)
    """Of each call made one at a time, in seconds."""
    stored: float = 0.0
    """Seconds until everything submitted was stored."""


class Side(Protocol):
    """How one side makes calls. Counts them itself, so that no two messages are alike."""

    group: int
    """Which users it adds for: those of a work have nothing stored before."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...
    async def prepare(self) -> None: ...
    async def add(self, size: int) -> None: ...
    async def search(self) -> None: ...
    async def nap(self) -> None: ...
    async def submit(self, size: int) -> None: ...
    async def submit_search(self) -> None: ...
    async def drained(self) -> bool: ...


class Ours:
    """By `MemoryClient`."""

    def __init__(self, url: str) -> None:
        self._client = MemoryClient(url, namespace="ours", high_water_mark=10**7)
        self._naps = MemoryClient(url, namespace="naps", high_water_mark=10**7)
        self._count = 0
        self.group = 0

    async def __aenter__(self) -> Self:
        await self._client.start()
        await self._naps.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.stop()
        await self._naps.stop()

    async def prepare(self) -> None:
        await asyncio.gather(
            *(
                self._client.add_memory(f"searched-{user}", [text(n) for n in range(MESSAGES)])
                for user in range(SEARCHED_USERS)
            )
        )

    def _next(self, users: int = USERS) -> tuple[int, str]:
        self._count += 1
        return self._count, f"user-{self.group}-{self._count % users}"

    async def add(self, size: int) -> None:
        n, user = self._next()
        await self._client.add_memory(user, text(n, size))

    def _search(self) -> tuple[str, str]:
        n, _ = self._next()
        return f"searched-{n % SEARCHED_USERS}", query(n % MESSAGES)

    async def search(self) -> None:
        assert await self._client.search_memory(*self._search())

    async def nap(self) -> None:
        _, user = self._next()
        await self._naps.search_memory(user, "whatever")

    async def submit(self, size: int) -> None:
        n, user = self._next()
        await self._client.submit_add(user, text(n, size))

    async def submit_search(self) -> None:
        await self._client.submit_search(*self._search())

    async def drained(self) -> bool:
        return not (await self._client.transport.fleet()).outstanding


class Plain:
    """By Celery's own calls, in threads."""

    def __init__(self, url: str) -> None:
        self._redis: Redis = Redis.from_url(url)
        # Calls that wait want many threads. For all others, asyncio's own six were the fastest.
        self._napping = ThreadPoolExecutor(_NAPPING_THREADS)
        self._count = 0
        self.group = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    async def prepare(self) -> None:
        def fill(user: int) -> None:
            for n in range(MESSAGES):
                plain.add_and_forget.delay(f"s{user}-{n}", f"searched-{user}", n + 1, _said(n, 300))

        await asyncio.gather(*(asyncio.to_thread(fill, user) for user in range(SEARCHED_USERS)))
        while not await self.drained():
            await asyncio.sleep(_LOOK_EVERY)

    def _next(self, size: int) -> tuple[str, str, int, dict[str, Any]]:
        self._count += 1
        n = self._count
        return f"r{n}", f"user-{self.group}-{n % USERS}", n, _said(n, size)

    async def add(self, size: int) -> None:
        arguments = self._next(size)
        await asyncio.to_thread(lambda: plain.add.delay(*arguments).get())

    def _search(self) -> tuple[str, str, int]:
        self._count += 1
        n = self._count
        return f"searched-{n % SEARCHED_USERS}", query(n % MESSAGES), 10

    async def search(self) -> None:
        arguments = self._search()
        assert await asyncio.to_thread(lambda: plain.search.delay(*arguments).get())

    async def nap(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._napping, lambda: plain.nap.delay().get())

    async def submit(self, size: int) -> None:
        arguments = self._next(size)
        await asyncio.to_thread(lambda: plain.add_and_forget.delay(*arguments))

    async def submit_search(self) -> None:
        arguments = self._search()
        await asyncio.to_thread(lambda: plain.search.apply_async(arguments, ignore_result=True))

    async def drained(self) -> bool:
        waiting = await self._redis.llen(plain.QUEUE)
        return not waiting and not await self._redis.hlen("unacked")


def _said(n: int, size: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text(n, size)}]}


SIDES: dict[str, Callable[[str], Side]] = {"ours": Ours, "plain": Plain}


async def _do(side: Side, work: Work, times: int, workers: Sequence[int]) -> Done:
    """Does a work. `workers` are the processes that are to be frozen for a backlog."""
    call: Callable[[], Awaitable[None]]
    match work.operation:
        case "add" if work.kind is Kind.FORGET:
            call = partial(side.submit, work.size)
        case "search" if work.kind is Kind.BACKLOG:
            call = side.submit_search
        case "add":
            call = partial(side.add, work.size)
        case "search":
            call = side.search
        case _:
            call = side.nap
    side.group += 1
    latencies: list[float] = []
    left = times

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            at = time.perf_counter()
            await call()
            latencies.append(time.perf_counter() - at)

    if work.kind is Kind.BACKLOG:
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
    try:
        cpu, began = time.process_time(), time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(work.in_flight)))
        seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    finally:
        if work.kind is Kind.BACKLOG:
            began = time.perf_counter()
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
    done = Done(times, seconds, spent, latencies if work.kind is Kind.ONE_AT_A_TIME else [])
    if work.kind in (Kind.FORGET, Kind.BACKLOG):
        while not await side.drained():
            await asyncio.sleep(_LOOK_EVERY)
        done.stored = time.perf_counter() - began
    return done


async def _serve(name: str, url: str) -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    async with SIDES[name](url) as side:
        await side.prepare()
        print(json.dumps(None), flush=True)
        while line := await lines.readline():
            asked = json.loads(line)
            work = Work(**{**asked["work"], "kind": Kind(asked["work"]["kind"])})
            done = await _do(side, work, asked["times"], asked["workers"])
            print(json.dumps(dataclasses.asdict(done)), flush=True)


class Client:
    """A client process, as the one who measures sees it."""

    def __init__(self, name: str, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, name, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(**{plain.URL: url, "PYTHONPATH": os.pathsep.join(sys.path)}),
        )

    def ready(self) -> None:
        """Returns when it has filled its memories."""
        self._answer()

    def do(self, work: Work, times: int, workers: Sequence[int] = ()) -> Done:
        """Has it do a work."""
        asked = {"work": dataclasses.asdict(work), "times": times, "workers": list(workers)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Done(**self._answer())

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        wait_or_kill(self._process)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a client process of the benchmark has died; see above")
        return json.loads(line)


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
