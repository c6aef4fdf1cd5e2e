"""What a broker can do to a worker: go away at any moment, refuse, and hand out any bytes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from recallq import MemoryClient
from recallq.contract import JobRef, Lane, Operation
from recallq.embedded import EmbeddedRedis
from recallq.keys import Keys
from tests.support import Worker

PATIENCE = 30.0


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    """A Redis of the test's own, to be restarted."""
    with EmbeddedRedis() as own:
        yield own


@pytest.fixture
def worker(server: EmbeddedRedis, namespace: str) -> Iterator[Worker]:
    with Worker(server.url, namespace=namespace, backend="obedient", concurrency=8) as running:
        yield running


@pytest.fixture
def raw(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    """A look into Redis that survives its restarts."""
    with redis.Redis.from_url(server.url) as client:
        yield client


def submit(worker: Worker, *texts: str) -> list[str]:
    """Adds one batch for each text; returns the jobs' ids."""

    async def work() -> list[str]:
        async with MemoryClient(worker.url, namespace=worker.namespace) as client:
            return [(await client.submit_add(text, text)).id for text in texts]

    return asyncio.run(work())


def added(worker: Worker, job_ids: list[str]) -> list[int]:
    """How many memories each job added, once it is done."""

    async def work() -> list[int]:
        async with MemoryClient(worker.url, namespace=worker.namespace) as client:
            return [(await client.handle(each).result(PATIENCE)).added for each in job_ids]

    return asyncio.run(work())


def soon(condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not _holds(condition):
        assert time.monotonic() < deadline, f"after {timeout:g} s still not so: {what}"
        time.sleep(0.02)


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except (redis.RedisError, OSError):
        return False


def in_hand(worker: Worker, raw: redis.Redis) -> int:
    """Messages that somebody holds: kombu knows of those that the ledger does not."""
    unlisted = int(raw.hlen(f"{worker.namespace}:unacked"))
    return unlisted + int(raw.zcard(Keys(worker.namespace).held))


def state_of(worker: Worker, raw: redis.Redis, job_id: str) -> str | None:
    """The ledger's word on a job's batch: None once it has settled."""
    state = raw.hget(Keys(worker.namespace).batch(JobRef.parse(job_id).batch_id), "s")
    return state.decode() if isinstance(state, bytes) else None


def take(worker: Worker, raw: redis.Redis, *texts: str) -> list[str]:
    """As `submit`, and waits until the worker has begun them all; the first may be done by then."""
    job_ids = submit(worker, *texts)

    def all_are_begun() -> bool:
        return all(state_of(worker, raw, each) in ("running", None) for each in job_ids)

    soon(all_are_begun, "all are taken")
    return job_ids


def works_again(worker: Worker, within: float = 20.0) -> None:
    began = time.monotonic()
    assert added(worker, submit(worker, f"tea {began}")) == [1]
    assert time.monotonic() - began < within


class TestRedisGoesAway:
    def test_restarts_with_messages_in_hand(
        self, server: EmbeddedRedis, worker: Worker, raw: redis.Redis
    ) -> None:
        def sigterm() -> None:
            server.restart()

        def sigkill() -> None:
            server.kill()
            server.start()

        def cut() -> None:
            raw.client_kill_filter(_type="normal", skipme=True)

        pid, connections = worker.pid, 0
        for number, outage in enumerate([sigterm, sigkill, cut, sigterm, cut, sigkill]):
            job_ids = take(
                worker, raw, *(f"sleep {seconds} {number}" for seconds in (0.3, 0.8, 1.6))
            )
            outage()
            works_again(worker)
            assert added(worker, job_ids) == [1, 1, 1]
            # Acknowledged over the new connection, long before they count as abandoned.
            soon(lambda: in_hand(worker, raw) == 0, "all are acknowledged")
            process = psutil.Process(pid)
            if number == 1:
                connections = len(process.net_connections())
        assert worker.is_alive()
        assert len(psutil.Process(pid).net_connections()) <= connections + 6  # pools grow, slowly
        assert "Traceback" not in worker.output

    def test_work_that_ends_while_redis_is_away(
        self, server: EmbeddedRedis, worker: Worker, raw: redis.Redis
    ) -> None:
        job_ids = take(worker, raw, "sleep 0.5", "sleep 2", "sleep 4", "sleep 8")
        said = len(worker.output.splitlines())
        server.kill()
        time.sleep(6)
        server.start()
        works_again(worker)
        assert added(worker, job_ids) == [1] * 4
        soon(lambda: in_hand(worker, raw) == 0, "all are acknowledged")
        assert "Traceback" not in worker.output
        assert len(worker.output.splitlines()) - said <= 10

    def test_a_stop_after_an_outage_still_finishes_what_runs(
        self, server: EmbeddedRedis, worker: Worker, raw: redis.Redis
    ) -> None:
        job_ids = take(worker, raw, "sleep 3", "sleep 4")
        server.restart()
        works_again(worker)
        worker.signal(signal.SIGTERM)
        assert worker.wait(PATIENCE) == 0
        assert added(worker, job_ids) == [1, 1]
        assert in_hand(worker, raw) == 0

    def test_a_redis_that_is_read_only_for_a_while(self, worker: Worker, raw: redis.Redis) -> None:
        works_again(worker)
        raw.replicaof("127.0.0.1", "1")  # as after a failover
        soon(lambda: "READONLY" in worker.output, "the worker is refused")
        time.sleep(1.5)
        raw.replicaof("NO", "ONE")
        works_again(worker)
        assert worker.is_alive()


class TestStoppingWithoutRedis:
    def test_with_nothing_in_hand(self, server: EmbeddedRedis, worker: Worker) -> None:
        server.kill()
        worker.signal(signal.SIGTERM)
        worker.wait(60)

    def test_with_messages_in_hand(
        self, server: EmbeddedRedis, worker: Worker, raw: redis.Redis
    ) -> None:
        job_ids = take(worker, raw, "sleep 1.5", "sleep 25")
        server.kill()
        soon(lambda: "cannot connect" in worker.output, "the worker notices")
        worker.signal(signal.SIGTERM)
        worker.wait(60)
        server.start()
        queue = Lane.LIVE.queue(worker.namespace)

        def neither_is_lost() -> bool:
            done = sum(state_of(worker, raw, each) is None for each in job_ids)  # before the kill
            return in_hand(worker, raw) + int(raw.llen(queue)) + done == 2

        soon(neither_is_lost, "neither is lost")


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def envelope(mark: str, **changes: Any) -> dict[str, Any]:
    """A message as plain Celery sends it, but for `changes`; None leaves a part out."""
    whole: dict[str, Any] = {
        "body": base64.b64encode(json.dumps([["x"], {}, {}]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": Operation.ADD.task_name, "id": mark},
        "properties": {
            "correlation_id": mark,
            "delivery_info": {"exchange": "", "routing_key": "set below"},
            "delivery_tag": mark,
            "body_encoding": "base64",
        },
        "mark": mark,
        **changes,
    }
    return {name: part for name, part in whole.items() if part is not None}


def nested(whole: dict[str, Any], depth: int) -> bytes:
    """The same with a list in it that is nested so deep."""
    return json.dumps(whole | {"deep": "@"}).replace('"@"', "[" * depth + "]" * depth).encode()


def plain(mark: str, content: Any) -> dict[str, Any]:
    """With a body that is not encoded."""
    whole = envelope(mark, body=content)
    del whole["properties"]["body_encoding"]
    return whole


def body(value: bytes) -> str:
    return base64.b64encode(value).decode()


class TestPoison:
    def test_it_becomes_dead_letters(
        self, worker: Worker, raw: redis.Redis, tmp_path: Path
    ) -> None:
        queue = Lane.LIVE.queue(worker.namespace)
        trap = tmp_path / "unpickled"
        task = Operation.ADD.task_name
        poison: list[Any] = [
            b"\xff\xfe not JSON, not even text: mark-0-",
            b'{"cut": "off mark-1-',
            b"[" * 100_000 + b"mark-2-",
            b'["mark-3-"]',
            b'"mark-4-"',
            {"mark": "mark-5-"},
            envelope("mark-6-", properties=None),
            envelope("mark-7-", headers=None),
            envelope("mark-8-", properties={"delivery_info": {}}),
            envelope("mark-9-", headers=["task", task]),
            envelope("mark-10-", body="%%% no base64"),
            envelope("mark-11-", body=None),
            envelope("mark-12-", body=17),
            envelope("mark-13-", body=body(b"no JSON")),
            envelope("mark-14-", body=body(b"17")),
            envelope("mark-15-", body=body(b'{"args": [], "kwargs": {}}')),
            envelope("mark-16-", body=body(b"[[], {}]")),
            envelope("mark-17-", headers={"task": "somebody.elses", "id": "mark-17-"}),
            envelope("mark-18-", headers={"task": task}),
            envelope("mark-19-", headers={"task": [], "id": {}}),
            envelope("mark-20-", headers={"task": task, "id": "mark-20-", "timelimit": "long"}),
            envelope("mark-21-", headers={"task": task, "id": "mark-21-", "expires": "never"}),
            envelope("mark-22-", **{"content-type": None}),
            envelope("mark-23-", **{"content-type": "application/x-yaml"}),
            envelope("mark-24-", body=body(b"\xff\xfe")),
            envelope(
                "mark-25-",
                body=body(pickle.dumps(_Evil(trap))),
                **{"content-type": "application/x-python-serialize", "content-encoding": "binary"},
            ),
            envelope(  # Celery's protocol 1
                "mark-26-",
                headers={},
                body=body(json.dumps({"task": task, "id": "mark-26-", "args": ["x"]}).encode()),
            ),
            envelope("mark-27-", headers={"task": task, "id": "m", "compression": "zlib"}),
            # orjson reads them, and Python's own JSON does not, or cannot write them again.
            nested(envelope("mark-28-"), 990),
            nested(envelope("mark-29-"), 1010),
            envelope("mark-30-", body=body(b"[" * 1000 + b"]" * 1000)),
            plain("mark-31-", 4_000_000_000),
            plain("mark-32-", [91, 93]),
        ]
        held = take(worker, raw, "sleep 3")
        for each in poison:
            if isinstance(each, dict) and "delivery_info" in each.get("properties", {}):
                info = each["properties"]["delivery_info"]
                if info:
                    info["routing_key"] = queue
            raw.lpush(queue, each if isinstance(each, bytes) else json.dumps(each))
        keys = Keys(worker.namespace)
        soon(lambda: raw.zcard(keys.dead) == len(poison), "all are dead letters")

        letters = [str(raw.hgetall(each)) for each in raw.scan_iter(keys.dead_letter("*"))]
        for number in range(len(poison)):
            mark = f"mark-{number}-"
            assert sum(mark in letter for letter in letters) == 1, (mark, worker.output)
        assert not trap.exists()

        works_again(worker)
        assert added(worker, held) == [1]
        soon(lambda: in_hand(worker, raw) == 0, "all are acknowledged")
        assert raw.llen(queue) == 0
        assert "Connection to broker lost" not in worker.output
        assert "Traceback" not in worker.output
        # Nothing of what came is shown in the log.
        assert "mark-" not in worker.output

        raw.publish(f"/0.{worker.namespace}.control.pidbox", b"no JSON")
        raw.publish(f"/0.{worker.namespace}.control.pidbox", b"{}")
        raw.publish(f"/0.{worker.namespace}.control.pidbox", b"[1]")
        works_again(worker)
        assert worker.is_alive()
        assert raw.zcard(keys.dead) == len(poison)

    def test_every_place_is_free_again(self, worker: Worker, raw: redis.Redis) -> None:
        """More poison than batches at once: none of it goes on occupying a place."""
        queue = Lane.LIVE.queue(worker.namespace)
        for number in range(20):
            message = envelope(f"mark-{number}-", body=body(b"[1, 2, 3]"))
            message["properties"]["delivery_info"]["routing_key"] = queue
            raw.lpush(queue, json.dumps(message))
        soon(lambda: raw.zcard(Keys(worker.namespace).dead) == 20, "all are dead letters")
        submit(worker, *(f"sleep 100 {number}" for number in range(8)))
        soon(lambda: in_hand(worker, raw) == 8, "all eight at once")
        worker.kill()  # rather than wait for them

    def test_a_redis_in_trouble_loses_no_poison(
        self, server: EmbeddedRedis, worker: Worker, raw: redis.Redis
    ) -> None:
        queue = Lane.LIVE.queue(worker.namespace)
        os.kill(worker.pid, signal.SIGSTOP)
        message = envelope("mark-0-", headers={"task": "somebody.elses", "id": "mark-0-"})
        message["properties"]["delivery_info"]["routing_key"] = queue
        raw.lpush(queue, json.dumps(message))
        server.restart()
        os.kill(worker.pid, signal.SIGCONT)
        works_again(worker)
        soon(
            lambda: raw.zcard(Keys(worker.namespace).dead) + raw.llen(queue) == 1,
            "it is buried, or still waits",
        )
