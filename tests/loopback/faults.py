"""What goes wrong in a loopback server on request, and how to say to which requests.

A fault, latency, hold or question names requests by a part of ``"METHOD /path$"``:
``"/v1/chat"``, ``"DELETE /v1/memories/"``, or ``"/v3/memories/$"``, which is that path only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from aiohttp import web


@dataclass
class Received:
    """A request as it came in."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """By names in lower case."""
    body: Any
    """The parsed JSON; None where there is none, the text where it is something else."""
    at: float
    """When, in `time.monotonic()` seconds."""
    raw: bytes = field(default=b"", repr=False)
    """The body as it came, until it is answered."""
    status: int | None = None
    """What it was answered; None while it runs, and for good if it never was."""

    def matches(self, path_part: str) -> bool:
        return path_part in f"{self.method} {self.path}$"


class HttpFailure(Exception):
    """Raised or returned where an answer is made, it is what the client gets."""

    def __init__(
        self,
        status: int,
        message: str = "",
        *,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message or f"failure {status} on request")
        self.status = status
        self.message = str(self)
        self.body = body
        self.headers = dict(headers or {})
        self.code = code
        self.param = param


@dataclass
class Fault:
    """Something that goes wrong with matching requests."""

    kind: Literal["fail", "hang", "cut"]
    path_part: str
    left: int | None
    """How many times more; None: until cleared."""
    after: bool
    """Whether the request takes effect before it goes wrong."""
    failure: HttpFailure | None = None
    seconds: float = 0.0

    def strikes(self, received: Received, *, after: bool) -> bool:
        return self.after == after and received.matches(self.path_part)


@dataclass
class Hold:
    """Keeps matching requests waiting until it is released. ``with server.hold(...) as held:``"""

    path_part: str
    after: bool
    waiting: int = 0
    """How many requests wait here now."""
    _call: Callable[[Callable[[], None]], None] = field(default=lambda call: call(), repr=False)
    _open: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def released(self) -> bool:
        return self._open.is_set()

    def release(self) -> None:
        self._call(self._open.set)

    async def passed(self) -> None:
        self.waiting += 1
        try:
            await self._open.wait()
        finally:
            self.waiting -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Faults:
    """Those of a server. All of it may be called from any thread while requests run."""

    def __init__(self) -> None:
        self.latency: dict[str, float] = {}
        """Seconds that matching requests take longer; hundreds may wait at the same time."""
        self.misfortune: Callable[[Received, bool], Fault | None] | None = None
        """Says what befalls a request that no fault strikes: it is asked before the request takes
        effect (False) and after it has (True), on the server's loop."""
        self._faults: list[Fault] = []
        self._holds: list[Hold] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def faults(self) -> list[Fault]:
        """Those that still strike. Of several, the first that was made does."""
        return [each for each in list(self._faults) if each.left != 0]

    def fail(
        self,
        path_part: str,
        status: int,
        *,
        times: int | None = None,
        headers: Mapping[str, str] | None = None,
        body: object = None,
        after: bool = False,
    ) -> Fault:
        """Answers with `status`, and an error of the service's shape or `body`."""
        failure = HttpFailure(status, body=body, headers=headers)
        return self._add(Fault("fail", path_part, times, after, failure=failure))

    def hang(
        self, path_part: str, seconds: float, *, times: int | None = None, after: bool = False
    ) -> Fault:
        """Waits `seconds` before it serves; with `after`, between the effect and the answer."""
        return self._add(Fault("hang", path_part, times, after, seconds=seconds))

    def cut(self, path_part: str, times: int | None = None, *, after: bool = False) -> Fault:
        """Hangs up without an answer."""
        return self._add(Fault("cut", path_part, times, after))

    def clear_faults(self) -> None:
        """Ends faults, latencies and holds. What hangs already goes on hanging."""
        self.misfortune = None
        self._faults.clear()
        self.latency.clear()
        for hold in list(self._holds):
            hold.release()
        self._holds.clear()

    def hold(self, path_part: str, *, after: bool = False) -> Hold:
        """From now on, matching requests wait: for their turn, or `after` it for their answer."""
        hold = Hold(path_part, after, _call=self._call)
        self._holds.append(hold)
        return hold

    def _add(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    # --- in the server --------------------------------------------------------------------------

    def _call(self, call: Callable[[], None]) -> None:
        """Runs `call` on the server's loop, or here if there is none any more."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(call)
                return
        call()

    async def _delay(self, received: Received) -> None:
        latency = dict(self.latency)
        await asyncio.sleep(
            sum(seconds for part, seconds in latency.items() if received.matches(part))
        )

    async def _pass_holds(self, received: Received, *, after: bool) -> None:
        for hold in list(self._holds):
            if hold.after == after and received.matches(hold.path_part):
                await hold.passed()

    async def _strike(self, request: web.Request, received: Received, *, after: bool) -> bool:
        """Lets the first matching fault happen, if any. Whether the connection is gone."""
        fault = next((each for each in self.faults if each.strikes(received, after=after)), None)
        if fault is None and self.misfortune is not None:
            fault = self.misfortune(received, after)
        if fault is None:
            return False
        if fault.left is not None:
            fault.left -= 1
        if fault.failure is not None:
            raise fault.failure.with_traceback(None)  # it may strike many times
        if fault.kind == "cut":
            hang_up(request)
            return True
        await asyncio.sleep(fault.seconds)
        return False


def hang_up(request: web.Request) -> None:
    """Closes the connection under the request."""
    if request.transport is not None:
        request.transport.abort()
