"""Requests to mem0's platform, by mem0's own client, and what may go wrong with them.

What that client does not do, is done here: it has no method for events, its constructor blocks, and
what it raises and logs holds ids, and what users said.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

import httpx
import requests

# mem0 carries annotations here and there, and no marker that it does.
from mem0 import AsyncMemoryClient  # type: ignore[import-untyped]
from pydantic import SecretStr

from recallq.errors import BackendError, BackendUnavailable, JobError
from recallq_worker.backends.failures import as_job_error

_PAGE = 100
_LISTINGS = 3
"""How often a list is fetched that changes meanwhile."""
_CONNECTIONS = 100
_DELETES_AT_ONCE = 8
_CONNECT, _HEALTH = 10.0, 5.0

Row: TypeAlias = dict[str, Any]
T = TypeVar("T")


class PlatformClient:
    """Raises `BackendError` and `BackendUnavailable`. No request is ever repeated."""

    def __init__(self, api_key: SecretStr, host: str, *, timeout: float) -> None:
        """`timeout` in seconds: the longest that one request may take."""
        self._key = api_key
        self._host = host
        self._timeout = timeout
        self._http: httpx.AsyncClient | None = None
        self._client: Any = None

    @property
    def where(self) -> str:
        return f"mem0's platform at {httpx.URL(self._host).host}"

    async def connect(self) -> None:
        _quieten()
        with _job_errors(f"connecting to {self.where}"):
            async with asyncio.timeout(min(self._timeout, _CONNECT)):
                self._client = await _in_a_thread(self._made)

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    def _made(self) -> Any:
        """Blocks: certificates are read from files, and mem0's client asks the platform."""
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, _CONNECT)),
            limits=httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=20),
        )
        key = self._key.get_secret_value()
        return AsyncMemoryClient(api_key=key, host=self._host, client=self._http)

    async def ping(self) -> None:
        await self._call("asking", self._get("/v1/ping/"), seconds=min(self._timeout, _HEALTH))

    async def add(
        self, messages: Sequence[Row], request: Row, refused: Callable[[], Awaitable[None]]
    ) -> Any:
        """The answer to an add. Awaits `refused` if the platform certainly has not taken it."""
        with _job_errors("adding to mem0's platform"):
            try:
                return await self._timed(self._api.add([*messages], **request))
            except Exception as error:
                if 300 <= _status(error) < 500 and _status(error) != 408:
                    await refused()
                raise

    async def event(self, event_id: str) -> Row | None:
        """An event; None if the platform knows of none."""
        asked = self._get(f"/v1/event/{event_id}/")
        answer = await self._call("following an event of mem0's platform", asked, missing=True)
        return answer if isinstance(answer, dict) else None

    async def search(self, query: str, options: Row) -> list[Row]:
        asked = self._api.search(query, **options)
        return _memories(await self._call("searching mem0's platform", asked))

    async def every(self, filters: Row) -> list[Row]:
        """Every memory that `filters` select, in no order."""
        rows: dict[str, Row] = {}
        for _ in range(_LISTINGS):
            rows, counts = {}, set()
            for page in itertools.count(1):
                asked = self._api.get_all(filters=filters, page=page, page_size=_PAGE)
                # A list that has become shorter may end before the page that it had.
                answer = await self._call("listing mem0's platform", asked, missing=page > 1)
                answer = {} if answer is None else answer
                found = _memories(answer)
                if isinstance(answer, Mapping):
                    counts.add(answer.get("count"))
                # A list that has grown shows some of them twice.
                rows |= {row["id"]: row for row in found}
                if not isinstance(answer, Mapping) or not answer.get("next") or not found:
                    break
            if len(counts) <= 1:
                break  # else something may have moved to a page before its own, and was missed
        return [*rows.values()]

    async def delete_all(self, whose: Row) -> str | None:
        """The id of the event that tells when it has happened, if there is one."""
        asked = self._api.delete_all(**whose)
        return event_id_in(await self._call("deleting from mem0's platform", asked))

    async def delete_each(self, ids: Sequence[str]) -> None:
        """Deletes memories by their ids; those that are gone are none the less deleted."""
        waiting = iter(ids)

        async def work() -> None:
            for each in waiting:
                deleting = self._api.delete(each)
                await self._call("deleting from mem0's platform", deleting, missing=True)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(ids), _DELETES_AT_ONCE)):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    @property
    def _api(self) -> Any:
        assert self._client is not None, "the backend was not started"
        return self._client

    async def _get(self, path: str) -> Any:
        response = await self._api.async_client.get(path)
        response.raise_for_status()
        return response.json()

    async def _call(
        self,
        doing: str,
        request: Awaitable[Any],
        *,
        missing: bool = False,
        seconds: float | None = None,
    ) -> Any:
        """What a request returns; None for a 404, if that may be (`missing`)."""
        with _job_errors(doing):
            try:
                return await self._timed(request, seconds)
            except Exception as error:
                if missing and _status(error) == 404:
                    return None
                raise

    async def _timed(self, request: Awaitable[T], seconds: float | None = None) -> T:
        # httpx bounds each read and write; this bounds them altogether.
        async with asyncio.timeout(self._timeout if seconds is None else seconds):
            return await request


