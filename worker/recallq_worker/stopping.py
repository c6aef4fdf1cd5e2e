"""A stop that comes to its end even if Redis is down.

A stop waits for the batches in hand, and those wait for Redis: to be claimed, to store results, to
be acknowledged. While Redis is away that has no end. So once the process has been told to stop and
Redis has been silent for a while, this ends it. The messages in hand are still noted as taken in
Redis, and go back to their queues when it returns.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from billiard.process import active_children  # type: ignore[import-untyped]
from celery import bootsteps
from celery.worker import state
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from recallq.redis_client import NO_INTRODUCTION
from recallq_worker import runtime
from recallq_worker import settings as worker_settings

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds of silence from Redis after which a stop waits no longer."""
_CLOSING = 5.0
"""Seconds that the backend then has to close."""
_ASK_EVERY = 0.5
_ANSWER_WITHIN = 2.0


class StopDeadline(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no annotations
    """Watches, in a thread of its own, for a stop that cannot end."""

    requires = ("celery.worker.components:Pool",)  # forks come before threads

    def start(self, worker: Any) -> None:
        over = threading.Event()
        watching = threading.Thread(
            target=_watch, args=(worker, over), name="recallq-stop-deadline", daemon=True
        )
        watching.start()
        atexit.register(_stop_watching, watching, over)


def _stop_watching(watching: threading.Thread, over: threading.Event) -> None:
    """Before OpenSSL is taken down: a thread that makes a connection at that moment dies of it, and
    takes the exit code along."""
    over.set()
    watching.join(_ANSWER_WITHIN)


def _watch(worker: Any, over: threading.Event) -> None:
    # Not by a signal handler: it may run at a moment when its thread holds a lock it would need.
    while not _is_stopping(worker):
        if over.wait(_ASK_EVERY):
            return
    settings = worker_settings.current()
    urls = {settings.broker_url, settings.coordination_url, settings.result_url}
    last_heard = time.monotonic()
    while time.monotonic() - last_heard < PATIENCE:
        asked_at = time.monotonic()
        if all(_answers(url) for url in urls):
            last_heard = asked_at
        if over.wait(_ASK_EVERY):
            return
    log.critical(
        "told to stop, but Redis has not answered for %.0f s; ending without it. What was in hand "
        "goes back to its queue when Redis returns.",
        PATIENCE,
    )
    _end()


def _is_stopping(worker: Any) -> bool:
    told = (state.should_stop, state.should_terminate)
    return any(each is not None and each is not False for each in told) or (
        worker.blueprint.state in (bootsteps.CLOSE, bootsteps.TERMINATE)
    )


def _answers(url: str) -> bool:
    client = Redis.from_url(
        url,
        socket_timeout=_ANSWER_WITHIN,
        socket_connect_timeout=_ANSWER_WITHIN,
        retry=Retry(NoBackoff(), 0),
        **NO_INTRODUCTION,
    )
    try:
        return bool(client.ping())
    except (RedisError, OSError):
        return False
    finally:
        client.close()


def _end() -> None:
    closing = threading.Thread(target=runtime.stop, name="recallq-closing", daemon=True)
    closing.start()
    closing.join(_CLOSING)
    for child in active_children():
        os.kill(child.pid, signal.SIGKILL)
    logging.shutdown()
    sys.stdout.flush()
    # Threads of the pool wait in Celery's result backend, which cannot be interrupted, and an
    # ordinary exit waits for them.
    os._exit(1)
