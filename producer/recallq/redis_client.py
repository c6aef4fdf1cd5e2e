"""The single point of control for Redis connections.

Every pool is made here, with limits set on purpose: redis-py's own pool fails beyond 100
connections instead of waiting, and its default socket timeout breaks longer blocking reads.
Driver errors become `ServiceUnavailable` here and nowhere else, and no URL is ever shown with its
credentials.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from recallq.errors import ServiceUnavailable

RedisClient: TypeAlias = Redis
"""An asyncio client whose replies are bytes, whatever its annotations allow besides."""


def connect(
    url: str,
    *,
    max_connections: int = 16,
    connect_timeout: float = 5.0,
    command_timeout: float | None = 10.0,
    retries: int = 3,
) -> RedisClient:
    """An asyncio client for `url` (``redis://``, ``rediss://`` or ``unix://``); replies are bytes.

    Connections are made on first use, inside the running event loop. Callers beyond
    `max_connections` wait for a free one. `command_timeout` None is for blocking reads and
    pub/sub. A command that fails with the connection is repeated up to `retries` times, so only
    commands that may be repeated belong here; `retries=0` for the others.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=command_timeout,
        socket_connect_timeout=connect_timeout,
        socket_timeout=command_timeout,
        health_check_interval=30,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), retries),
        retry_on_error=[exceptions.BusyLoadingError],
    )
    return Redis.from_pool(pool)


def redact(url: str) -> str:
    """`url` without its credentials, for errors and logs."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    query = urlencode([(k, v) for k, v in parse_qsl(parts.query) if k not in _SECRET_QUERY])
    return urlunsplit((parts.scheme, host, parts.path, query, ""))


_SECRET_QUERY = frozenset({"password", "username"})


@contextmanager
def translating(url: str, doing: str) -> Iterator[None]:
    """Turns redis-py's errors into `ServiceUnavailable`, saying what was being done and where."""
    try:
        yield
    except exceptions.AuthenticationError as error:
        raise ServiceUnavailable(
            f"{doing}: Redis at {redact(url)} refused the credentials; check the user and password"
        ) from error
    except exceptions.OutOfMemoryError as error:
        raise ServiceUnavailable(
            f"{doing}: Redis at {redact(url)} is out of memory (maxmemory); nothing was enqueued"
        ) from error
    except (exceptions.RedisError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise ServiceUnavailable(f"{doing}: Redis at {redact(url)}: {reason}") from error
