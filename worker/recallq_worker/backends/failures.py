"""What goes wrong in libraries that work with others, in the errors that backends raise.

mem0 and ReMe hand on the errors of whichever LLM, embedder and vector store they were told to use.
They are told apart by what they have in common: an HTTP status, else what they are called. Their
words are not repeated: they may hold keys, and what users said.

Or they hand them on to nobody: both carry on where a call to a model failed, or its answer cannot
be read. `noting` keeps such a failure, to be raised when the library returns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from recallq.errors import BackendError, BackendUnavailable, JobError
from recallq_worker.retries import retry_after

_PASSING = frozenset({408, 409, 423, 425, 429})
_UNREACHABLE = re.compile(
    "Timeout|TimedOut|Connection|Connect|Transport|Network|Unavailable|OperationalError"
    "|ResponseHandling|RateLimit|Overloaded|Throttl|ServerError|TooManyRequests"
    "|DeadlineExceeded|ResourceExhausted|InactiveRpc|ReadError|WriteError|CloseError"
    "|RemoteProtocolError|InterfaceError|AdminShutdown|CannotConnectNow"
)
_MISREAD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What clients raise that find something else in an answer than they look for."""
_NO_ACCESS = re.compile("Authentication|PermissionDenied|Unauthorized|Forbidden|Credential")


class UnusableAnswer(Exception):
    """A model answered something else than it was asked for."""


class CutOffAnswer(UnusableAnswer):
    """The LLM's answer does not come to its end: perhaps it was asked for too much."""


class Failing(Protocol):
    """Something that a library works on, and that may have gone wrong meanwhile."""

    failure: BaseException | None
    """The first: it says best what went wrong."""


@contextmanager
def noting(work: Failing | None) -> Iterator[None]:
    """Around a call to a model: keeps a failure, and does nothing more after one, where the library
    would try the next text."""
    if work is not None and work.failure is not None:
        raise work.failure
    try:
        try:
            yield
        except _MISREAD as error:
            if isinstance(error, JobError) or hasattr(error, "status_code"):
                raise
            name = type(error).__name__
            raise UnusableAnswer(f"a model's answer cannot be read ({name})") from error
    except Exception as error:
        if work is not None and work.failure is None:
            work.failure = error
        raise


def as_job_error(error: BaseException, doing: str) -> JobError | None:
    """What to raise for `error`; None if nobody has foreseen it. `doing` begins the message."""
    for each in _chain(error):
        if isinstance(each, JobError):
            return each
        if isinstance(each, UnusableAnswer):
            return BackendUnavailable(f"{doing}: {each}")
        status = _status(each)
        if status is not None:
            return _of_status(each, status, doing)
        name = type(each).__name__
        kinds = " ".join(kind.__name__ for kind in type(each).__mro__)
        if _NO_ACCESS.search(kinds):
            return BackendError(f"{doing}: {name}; check the key")
        if isinstance(each, OSError | EOFError) or _UNREACHABLE.search(kinds):
            return BackendUnavailable(f"{doing}: {name}", retry_after=_retry_after(each))
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """What an error was raised for, innermost first: that says best what it is."""
    found = [error]
    while True:
        last = found[-1]
        cause = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if cause is None or cause in found:
            return reversed(found)
        found.append(cause)


def _status(error: BaseException) -> int | None:
    debug = getattr(error, "debug_info", None)
    candidates = [
        getattr(error, "status_code", None),
        getattr(getattr(error, "response", None), "status_code", None),
        debug.get("status_code") if isinstance(debug, Mapping) else None,
        getattr(error, "code", None),
    ]
    return next((each for each in candidates if isinstance(each, int) and 400 <= each < 600), None)


def _of_status(error: BaseException, status: int, doing: str) -> JobError:
    said = f"{doing}: HTTP {status}"
    code = getattr(error, "code", None)
    if isinstance(code, str) and re.fullmatch(r"[\w.-]{1,60}", code):
        said += f" ({code})"
    if status in _PASSING or status >= 500:
        return BackendUnavailable(said, retry_after=_retry_after(error))
    if status in (401, 403):
        said += "; check the key and its rights"
    if status == 404:
        said += "; check the model and the base URL"
    return BackendError(said)


def _retry_after(error: BaseException) -> float | None:
    """The wait that a server asked for, in seconds."""
    debug = getattr(error, "debug_info", None)
    if isinstance(debug, Mapping) and isinstance(debug.get("retry_after"), int | float):
        return max(float(debug["retry_after"]), 0.0)
    return retry_after(getattr(getattr(error, "response", None), "headers", None))
