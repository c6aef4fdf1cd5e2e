"""A worker whose queue somebody else can write to: it runs nothing, and goes on."""

from __future__ import annotations

import asyncio
import base64
import bz2
import json
import lzma
import pickle
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from kombu import serialization

from recallq import MemoryClient
from recallq.contract import Operation
from recallq.keys import Keys
from tests.fuzz.hostile import Hostile, envelope
from tests.support import PATIENCE, Worker

ADD = Operation.ADD.task_name


@pytest.fixture
def raw(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def body(value: bytes) -> str:
    return base64.b64encode(value).decode()


def queue_of(worker: Worker) -> str:
    return f"{worker.namespace}.live"


def settled(worker: Worker, raw: redis.Redis) -> None:
    """Waits until nobody holds anything of what came."""
    deadline = time.monotonic() + PATIENCE
    keys = Keys(worker.namespace)
    while (
        raw.llen(queue_of(worker))
        or raw.hlen(f"{worker.namespace}:unacked")
        or raw.exists(keys.outstanding)  # one whose headers want no answer is run once more
    ):
        assert time.monotonic() < deadline, worker.output
        assert worker.is_alive(), worker.output
        time.sleep(0.05)


async def still_serves(worker: Worker, user: str) -> None:
    async with MemoryClient(worker.url, namespace=worker.namespace, timeout=PATIENCE) as client:
        assert (await client.add_memory(user, "I drink tea")).added == 1
        assert [each.text for each in await client.search_memory(user, "tea")] == ["I drink tea"]


async def test_no_content_type_runs_anything(
    redis_worker: Worker, raw: redis.Redis, user: str, tmp_path: Path
) -> None:
    armed, trap = tmp_path / "armed", tmp_path / "sprung"
    # The trap is one: whoever accepts pickle runs it.
    serialization.loads(  # type: ignore[no-untyped-call]
        pickle.dumps(_Trap(armed)), "application/x-python-serialize", "binary", accept={
            "application/x-python-serialize"
        },
    )  # fmt: skip
    assert armed.exists()

    loaded = pickle.dumps(_Trap(trap))
    yaml = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{trap}]]"
    contents = {
        "application/x-python-serialize": loaded,
        "application/x-pickle": loaded,
        "pickle": loaded,
        "application/data": loaded,
        "application/text": loaded,
        "application/x-yaml": yaml.encode(),
        "application/x-msgpack": b"\x93\x91\xa1x\x80\x80",
        "application/octet-stream": loaded,
        "application/JSON": b"[[], {}, {}]",
        "": loaded,
    }
    before = int(raw.zcard(Keys(redis_worker.namespace).dead))
    for number, (content_type, content) in enumerate(contents.items()):
        for encoding in ("binary", "utf-8", "rot13"):
            message = envelope(ADD, f"c-{number}", [], queue_of(redis_worker))
            message |= {"content-type": content_type, "content-encoding": encoding}
            message["body"] = body(content)
            message["headers"] |= {"serializer": "pickle", "accept": ["pickle"]}
            raw.lpush(queue_of(redis_worker), json.dumps(message))
    settled(redis_worker, raw)
    await still_serves(redis_worker, user)
    assert not trap.exists()
    assert int(raw.zcard(Keys(redis_worker.namespace).dead)) == before + 3 * len(contents)


async def test_what_unpacks_to_a_gigabyte_is_not_unpacked(
    redis_worker: Worker, raw: redis.Redis, user: str
) -> None:
    """As a body that says it is compressed, or as text in a codec that unpacks."""
    large = bytes(400_000_000)
    packed = {"gzip": zlib.compress(large, 1), "bzip2": bz2.compress(large, 1)}
    bombs: list[dict[str, Any]] = [
        {"compression": name, "body": body(content)} for name, content in packed.items()
    ]
    bombs.append({"compression": "xz", "body": body(lzma.compress(large[:100_000_000], preset=0))})
    bombs += [
        {"content-type": kind, "content-encoding": codec, "body": body(packed[name])}
        for kind in ("application/data", None, "")
        for name, codec in (("gzip", "zlib_codec"), ("bzip2", "bz2_codec"))
    ]
    del large
    process = psutil.Process(redis_worker.pid)
    before, peak = process.memory_info().rss, 0
    dead = Keys(redis_worker.namespace).dead
    kept = int(raw.zcard(dead))
    for number, changes in enumerate(bombs):
        message = envelope(ADD, f"b-{number}", [], queue_of(redis_worker))
        message["headers"] |= {"compression": changes.pop("compression", None)}
        raw.lpush(queue_of(redis_worker), json.dumps(message | changes))
    deadline = time.monotonic() + PATIENCE
    while int(raw.zcard(dead)) < kept + len(bombs):
        assert time.monotonic() < deadline, redis_worker.output
        peak = max(peak, process.memory_info().rss)
        await asyncio.sleep(0.005)
    assert peak - before < 100_000_000
    await still_serves(redis_worker, user)


async def test_celerys_own_tasks_and_what_follows_a_task_are_not_for_messages(
    redis_worker: Worker, raw: redis.Redis, user: str
) -> None:
    """A worker would publish them with its own rights, wherever the message says."""
    victim = f"{redis_worker.namespace}.victim"
    call = {"task": "x", "args": [], "kwargs": {}, "options": {"routing_key": victim}}
    payload = json.dumps({
        "v": 1, "id": "f-0", "lane": "live", "operation": "health",
        "jobs": [{"scope": {"tenant": "", "user_id": ""}, "submitted_at": 1}],
    })  # fmt: skip
    task = Operation.HEALTH.task_name
    messages = [
        envelope(task, "f-0", [[payload], {}, {name: [call]}], queue_of(redis_worker))
        for name in ("callbacks", "errbacks", "chain")
    ]
    messages.append(envelope(task, "f-0", [[payload], {}, {"chord": call}], queue_of(redis_worker)))
    messages += [
        envelope(name, "f-0", [[call, [[]]], {}, {}], queue_of(redis_worker))
        for name in ("celery.map", "celery.chain", "celery.group", "celery.backend_cleanup")
    ]
    dead = Keys(redis_worker.namespace).dead
    before = int(raw.zcard(dead))
    for message in messages:
        raw.lpush(queue_of(redis_worker), json.dumps(message))
    settled(redis_worker, raw)
    await still_serves(redis_worker, user)
    assert int(raw.zcard(dead)) == before + len(messages)
    assert not raw.exists(victim)


@pytest.mark.parametrize("backend", ["redis", "extractor"])
async def test_hundreds_of_hostile_messages(
    redis_url: str, namespace: str, raw: redis.Redis, user: str, backend: str
) -> None:
    """Each is a dead letter, an answer, or was told of in the log; and the worker is the same."""
    keys = Keys(namespace)
    with Worker(redis_url, namespace=namespace, backend=backend, retry_attempts=1) as worker:
        pid = worker.pid
        messages = Hostile(20_26, queue_of(worker)).messages(400)
        for message in messages:
            raw.lpush(queue_of(worker), message)
        settled(worker, raw)
        await still_serves(worker, user)
        settled(worker, raw)
        assert worker.is_alive() and worker.pid == pid
        assert "defect" not in worker.output, worker.output
        dead = int(raw.zcard(keys.dead))
        answers = sum(1 for _ in raw.scan_iter(f"{namespace}:celery-task-meta-*"))
        assert dead > 200 and answers > 20
