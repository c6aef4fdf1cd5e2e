"""What workers log: jobs with fields, errors without their words, and nothing that users said."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from recallq import BackendError, InternalError, MemoryClient
from recallq.tracing import user_digest
from tests.integration.test_slow_lane import EXTRACTOR
from tests.support import Worker, eventually

StartWorker = Callable[..., Worker]
SECRETS = ("ann lee", "my diagnosis", "the kitchen")


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[MemoryClient]:
    async with MemoryClient(redis_url, namespace=namespace, timeout=30) as memory:
        yield memory


async def lines(worker: Worker, message: str, count: int = 1) -> list[dict[str, Any]]:
    def found() -> list[dict[str, Any]]:
        told = [json.loads(line) for line in worker.output.splitlines() if line.startswith("{")]
        return [each for each in told if each["message"] == message]

    async def there() -> bool:
        return len(found()) >= count

    await eventually(there)
    return found()


async def test_a_line_of_json_for_each_job(client: MemoryClient, start_worker: StartWorker) -> None:
    worker = await asyncio.to_thread(
        lambda: start_worker(log_level="INFO", log_format="json", backend="slow_redis")
    )
    await client.add_memory("ann lee", "my diagnosis", "the kitchen")
    await client.search_memory("ann lee", "my diagnosis")
    with pytest.raises(BackendError):
        await client.add_memory("ann lee", "refuse this", "the kitchen")
    ended = await lines(worker, "job ended", 3)
    add, search, dead = ended
    assert add.items() >= {
        "level": "INFO", "logger": "recallq_worker.jobs", "operation": "add", "lane": "live",
        "tenant": "default", "user": user_digest("default", "ann lee"), "state": "succeeded",
    }.items()  # fmt: skip
    assert client.handle(add["job"]).id == add["job"]
    assert add["job"].startswith(add["batch"])
    assert 0 < add["run_seconds"] < 5
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", add["time"])
    assert (search["operation"], search["state"]) == ("search", "succeeded")
    assert (dead["state"], dead["error"]) == ("dead", "backend_error")
    (letter,) = await lines(worker, "job became a dead letter")
    assert (letter["level"], letter["job"]) == ("WARNING", dead["job"])
    for secret in (*SECRETS, "refuse this"):
        assert secret not in worker.output


async def test_lines_for_people(client: MemoryClient, start_worker: StartWorker) -> None:
    worker = await asyncio.to_thread(lambda: start_worker(log_level="INFO"))
    added = await client.submit_add("ann lee", "my diagnosis", "the kitchen")
    await added.result(30)

    async def told() -> bool:
        digest = user_digest("default", "ann lee")
        line = rf"INFO recallq_worker.jobs: job ended job={added.id} .*user={digest}.* state=succ"
        return re.search(line, worker.output) is not None

    await eventually(told)
    assert not any(secret in worker.output for secret in SECRETS)


async def test_errors_of_libraries_are_told_without_their_words(
    client: MemoryClient, start_worker: StartWorker
) -> None:
    """Their types, and where they were raised; a traceback's last line may quote anything."""
    worker = await asyncio.to_thread(lambda: start_worker(log_level="DEBUG", backend="slow_redis"))
    with pytest.raises(InternalError):
        await client.add_memory("ann lee", "my diagnosis explode", "the kitchen")

    async def told() -> bool:
        return "unexpected error in backend" in worker.output

    await eventually(told)
    assert "\nbuiltins.RuntimeError (its words are not logged)" in worker.output
    assert "in add" in worker.output  # where it was raised
    assert not any(secret in worker.output for secret in SECRETS)


async def test_jobs_that_are_put_off(client: MemoryClient, start_worker: StartWorker) -> None:
    worker = await asyncio.to_thread(
        lambda: start_worker(log_level="INFO", log_format="json", backend=EXTRACTOR)
    )
    await client.add_memory("ann lee", "fail 2 times, wait 0.1")
    told = await lines(worker, "job put off for another attempt", 2)
    assert {(each["lane"], each["error"]) for each in told} == {("slow", "backend_unavailable")}