def rows_in(answer: Any) -> list[Row]:
    """The results in an answer, whichever way they are wrapped."""
    found = answer.get("results") if isinstance(answer, Mapping) else answer
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _memories(answer: Any) -> list[Row]:
    return [{**row, "id": str(row["id"])} for row in rows_in(answer) if row.get("id")]


def event_id_in(answer: Any) -> str | None:
    for each in [answer, *rows_in(answer)]:
        if isinstance(each, Mapping) and isinstance(each.get("event_id"), str):
            return str(each["event_id"])
    return None


# --- errors -------------------------------------------------------------------------------------


def _quieten() -> None:
    """Keeps two libraries from logging what users said and who they are.

    mem0's client logs every failure with its URL, which holds user ids, before it raises it; and
    httpx, every request with its URL.
    """
    logging.getLogger("mem0.client").setLevel(logging.CRITICAL)
    if logging.getLogger("httpx").level == logging.NOTSET:
        logging.getLogger("httpx").setLevel(logging.WARNING)


@contextmanager
def _job_errors(doing: str) -> Iterator[None]:
    """Raises what backends raise. Without the causes: their texts hold ids, keys and messages."""
    try:
        yield
    except Exception as error:
        known = _job_error(error, doing)
        if known is None:
            raise
        raise known from None


def _job_error(error: Exception, doing: str) -> JobError | None:
    cause, status = _behind(error), _status(error)
    if status in (401, 403):
        return BackendError(f"{doing}: HTTP {status}; check MEM0_API_KEY")
    if 300 <= status < 400:
        return BackendError(f"{doing}: HTTP {status}; check RECALLQ_MEM0_HOST")
    if isinstance(
        cause, UnicodeError | httpx.LocalProtocolError | requests.exceptions.InvalidHeader
    ):
        return BackendError(f"{doing}: the key cannot be sent; check MEM0_API_KEY")
    if isinstance(cause, json.JSONDecodeError):
        return BackendUnavailable(f"{doing}: the answer is not JSON")
    if isinstance(cause, httpx.RequestError):
        return BackendUnavailable(f"{doing}: {type(cause).__name__}")
    return as_job_error(cause, doing)


def _behind(error: BaseException) -> BaseException:
    """The error of the HTTP library behind one of mem0's, which has more to tell."""
    behind = error.__context__
    library = httpx.HTTPError | requests.RequestException
    return behind if isinstance(behind, library) and not isinstance(error, JobError) else error


def _status(error: BaseException) -> int:
    """The HTTP status that an error is about; 0 if none."""
    status = getattr(getattr(_behind(error), "response", None), "status_code", None)
    return status if isinstance(status, int) else 0


async def _in_a_thread(work: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, but nobody waits for the thread at the end of the process: what
    blocks in it has no timeout."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # without an error, it is there

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  # raised where it is awaited
            failure = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="recallq-mem0-start", daemon=True).start()
    return await done
