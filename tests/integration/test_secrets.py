"""What a worker prints at its most talkative, whatever it is given: no password, key or text."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from recallq import MemoryClient, RecallQError
from recallq.contract import Operation
from recallq.embedded import find_server
from recallq.keys import Keys
from tests.fuzz.hostile import envelope
from tests.integration.test_reme import flow_variables
from tests.loopback.openai_api import OpenAIServer
from tests.secure_redis import SecureRedis
from tests.support import PATIENCE, Shell, Worker

PASSWORD = "Pa55w0rd-of-redis"
SECRET = "zebra"
"""In everything that a user says, and in the users' ids."""
USER = f"user-{SECRET}"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureRedis]:
    directory = tmp_path_factory.mktemp("redis")
    with SecureRedis(directory, binary=find_server(), password=PASSWORD) as server:
        yield server


async def say(url: str, *texts: str) -> list[str]:
    """Adds and looks for what nobody else should read; the words of all errors."""
    told: list[str] = []
    async with MemoryClient(url, timeout=PATIENCE) as client:
        for text in texts:
            for call in (client.add_memory(USER, text), client.search(USER, text)):
                try:
                    await call
                except RecallQError as error:
                    told += [str(error), repr(error)]
        told += [repr(each) for each in await client.dead_letters.list()]
        told += [repr(client), repr(client.settings), repr(client.handle("0" * 16 + "-1-0"))]
    return told


def poison(raw: redis.Redis, queue: str) -> int:
    """Messages that cannot be read, with texts in every part; how many."""
    task = Operation.ADD.task_name
    job = {
        "scope": {"tenant": "t", "user_id": USER}, "submitted_at": 1, "order": 1, "messages": SECRET
    }  # fmt: skip
    batch = {"v": 1, "id": "p-1", "lane": "live", "operation": "add", "jobs": [job]}
    hints = {"argsrepr": SECRET, "kwargsrepr": SECRET}
    whole = [
        envelope(task, "p-1", [[json.dumps(batch)], {}, {}], queue),
        envelope(task, "p-2", [[SECRET], {SECRET: SECRET}, {}], queue),
        envelope(SECRET, "p-3", [[SECRET], {}, {}], queue),
        envelope(task, "p-4", {SECRET: SECRET}, queue),
        envelope(task, "p-5", [[json.dumps(batch | {"v": SECRET})], {}, {}], queue),
        envelope(task, "p-6", [[json.dumps(batch | {"operation": SECRET})], {}, {}], queue),
        envelope(task, "p-7", [[json.dumps(batch | {"id": SECRET})], {}, {}], queue),
        {**envelope(task, "p-8", SECRET, queue), "content-type": SECRET},
    ]
    for message in whole:
        message["headers"] |= hints
        raw.lpush(queue, json.dumps(message))
    for junk in (SECRET, f'{{"{SECRET}": ', f'["{SECRET}"]'):
        raw.lpush(queue, junk)
    return len(whole) + 3


def nothing_in(output: str, *secrets: str) -> None:
    for line in output.splitlines():
        for secret in (SECRET, PASSWORD, *secrets):
            assert secret not in line, line[:2000]


def test_a_worker_that_tells_all_it_can(guarded: SecureRedis, tmp_path: Path) -> None:
    url = guarded.url("", PASSWORD)
    texts = [f"{SECRET} {each}" for each in ("tea", "refuse", "explode", "unavailable", "garble")]
    trying = {"retry_attempts": 2, "retry_base": 0.05, "slow_attempts": 2}
    with (
        redis.Redis.from_url(url) as raw,
        Worker(url, backend="extractor", log_level="DEBUG", **trying) as worker,  # type: ignore[arg-type]
    ):
        told = asyncio.run(say(url, *texts))
        dead = Keys("recallq").dead
        kept = int(raw.zcard(dead)) + poison(raw, "recallq.live")
        deadline = time.monotonic() + PATIENCE
        while int(raw.zcard(dead)) < kept:
            assert time.monotonic() < deadline, worker.output
            time.sleep(0.05)
        shell = Shell(tmp_path, RECALLQ_REDIS_URL=url)
        seen = shell("status").stdout + shell("doctor").stdout
        # A connection that is lost and made again is told of, too.
        raw.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        asyncio.run(say(url, f"{SECRET} again"))
        worker.stop()
        assert "DEBUG" in worker.output
        nothing_in(worker.output)
        # A dead letter says whose it is, and not what was said.
        nothing_in("\n".join([*told, seen]).replace(USER, ""))


@pytest.mark.parametrize("kind", ["mem0", "reme"])
def test_libraries_that_tell_all_they_can(guarded: SecureRedis, kind: str, tmp_path: Path) -> None:
    """They log requests to models, with texts and keys, and what came back."""
    url = guarded.url("", PASSWORD)
    with OpenAIServer(dimensions=256) as server:
        options: dict[str, Any] = {"backend": "mem0"}
        for part in ("llm", "embedding"):
            options |= {f"{part}_api_key": server.api_key, f"{part}_base_url": server.base_url}
        if kind == "reme":
            variables = flow_variables(server)
            options = {"backend": "reme_personal", "environment": variables, "directory": tmp_path}
        options |= {"embedding_dimensions": 256, "log_level": "DEBUG", "namespace": kind}
        with Worker(url, retry_attempts=1, slow_attempts=1, **options) as worker:
            with contextlib.suppress(RecallQError):
                asyncio.run(once(url, kind))
            worker.stop()
            assert "DEBUG" in worker.output
            nothing_in(worker.output, server.api_key)


async def once(url: str, namespace: str) -> None:
    async with MemoryClient(url, namespace=namespace, timeout=PATIENCE) as client:
        await client.add_memory(USER, f"I like the {SECRET}")
        await client.search(USER, SECRET)
