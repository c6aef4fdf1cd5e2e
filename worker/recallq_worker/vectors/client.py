"""Connections to Redis for code that runs in threads: what `recallq.redis_client.connect` makes for
an event loop.

A socket timeout bounds every command here. One that ran into it is not sent again, so that a call
ends in a known time; one whose connection broke is, so only commands that may be repeated belong
here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import BlockingConnectionPool, Redis, exceptions
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from recallq.errors import BackendError, BackendUnavailable
from recallq.redis_client import _DRIVER, _KEEPALIVE, LOST, is_transient, reason_of, redact

_MAX_CONNECTIONS = 16
_RETRIES = 3


def connect(url: str, *, connect_timeout: float, command_timeout: float) -> Redis:
    """A client whose replies are bytes. Connections are made on first use; threads beyond the
    limit wait for a free one."""
    options: dict[str, Any] = {}
    if not url.startswith("unix://"):
        options = {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
        timeout=command_timeout,
        socket_connect_timeout=connect_timeout,
        socket_timeout=command_timeout,
        health_check_interval=30,
        driver_info=_DRIVER,
        retry=Retry(
            ExponentialWithJitterBackoff(base=0.05, cap=1.0),
            _RETRIES,
            supported_errors=(exceptions.ConnectionError,),
        ),
        **options,
    )
    return Redis.from_pool(pool)


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Turns redis-py's errors into those that backends raise."""
    try:
        yield
    except LOST as error:
        kind = BackendUnavailable if is_transient(error) else BackendError
        raise kind(f"Redis at {redact(url)}: {reason_of(error)}") from error
