"""Redis as asked by code that runs in threads, in the errors that backends raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from recallq.errors import BackendError, BackendUnavailable
from recallq.redis_client import LOST, is_transient, reason_of, redact


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Turns redis-py's errors into those that backends raise."""
    try:
        yield
    except LOST as error:
        kind = BackendUnavailable if is_transient(error) else BackendError
        raise kind(f"Redis at {redact(url)}: {reason_of(error)}") from error
