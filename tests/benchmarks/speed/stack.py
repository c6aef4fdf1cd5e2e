"""The servers and workers of a run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from recallq.embedded import EmbeddedRedis
from tests.benchmarks.speed import plain
from tests.benchmarks.speed.clients import Client
from tests.support import Worker, clean_environment, wait_or_kill

PLUGINS = Path(__file__).parents[1] / "plugins"
_TICKS = os.sysconf("SC_CLK_TCK")


class PlainWorker:
    """``celery worker`` with a pool of threads, and with nothing on that is of no use here."""

    def __init__(self, url: str, queue: str, concurrency: int) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "--app=tests.benchmarks.speed.plain"),
                *("worker", "--pool=threads", f"--concurrency={concurrency}"),
                *(f"--queues={queue}", f"--hostname={queue}@%h"),
                *("--loglevel=WARNING", "--without-gossip", "--without-mingle"),
                "--without-heartbeat",
            ],
            env=clean_environment(**{plain.URL: url, "PYTHONPATH": os.pathsep.join(sys.path)}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pid = self._process.pid

    def stop(self) -> None:
        self._process.terminate()
        wait_or_kill(self._process)


def our_worker(url: str, namespace: str, backend: str = "redis") -> Worker:
    """``recallq worker`` as it is when nobody sets anything."""
    return Worker(
        url,
        namespace=namespace,
        backend=backend,
        environment={"PYTHONPATH": os.pathsep.join([str(PLUGINS), *sys.path])},
    )


@contextlib.contextmanager
def running(workers: Sequence[Worker]) -> Iterator[None]:
    """Starts workers, and stops them."""
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker)
        yield


@contextlib.contextmanager
def plain_worker(url: str, queue: str = plain.QUEUE, concurrency: int = 8) -> Iterator[PlainWorker]:
    """The same for plain Celery's."""
    worker = PlainWorker(url, queue, concurrency)
    try:
        yield worker
    finally:
        worker.stop()


@contextlib.contextmanager
def client(name: str, url: str) -> Iterator[Client]:
    """A client process that has filled its memories."""
    process = Client(name, url)
    try:
        process.ready()
        yield process
    finally:
        process.stop()


@contextlib.contextmanager
def server() -> Iterator[EmbeddedRedis]:
    """A Redis."""
    with EmbeddedRedis() as redis:
        yield redis


def processor_time(pid: int) -> float:
    """Seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory(pid: int) -> int:
    """Bytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pid_of(redis: EmbeddedRedis) -> int:
    """The process of a server."""
    import redis as driver

    with driver.Redis.from_url(redis.url) as asking:
        return int(asking.info("server")["process_id"])
