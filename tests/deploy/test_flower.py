"""Flower, a real one, with RecallQ's app and a real worker."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from recallq import MemoryClient
from recallq.embedded import EmbeddedRedis
from tests.deploy.flower import ask, flower_for
from tests.support import Worker, eventually

SECRET = "I am allergic to peanuts"


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
    with flower_for(worker) as address:
        yield address


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
