"""The acceptance tests' environment: pytest-celery's `celery_setup` with RecallQ's nodes.

One Redis node, which is broker and result backend at once, and one recallq worker that stores
memories in that Redis as well. pytest-celery would run a test once for each broker, backend and
worker it knows; here there is one of each, so a test runs once.

Nodes are local processes (`tests.nodes`), so the tests need no Docker engine and no network. With
``RECALLQ_TEST_NODES=docker`` Redis is pytest-celery's own `RedisContainer` instead, on a port of
the host that stays the same through restarts and with an append-only file. That path is written
against pytest-celery 1.3 and is not exercised by this project's own runs. The worker is a local
process in both: pytest-celery's worker image installs Celery from PyPI and runs an app of its own,
and would test none of RecallQ.

pytest-celery also declares fixtures that build and start containers. They are asked for by name
below, and only in Docker mode: naming one as a parameter would start it.

To change the worker of one test module, override `worker_env` or `worker_args` there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from pytest_celery import (
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestWorker,
    RedisContainer,
    RedisTestBackend,
    RedisTestBroker,
)

from tests.nodes import LocalRedisContainer, LocalWorkerContainer

NODES = os.environ.get("RECALLQ_TEST_NODES", "local")


@pytest.fixture
def redis_node(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[LocalRedisContainer | RedisContainer]:
    """The one Redis, ready."""
    if NODES == "docker":
        yield request.getfixturevalue("default_redis_broker")  # which removes it itself
        return
    if NODES != "local":
        pytest.fail(f"RECALLQ_TEST_NODES={NODES}: expected 'local' or 'docker'")
    container = LocalRedisContainer.launch(tmp_path / "redis")
    yield container
    container.teardown()


@pytest.fixture
def node_url(redis_node: LocalRedisContainer | RedisContainer) -> str:
    """Where this process and the worker reach the Redis: each test's own, so it can be killed."""
    return str(redis_node.celeryconfig["host_url"])


@pytest.fixture
def worker_env(node_url: str) -> dict[str, str]:
    """RECALLQ_* variables of the worker."""
    return {"RECALLQ_BACKEND": "redis", "RECALLQ_REDIS_URL": node_url}


@pytest.fixture
def worker_args() -> list[str]:
    """Arguments after ``python -m recallq_worker``."""
    return ["worker", "--log-level", "INFO"]


@pytest.fixture
def worker_node(
    worker_env: dict[str, str], worker_args: list[str], tmp_path: Path
) -> Iterator[LocalWorkerContainer]:
    """The one worker, ready."""
    container = LocalWorkerContainer.launch(tmp_path, *worker_args, env=worker_env)
    yield container
    container.teardown()


# --- what pytest-celery builds `celery_setup` from ------------------------------------------------


@pytest.fixture
def celery_broker(
    redis_node: LocalRedisContainer | RedisContainer,
) -> Iterator[CeleryTestBroker]:
    node = RedisTestBroker(redis_node)
    yield node
    node.teardown()


@pytest.fixture
def celery_backend(
    redis_node: LocalRedisContainer | RedisContainer,
) -> Iterator[CeleryTestBackend]:
    node = RedisTestBackend(redis_node)
    yield node
    node.teardown()


@pytest.fixture
def celery_worker(
    worker_node: LocalWorkerContainer, celery_setup_app: Celery
) -> Iterator[CeleryTestWorker]:
    node = CeleryTestWorker(worker_node, app=celery_setup_app)
    yield node
    node.teardown()


# --- Docker mode only ---------------------------------------------------------------------------


@pytest.fixture
def default_redis_broker_command() -> list[str]:
    """As the embedded Redis: the guarantees rest on a Redis that persists."""
    return [*RedisContainer.command(), "--appendonly", "yes", "--appendfsync", "everysec"]


@pytest.fixture
def default_redis_broker_ports() -> dict[str, int]:
    """A port chosen here: Docker would choose another at every restart, and URLs would go stale."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"6379/tcp": probe.getsockname()[1]}
