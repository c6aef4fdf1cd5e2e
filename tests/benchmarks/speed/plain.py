"""The other side: the same store behind plain Celery, as its documentation has one write it.

Settings are the best that are documented for this use, where they were found to be: results on,
prefetching on, results of work that nobody waits for off; connection pools as they come, for larger
ones were slower. The store runs on an event loop in a thread of its own, as it must, for its client
is an asyncio one.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import asyncio
import os
import threading
import time
from functools import cache
from typing import Any

from celery import Celery

from recallq.contract import Scope
from recallq_worker.backends.base import Record
from recallq_worker.backends.redis import RedisStore
from tests.benchmarks.speed.works import NAP

URL = "RECALLQ_BENCHMARK_URL"
"""The variable that names the Redis."""
NAMESPACE = "plain"
QUEUE = "celery"
NAPS = "naps"
"""The queue of those who wait."""

app = Celery("plain", broker=os.environ.get(URL), backend=os.environ.get(URL))
app.conf.update(
    redis_max_connections=None,
    broker_connection_retry_on_startup=True,
    result_expires=600,
    worker_send_task_events=False,
    task_routes={"tests.benchmarks.speed.plain.nap": {"queue": NAPS}},
)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


_starting = threading.Lock()
_stores: list[RedisStore] = []


def _store() -> RedisStore:
    with _starting:
        if not _stores:
            store = RedisStore(os.environ[URL], namespace=NAMESPACE)
            asyncio.run_coroutine_threadsafe(store.start(), _loop()).result()
            _stores.append(store)
    return _stores[0]


@app.task
def add(record_id: str, user_id: str, order: int, message: dict[str, Any]) -> str:
    """Stores a message."""
    record = Record(record_id, Scope("default", user_id, "default"), order, order, message)
    adding = asyncio.run_coroutine_threadsafe(_store().add([record]), _loop())
    return adding.result()[0].value


@app.task(ignore_result=True)
def add_and_forget(record_id: str, user_id: str, order: int, message: dict[str, Any]) -> None:
    """The same for whom does not wait for it."""
    add(record_id, user_id, order, message)


@app.task
def search(user_id: str, query: str, top_k: int) -> list[dict[str, Any]]:
    """Finds messages."""
    finding = asyncio.run_coroutine_threadsafe(
        _store().search(Scope("default", user_id), query, top_k=top_k, score_threshold=None),
        _loop(),
    )
    return [
        {"message": hit.record.message, "record_id": hit.record.record_id, "score": hit.score}
        for hit in finding.result()
    ]


@app.task
def nap() -> None:
    """Waits for an embedding service, say."""
    time.sleep(NAP)
