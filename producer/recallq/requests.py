"""Turns a caller's arguments into jobs, or into an `InvalidInput` that says what is wrong.

The one place where input is checked: whatever passes here can be enqueued, stored and read back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import orjson

from recallq.clock import FleetClock
from recallq.contract import (
    DEFAULT_SESSION,
    AddJob,
    AnyJob,
    DeleteJob,
    HealthJob,
    Lane,
    ListJob,
    Operation,
    Scope,
    SearchJob,
    Wait,
)
from recallq.errors import ConfigurationError, InvalidInput
from recallq.jsonable import is_unicode
from recallq.messages import MessageLike, encode_messages, to_messages
from recallq.models import made
from recallq.settings import ClientSettings

_SEARCH_FILTERS = ("top_k", "session_id", "score_threshold")
_LIST_FILTERS = ("page_num", "page_size", "session_id")

_LONGEST_TIMEOUT = 366 * 24 * 3600
_LARGEST_NUMBER = 2**53
_MOST_REMEMBERED = 10_000
_LONGEST_REMEMBERED = 200
"""Ids, and characters of one."""

Filters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """A checked call: the job it becomes, and the way it takes."""

    lane: Lane
    operation: Operation
    job: AnyJob
    size: int = 0
    """Bytes of its texts."""


class Requests:
    """Builds the jobs of one client. `timeout` is in seconds and sets the job's deadline."""

    def __init__(self, settings: ClientSettings, clock: FleetClock) -> None:
        self._settings = settings
        self._clock = clock
        self._sound: set[str] = set()
        """Ids that were checked before: most calls are about few."""
        try:
            self._check_id("tenant", settings.tenant)
        except InvalidInput as error:
            raise ConfigurationError(str(error)) from error

    def add(
        self,
        user_id: str,
        messages: MessageLike | Sequence[MessageLike],
        session_id: str | None,
        *,
        timeout: float | None,
        lane: Lane | str | None,
        idempotency_key: str | None,
        order: int | None = None,
        infer: bool | None = None,
    ) -> Request:
        """To add messages. Takes the order key now, unless it was taken before."""
        settings = self._settings
        way = self._lane(lane)
        scope = self._scope(user_id, DEFAULT_SESSION if session_id is None else session_id)
        if idempotency_key is not None:
            self._check_id("idempotency_key", idempotency_key)
        if order is not None and not (
            isinstance(order, int) and not isinstance(order, bool) and 0 <= order < _LARGEST_NUMBER
        ):
            raise InvalidInput(f"order must be what next_order() returned, not {_short(order)}")
        if infer is not None and not isinstance(infer, bool):
            raise InvalidInput(f"infer must be True, False or None, not {_short(infer)}")
        encoded = encode_messages(messages, settings.max_message_bytes)
        if not encoded:
            raise InvalidInput("messages is empty; give at least one message to add")
        size = sum(map(len, encoded))
        if size > settings.max_job_bytes:
            raise InvalidInput(
                f"the messages are {size:,} bytes together and the limit is "
                f"{settings.max_job_bytes:,}; add them in several calls, or raise max_job_bytes"
            )
        submitted_at, deadline = self._times(timeout)
        job = made(
            AddJob,
            id="",
            scope=scope,
            submitted_at=submitted_at,
            deadline=deadline,
            trace=None,
            messages=cast("list[dict[str, Any]]", [orjson.Fragment(each) for each in encoded]),
            order=self._clock.next_order() if order is None else order,
            idempotency_key=idempotency_key,
            origin=None,
            infer=infer,
        )
        return Request(way, Operation.ADD, job, size)

    def search(
        self,
        user_id: str,
        messages: MessageLike | Sequence[MessageLike],
        filters: Filters | None,
        *,
        timeout: float | None,
        lane: Lane | str | None,
    ) -> Request | None:
        """To search for the text of the last message; None if there is no text to look for."""
        way = self._lane(lane)
        given = self._filters(filters, _SEARCH_FILTERS)
        top_k = self._count(given, "top_k", self._settings.default_top_k)
        threshold = given.get("score_threshold")
        if threshold is not None and not _is_number(threshold):
            raise InvalidInput(f"score_threshold must be a number, not {_short(threshold)}")
        scope = self._scope(user_id, given.get("session_id"))
        if isinstance(messages, str):
            text = messages
        else:
            query = to_messages(messages)
            text = query[-1].text if query else ""
        _check_text("the query", text)
        limit = self._settings.max_message_bytes
        if len(text) > limit or len(text.encode()) > limit:
            raise InvalidInput(f"the query is longer than {limit:,} bytes")
        if not text.strip():
            return None
        submitted_at, deadline = self._times(timeout)
        job = made(
            SearchJob,
            id="",
            scope=scope,
            submitted_at=submitted_at,
            deadline=deadline,
            trace=None,
            query=text,
            top_k=top_k,
            score_threshold=None if threshold is None else float(threshold),
        )
        return Request(way, Operation.SEARCH, job, len(text))

    def page(
        self,
        user_id: str,
        filters: Filters | None,
        *,
        timeout: float | None,
        lane: Lane | str | None,
    ) -> Request:
        """To list one page."""
        given = self._filters(filters, _LIST_FILTERS)
        page_size = self._count(given, "page_size", self._settings.default_page_size)
        page_num = self._count(given, "page_num", 1, limited=False)
        scope = self._scope(user_id, given.get("session_id"))
        submitted_at, deadline = self._times(timeout)
        job = made(
            ListJob,
            id="",
            scope=scope,
            submitted_at=submitted_at,
            deadline=deadline,
            trace=None,
            offset=(page_num - 1) * page_size,
            limit=page_size,
        )
        return Request(self._lane(lane), Operation.LIST, job)

    def delete(
        self,
        user_id: str,
        session_id: str | None,
        *,
        timeout: float | None,
        lane: Lane | str | None,
        idempotency_key: str | None,
    ) -> Request:
        """To delete one session, or the whole user with `session_id` None."""
        scope = self._scope(user_id, session_id)
        if idempotency_key is not None:
            self._check_id("idempotency_key", idempotency_key)
        submitted_at, deadline = self._times(timeout)
        job = made(
            DeleteJob,
            id="",
            scope=scope,
            submitted_at=submitted_at,
            deadline=deadline,
            trace=None,
            idempotency_key=idempotency_key,
        )
        return Request(self._lane(lane), Operation.DELETE, job)

    def check_scope(self, user_id: str, session_id: str | None) -> None:
        """Checks the ids of a call that has nothing else to do."""
        self._scope(user_id, session_id)

    def health(self, *, timeout: float) -> Request:
        """To ask the memory backend how it is."""
        submitted_at, deadline = self._times(timeout)
        scope = Scope(self._settings.tenant, "")
        job = made(
            HealthJob,
            id="",
            scope=scope,
            submitted_at=submitted_at,
            deadline=deadline,
            trace=None,
        )
        return Request(Lane.LIVE, Operation.HEALTH, job)

    def is_early(self, wait: Wait | None) -> bool:
        """Whether a caller waits only until messages are stored. None leaves it to the settings."""
        if wait is None:
            wait = self._settings.wait
        elif wait not in (known := get_args(Wait)):
            raise InvalidInput(f"wait must be one of {', '.join(known)}, not {_short(wait)}")
        return wait == "stored"

    @staticmethod
    def _lane(lane: Lane | str | None) -> Lane:
        if lane is None:
            return Lane.LIVE
        try:
            return Lane(lane)
        except ValueError:
            known = ", ".join(each.value for each in Lane)
            raise InvalidInput(f"lane {lane!r} is unknown; the lanes are {known}") from None

    def _times(self, timeout: float | None) -> tuple[float, float | None]:
        now = self._clock.now()
        if timeout is None:
            return now, None
        if not _is_number(timeout) or not 0 < timeout <= _LONGEST_TIMEOUT:
            raise InvalidInput(
                f"timeout must be a positive number of seconds, at most {_LONGEST_TIMEOUT:,}, "
                f"not {_short(timeout)}"
            )
        return now, now + timeout

    def _scope(self, user_id: object, session_id: object) -> Scope:
        self._check_id("user_id", user_id)
        if session_id is not None:
            self._check_id("session_id", session_id)
        return Scope(self._settings.tenant, user_id, session_id)  # type: ignore[arg-type]  # checked

    def _check_id(self, name: str, value: object) -> None:
        if not isinstance(value, str):
            raise InvalidInput(f"{name} must be a string, not {type(value).__name__}")
        if value in self._sound:
            return
        if not value:
            raise InvalidInput(f"{name} is empty")
        _check_text(name, value)
        limit = self._settings.max_id_bytes
        if len(value) > limit or len(value.encode()) > limit:
            raise InvalidInput(f"{name} is longer than {limit:,} bytes")
        if len(value) <= _LONGEST_REMEMBERED:
            if len(self._sound) >= _MOST_REMEMBERED:
                self._sound.clear()
            self._sound.add(value)

    def _filters(self, filters: Filters | None, known: tuple[str, ...]) -> Filters:
        if filters is None:
            return {}
        if not isinstance(filters, Mapping):
            raise InvalidInput(f"filters must be a dictionary, not {type(filters).__name__}")
        for name in filters:
            if name not in known:
                raise InvalidInput(
                    f"unknown filter {name!r}; the filters here are {', '.join(known)}"
                )
        return {name: value for name, value in filters.items() if value is not None}

    def _count(self, given: Filters, name: str, default: int, *, limited: bool = True) -> int:
        value = given.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidInput(f"{name} must be a whole number, not {_short(value)}")
        if value < 1:
            raise InvalidInput(f"{name} must be at least 1, not {_short(value)}")
        limit = self._settings.max_page_size if limited else 2**40
        if value > limit:
            raise InvalidInput(f"{name} must be at most {limit:,}, not {_short(value)}")
        return value


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER
    return isinstance(value, float) and math.isfinite(value)


def _short(value: object) -> str:
    """A value as an error shows it: in few words, however large it is."""
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        return "a number that large"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _check_text(name: str, value: str) -> None:
    if not is_unicode(value):
        raise InvalidInput(f"{name} is not valid Unicode text")
