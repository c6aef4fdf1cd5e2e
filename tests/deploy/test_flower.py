"""Flower, a real one, with RecallQ's app and a real worker."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from recallq import MemoryClient
from recallq.embedded import EmbeddedRedis
from tests.deploy.files import DEPLOY
from tests.support import Worker, clean_environment, eventually, wait_or_kill

SECRET = "I am allergic to peanuts"


def ask(address: str, path: str) -> Any:
    """What its API says; None if it does not answer yet."""
    credentials = base64.b64encode(b"recallq:secret").decode()
    headers = {"Authorization": f"Basic {credentials}"}
    request = urllib.request.Request(f"http://{address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)
    except (OSError, ValueError):
        return None


@pytest.fixture(scope="module")
def redis_of_its_own() -> Iterator[EmbeddedRedis]:
    """Since Flower listens to everything on it."""
    with EmbeddedRedis() as redis:
        yield redis


@pytest.fixture(scope="module")
def worker(redis_of_its_own: EmbeddedRedis) -> Iterator[Worker]:
    with Worker(redis_of_its_own.url, namespace="flowery", events="true") as started:
        yield started


@pytest.fixture(scope="module")
def flower(worker: Worker) -> Iterator[str]:
    """Started as compose does."""
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["flower"]
    assert service["entrypoint"][0] == "celery"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = [
        each.replace("0.0.0.0", "127.0.0.1").replace("5555", str(port))
        for each in service["command"]
    ]
    environment = clean_environment(
        RECALLQ_REDIS_URL=worker.url,
        RECALLQ_NAMESPACE=worker.namespace,
        FLOWER_BASIC_AUTH="recallq:secret",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", *service["entrypoint"], *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        # It hears of a worker by its heart-beat.
        while not any((ask(address, "/api/workers?status=1") or {}).values()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        wait_or_kill(process)


async def test_it_shows_workers_and_batches(flower: str, worker: Worker) -> None:
    async with MemoryClient(worker.url, namespace=worker.namespace) as client:
        await client.add_memory("ann", SECRET)
        await client.search_memory("ann", "peanuts")
    tasks: dict[str, Any] = {}

    async def both_are_done() -> bool:
        tasks.update(await asyncio.to_thread(ask, flower, "/api/tasks") or {})
        done = {each["name"] for each in tasks.values() if each["state"] == "SUCCESS"}
        return {"recallq.add", "recallq.search"} <= done

    await eventually(both_are_done)
    assert "peanuts" not in json.dumps(tasks)
    assert "allergic" not in json.dumps(tasks)


async def test_it_can_ask_workers(flower: str, worker: Worker) -> None:
    found = await asyncio.to_thread(ask, flower, "/api/workers?refresh=1")
    assert found, "it asks eight things at once, for which there must be connections"
    (told,) = found.values()
    assert told["stats"]["pid"] == worker.pid
    queues = sorted(each["name"] for each in told["active_queues"])
    assert queues == [f"flowery.{lane}" for lane in ("bulk", "live", "slow")]


async def test_strangers_are_sent_away(flower: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        await asyncio.to_thread(urllib.request.urlopen, f"http://{flower}/api/workers", None, 10)
    with refused.value as answer:
        assert answer.code == 401
