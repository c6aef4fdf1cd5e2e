"""A real HTTP server on the loopback interface, for tests: what all of them share.

The server lives in a thread of its own with an event loop of its own, so that a test, whatever loop
it runs on, and processes it has started, such as real workers, talk to it over real sockets with
the unpatched client libraries. It takes note of every request, and does on request what services do
on a bad day: refuse, hang, hang up, be slow, keep everybody waiting.

Everything here may be called from the test's thread while requests run. There are no locks on
purpose: state changes on the server's loop only, or by single operations that the interpreter does
at once, and is read by copying; so the loop never waits for a test, and tests that watch for
blocking calls see none in it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from aiohttp.typedefs import Handler

from tests.loopback.faults import Faults, HttpFailure, Received

ALL = "*"
"""The gauges of all paths together."""

RECEIVED: ContextVar[Received] = ContextVar("received")
"""Where a handler finds the request as it came in."""

_SECONDS = 10.0


class LoopbackServer(Faults, ABC):
    """``with LoopbackServer() as server: server.url``. Subclasses bring the routes."""

    def __init__(self, *, port: int = 0) -> None:
        super().__init__()
        self._port = port
        self._requests: list[Received] = []
        self._in_flight: Counter[str] = Counter()
        self._most_in_flight: Counter[str] = Counter()
        self._handlers: set[asyncio.Task[Any]] = set()
        self._thread: threading.Thread | None = None
        self._stopping: asyncio.Event | None = None

    # --- what subclasses say --------------------------------------------------------------------

    @abstractmethod
    def routes(self) -> list[web.RouteDef]: ...

    def authorize(self, request: Received) -> None:
        """Raises `HttpFailure` for a request that shows no valid key."""

    def parse_body(self, path: str, raw: bytes) -> Any:
        """What `Received.body` is, of a body that is not empty."""
        try:
            return json.loads(raw)
        except ValueError:
            return raw.decode(errors="replace")

    def error_body(self, failure: HttpFailure) -> object:
        """An error in the shape of the service."""
        return {"error": failure.message}

    def finish(self, request: Received, response: web.Response) -> None:
        """The last look at an answer, errors too, before it is sent."""

    # --- life -----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        assert self._port, "the server was never started"
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Starts serving; after `stop`, at the same address and with everything it held."""
        assert self._thread is None, "the server runs already"
        ready: Future[None] = Future()
        thread = threading.Thread(
            target=self._run, args=(ready,), name=type(self).__name__, daemon=True
        )
        thread.start()
        ready.result(_SECONDS)
        self._thread = thread

    def stop(self) -> None:
        """Stops at once: whoever still waits for an answer is hung up on."""
        if self._thread is None:
            return
        assert self._stopping is not None
        self._call(self._stopping.set)
        self._thread.join(_SECONDS)
        assert not self._thread.is_alive(), "the server did not stop in time"
        self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # --- what came in ---------------------------------------------------------------------------

    @property
    def requests(self) -> list[Received]:
        """All requests since the start or `reset_counts`, refused ones too, in order."""
        return list(self._requests)

    def requests_to(self, path_part: str) -> list[Received]:
        return [each for each in self.requests if each.matches(path_part)]

    def count(self, path_part: str) -> int:
        return len(self.requests_to(path_part))

    @property
    def in_flight(self) -> Counter[str]:
        """How many requests wait for an answer now, by path; under `ALL`, altogether."""
        return Counter(dict(self._in_flight))

    @property
    def most_in_flight(self) -> Counter[str]:
        """The most there ever were at the same time since `reset_counts`."""
        return Counter(dict(self._most_in_flight))

    def reset_counts(self) -> None:
        self._requests.clear()
        self._most_in_flight = self.in_flight

    def wait_for_request(self, path_part: str, count: int = 1, timeout: float = 30.0) -> Received:
        """Blocks until the `count`-th matching request has arrived, and returns it.

        On an event loop: ``await asyncio.to_thread(server.wait_for_request, ...)``.
        """
        deadline = time.monotonic() + timeout
        while len(found := self.requests_to(path_part)) < count:
            assert time.monotonic() < deadline, (
                f"{len(found)} of {count} requests to {path_part} within {timeout} s"
            )
            time.sleep(0.002)
        return found[count - 1]

    # --- the server's thread --------------------------------------------------------------------

    def _run(self, ready: Future[None]) -> None:
        try:
            asyncio.run(self._serve_until_stopped(ready))
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)
        finally:
            self._loop = None

    async def _serve_until_stopped(self, ready: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        application = web.Application(middlewares=[self._middleware], client_max_size=64 * 2**20)
        application.add_routes(self.routes())
        # A client that has gone takes its request with it, as it does with real services that are
        # still waiting for a worker; a handler that hangs does not stay behind as a ghost.
        runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", self._port, backlog=1024, reuse_address=True)
            await site.start()
            self._port = runner.addresses[0][1]
            ready.set_result(None)
            await self._stopping.wait()
        finally:
            for handler in self._handlers:
                handler.cancel()
            await runner.cleanup()

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)
        received = await self._received(request)
        RECEIVED.set(received)
        async with self._counted(received):
            self._requests.append(received)
            try:
                response = await self._answered(request, received, handler)
            except HttpFailure as failure:
                body = self.error_body(failure) if failure.body is None else failure.body
                response = as_response(body, status=failure.status, headers=failure.headers)
            except ConnectionResetError:
                response = web.Response()  # whoever asked has gone, in the middle of a stream
            received.status = None if _is_cut(request) else response.status
            if isinstance(response, web.Response):
                self.finish(received, response)
            received.raw = b""  # what is in it is in the body, and tests keep thousands of these
            return response

    async def _received(self, request: web.Request) -> Received:
        raw = await request.read()
        return Received(
            request.method,
            request.path,
            dict(request.query),
            {name.lower(): value for name, value in request.headers.items()},
            self.parse_body(request.path, raw) if raw else None,
            time.monotonic(),
            raw,
        )

    async def _answered(
        self, request: web.Request, received: Received, handler: Handler
    ) -> web.StreamResponse:
        await self._pass_holds(received, after=False)
        await self._delay(received)
        if await self._strike(request, received, after=False):
            return web.Response()
        self.authorize(received)
        try:
            response = await handler(request)
        except web.HTTPException as error:  # no such path, or not with this method
            url = f"Invalid URL ({request.method} {request.path})"
            raise HttpFailure(error.status, url) from error
        await self._pass_holds(received, after=True)
        if await self._strike(request, received, after=True):
            return web.Response()
        return response

    @asynccontextmanager
    async def _counted(self, received: Received) -> AsyncIterator[None]:
        gauges = (received.path, ALL)
        for gauge in gauges:
            self._in_flight[gauge] += 1
            self._most_in_flight[gauge] = max(self._most_in_flight[gauge], self._in_flight[gauge])
        try:
            yield
        finally:
            for gauge in gauges:
                self._in_flight[gauge] -= 1


def as_response(
    body: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """JSON; a string is sent as it stands, for the error page of a gateway, and so are bytes."""
    if isinstance(body, bytes):
        return web.Response(body=body, status=status, headers=headers)
    if isinstance(body, str):
        return web.Response(text=body, status=status, headers=headers, content_type="text/html")
    return web.json_response(body, status=status, headers=headers)


def _is_cut(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


async def json_object(request: web.Request) -> dict[str, Any]:
    """The body, which the services want to be an object."""
    try:
        body = await request.json()
    except ValueError as error:
        raise HttpFailure(400, "We could not parse the JSON body of your request.") from error
    if not isinstance(body, dict):
        raise HttpFailure(400, "The JSON body of your request must be an object.")
    return body
