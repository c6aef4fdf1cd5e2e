"""The Tablestore SDK's client, and what its errors mean here.

The SDK retries up to twenty times by itself, for up to a minute, and hides it; here a call is tried
again a few times within a second, and beyond that the job is, which survives the process.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import SecretStr

from recallq.errors import BackendError, BackendUnavailable, JobError, MissingExtra
from recallq.tablestore_access import is_being_built, passes, revealed

if TYPE_CHECKING:
    from tablestore import AsyncOTSClient, RetryPolicy
    from tablestore.credentials import CredentialsProvider

T = TypeVar("T")

_QUIET = logging.getLogger("recallq_worker.tablestore_sdk")
"""The SDK logs every refusal as an error, those that are expected too."""
_QUIET.setLevel(logging.CRITICAL)
_CONNECT_TIMEOUT = 5.0
_ANSWER_TIMEOUT = 20.0
_LONGEST_CALL = 25.0
_BUILDING = 15.0
"""Seconds after which an index that is being built is asked again."""
_TRIES = 4
_FIRST_PAUSE = 0.05
_LONGEST_REASON = 200

CONDITION_FAILED = "OTSConditionCheckFail"
NO_SUCH_OBJECT = "OTSObjectNotExist"
ALREADY_THERE = "OTSObjectAlreadyExist"


def create_tablestore_client(
    end_point: str,
    access_key_id: str | SecretStr,
    access_key_secret: str | SecretStr,
    instance_name: str,
    sts_token: str | SecretStr | None = None,
    region: str | None = None,
    credentials_provider: CredentialsProvider | None = None,
    retry_policy: RetryPolicy | None = None,
    **options: Any,
) -> AsyncOTSClient:
    """An asyncio client of one Tablestore instance, for the event loop that first uses it.

    The arguments are those it had in agentscope-runtime. A `credentials_provider` goes before keys
    and token, and may renew them; a `retry_policy` of None is none. `options` go to
    ``tablestore.AsyncOTSClient``. Raises `MissingExtra`.
    """
    try:
        from tablestore import AsyncOTSClient, NoRetryPolicy
    except ImportError as error:
        raise MissingExtra("the tablestore backend", "tablestore") from error
    options = {
        "socket_timeout": (_CONNECT_TIMEOUT, _ANSWER_TIMEOUT),
        "max_connection": 100,
        "logger_name": _QUIET.name,
        **options,
    }
    return AsyncOTSClient(
        end_point,
        access_key_id=revealed(access_key_id),
        access_key_secret=revealed(access_key_secret),
        instance_name=instance_name,
        sts_token=revealed(sts_token or "") or None,
        region=region or None,
        credentials_provider=credentials_provider,
        retry_policy=retry_policy or NoRetryPolicy(),
        **options,
    )


def meaning(code: str, message: str = "") -> JobError:
    """The error that stands for what Tablestore says of a call, or of one row of it."""
    if is_being_built(message):
        return BackendUnavailable(
            "the search index is being built, from what the table holds", retry_after=_BUILDING
        )
    if passes(code, message):
        return BackendUnavailable(f"Tablestore answers {code}")
    reason = f": {message[:_LONGEST_REASON]}" if message else ""
    return BackendError(f"Tablestore refuses it, {code}{reason}")


def is_code(error: BaseException, code: str) -> bool:
    """Whether an error is the service's, of this code."""
    from tablestore import OTSServiceError

    return isinstance(error, OTSServiceError) and error.get_error_code() == code


async def asking(call: Callable[[], Awaitable[T]], *, raw: tuple[str, ...] = ()) -> T:
    """What Tablestore answers; `call` must bear being repeated.

    Raises `BackendUnavailable` and `BackendError`; the SDK's own error where its code is in `raw`.
    """
    pause = _FIRST_PAUSE
    for _ in range(_TRIES - 1):
        try:
            return await _once(call, raw)
        except BackendUnavailable:
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311  # spreads load
            pause *= 3
    return await _once(call, raw)


async def _once(call: Callable[[], Awaitable[T]], raw: tuple[str, ...]) -> T:
    import aiohttp
    from google.protobuf.message import DecodeError
    from tablestore import OTSClientError, OTSServiceError

    try:
        async with asyncio.timeout(_LONGEST_CALL):
            return await call()
    except OTSServiceError as error:
        code, status = error.get_error_code() or "", error.get_http_status() or 0
        if code in raw:
            raise
        if status in (408, 429) or status >= 500:
            raise BackendUnavailable(f"Tablestore answers {status} {code}".rstrip()) from error
        raise meaning(code or f"HTTP {status}", error.get_error_message() or "") from error
    except (OTSClientError, DecodeError, ValueError) as error:
        # An answer that is not Tablestore's: of a proxy, or cut off. The service does not send it.
        raise BackendUnavailable(
            f"Tablestore's answer cannot be read: {str(error)[:_LONGEST_REASON]}"
        ) from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise BackendUnavailable(
            f"Tablestore cannot be reached ({type(error).__name__})"
        ) from error
