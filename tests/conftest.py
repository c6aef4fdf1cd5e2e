"""Fixtures for all tests: a real Redis, real workers, and a watch on blocking calls.

One embedded Redis serves the whole run; tests keep apart by namespace. A worker is a subprocess,
started once per module and backend. Every test of the client runs under blockbuster, which raises
where the event loop's thread would block.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, settings

from recallq import MemoryClient
from recallq.embedded import EmbeddedRedis
from tests.support import SETTINGS, Worker

_numbers = itertools.count(1)

# How long an example takes says more about the machine than about the code.
settings.register_profile("recallq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("recallq")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests configure what they need; a developer's environment must not reach into them."""
    for name in list(os.environ):
        if name.startswith(SETTINGS) and not name.startswith("RECALLQ_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as redis:
        yield redis


@pytest.fixture(scope="session")
def redis_url(redis_server: EmbeddedRedis) -> str:
    return redis_server.url


@pytest.fixture
def namespace() -> str:
    """A namespace of the test's own."""
    return f"t{next(_numbers)}"


@pytest.fixture(scope="module")
def module_namespace() -> str:
    """A namespace of the module's own, for the workers that its tests share."""
    return f"m{next(_numbers)}"


@pytest.fixture
def user() -> str:
    """A user nobody else has."""
    return f"user-{next(_numbers)}"


@pytest.fixture(scope="module")
def redis_worker(redis_url: str, module_namespace: str) -> Iterator[Worker]:
    """A running worker with the redis backend."""
    with Worker(redis_url, namespace=module_namespace, backend="redis") as worker:
        yield worker


@pytest.fixture
async def client(redis_worker: Worker) -> AsyncIterator[MemoryClient]:
    """A started client of `redis_worker`, watched for blocking calls."""
    async with MemoryClient(redis_worker.url, namespace=redis_worker.namespace) as memory:
        with no_blocking():
            yield memory


def no_blocking() -> AbstractContextManager[BlockBuster]:
    """A context in which a blocking call on the event loop raises."""
    return blockbuster_ctx()


@pytest.fixture
def start_worker(redis_url: str, namespace: str) -> Iterator[Callable[..., Worker]]:
    """Starts workers in the test's own namespace, and stops them after it.

    With ``ready=False`` it does not wait until they are: they may be about to die.
    """
    started: list[Worker] = []

    def start(*, ready: bool = True, **options: object) -> Worker:
        worker = Worker(redis_url, **{"namespace": namespace, **options})  # type: ignore[arg-type]
        started.append(worker)
        if ready:
            worker.start()
        else:
            worker.launch()
        return worker

    yield start
    with ThreadPoolExecutor() as pool:  # each takes about a second
        list(pool.map(Worker.close, started))
