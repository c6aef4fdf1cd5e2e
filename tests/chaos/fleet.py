"""The processes of a run: workers and producers, kept at their numbers whatever ends them.

Each process has a log of its own in the run's directory, and ends with its standard input, so that
none outlives the run. What faults do to one is meant; whatever else ends one is counted, and a new
one takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.history import note_death
from tests.support import READY, clean_environment

PLUGINS = Path(__file__).parent / "plugins"

_TEND_EVERY = 0.1
_WARM_STOP = 25.0
"""Longest time that a worker may take to finish what it holds."""


class Member:
    """One place in the fleet, and the process that fills it now."""

    def __init__(
        self, name: str, directory: Path, command: list[str], environment: dict[str, str]
    ) -> None:
        self.name = name
        self.generation = 0
        self.held = False
        """Whether a fault is at work on it, so that no other may be, nor a new process start."""
        self.log = directory / f"{name}.log"
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def title(self) -> str:
        """The name of the process: each has another."""
        return f"{self.name}.{self.generation}"

    def launch(self) -> None:
        self.generation += 1
        with self.log.open("ab") as log:
            log.write(f"--- {self.title}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                [part.replace("{title}", self.title) for part in self._command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**self._environment, "RECALLQ_TEST_WEATHER_SEED": self.title},
                start_new_session=True,  # a Ctrl-C is for the driver, which ends them in order
            )

    def exit_code(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def is_ready(self) -> bool:
        """Whether the worker of now has said that it takes jobs."""
        return self.log.read_text(errors="replace").rpartition("--- ")[2].count(READY) > 0

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def wait(self, timeout: float) -> bool:
        """Whether it has ended within the time."""
        deadline = time.monotonic() + timeout
        while self.exit_code() is None:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def kill(self) -> float:
        """Ends it with SIGKILL and says when."""
        at = time.monotonic()
        self.signal(signal.SIGKILL)
        await self.wait(10)
        self.close()
        return at

    async def freeze(self, seconds: float) -> None:
        """Stops its time for a while, without its noticing."""
        self.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            self.signal(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


class Fleet:
    """All workers and producers."""

    def __init__(
        self,
        directory: Path,
        *,
        url: str,
        namespace: str,
        workers: int,
        producers: int,
        worker_settings: dict[str, str],
        variables: dict[str, str],
        producer_arguments: list[str],
        weather: Path,
    ) -> None:
        path = os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")])
        environment = clean_environment(
            PYTHONPATH=path,
            RECALLQ_REDIS_URL=url,
            RECALLQ_NAMESPACE=namespace,
            RECALLQ_TEST_WEATHER=str(weather),
            **{f"RECALLQ_{name.upper()}": value for name, value in worker_settings.items()},
            **variables,
        )
        work = [sys.executable, "-m", "recallq_worker", "worker", "--until-stdin-ends"]
        produce = [sys.executable, "-m", "tests.chaos.producer", "{title}", *producer_arguments]
        self.workers = [
            Member(f"worker{number}", directory, work, environment) for number in range(workers)
        ]
        self.producers = [
            Member(f"p{number}", directory, produce, environment) for number in range(producers)
        ]
        self.exits: Counter[str] = Counter()
        """What ended without our doing, by name and exit code."""
        self._directory = directory
        self._producing = True

    async def start(self, timeout: float = 60.0) -> None:
        """Starts all processes and waits for the workers."""
        for member in [*self.workers, *self.producers]:
            member.launch()
        deadline = time.monotonic() + timeout
        while not all(worker.is_ready() for worker in self.workers):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the workers do not start; see their logs in {self._directory}")
            await asyncio.sleep(0.05)

    async def tend(self) -> None:
        """Puts a new process in the place of each that has ended, for ever."""
        while True:
            await asyncio.sleep(_TEND_EVERY)
            for worker in self.workers:
                if not worker.held and (code := worker.exit_code()) is not None:
                    self._replace(worker, f"worker, exit code {code}")
            for producer in self.producers if self._producing else ():
                if not producer.held and (code := producer.exit_code()) is not None:
                    note_death(self._journal(producer), time.monotonic())
                    self._replace(producer, f"producer, exit code {code}")

    def _replace(self, member: Member, what: str) -> None:
        self.exits[what] += 1
        member.close()
        member.launch()

    @contextlib.contextmanager
    def holding(self, member: Member) -> Iterator[Member]:
        """`member` is in the hand of a fault; afterwards a process that was ended is replaced."""
        member.held = True
        try:
            yield member
        finally:
            if member.exit_code() is not None:
                member.close()
                member.launch()
            member.held = False

    def free(self, members: list[Member]) -> list[Member]:
        """Those with a living process on which no fault is at work."""
        return [each for each in members if not each.held and each.exit_code() is None]

    async def kill_producer(self, producer: Member) -> None:
        with self.holding(producer):
            note_death(self._journal(producer), await producer.kill())

    def _journal(self, producer: Member) -> Path:
        return self._directory / "journals" / f"{producer.title}.jsonl"

    async def stop_producers(self) -> None:
        """Lets producers finish their calls, and ends them."""
        self._producing = False
        for producer in self.producers:
            producer.close()  # what it listens for
        for producer in self.producers:
            if not await producer.wait(60):
                note_death(self._journal(producer), await producer.kill())

    async def stop(self) -> None:
        """Ends everything that still runs."""
        members = [each for each in [*self.producers, *self.workers] if each.generation]
        for member in members:
            member.signal(signal.SIGCONT)
            member.signal(signal.SIGTERM)
        for member in members:
            if not await member.wait(_WARM_STOP):
                await member.kill()
            member.close()

    async def stop_and_replace(self, worker: Member) -> bool:
        """Stops a worker warmly; False if it had to be killed."""
        with self.holding(worker):
            worker.signal(signal.SIGTERM)
            stopped = await worker.wait(_WARM_STOP)
            if not stopped:
                await worker.kill()
            return stopped
