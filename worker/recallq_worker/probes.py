"""``/healthz``, ``/readyz`` and ``/metrics`` of one worker process, for those who watch over it.

Alive means that the process's event loop turns: whoever restarts a process because of that must not
do so because Redis is away. Ready means that Redis and the memory backend answered.
"""

from __future__ import annotations

import errno
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from recallq.errors import ConfigurationError
from recallq.fleet import FleetState

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

_ALIVE_WITHIN = 5.0
"""Seconds in which the event loop takes its turn, however busy it is."""
_PATIENCE = 8.0
"""Seconds for which an answer is waited for."""
_SILENCE = 3.0
"""Seconds for which a connection may say nothing."""
_MOST_ASKING = 64
"""Connections at once; more are closed."""
_ASK_AGAIN = 2.0
"""Seconds for which an answer about readiness holds, however often it is asked for."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._free = threading.BoundedSemaphore(_MOST_ASKING)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # As HTTPServer does it, but without asking a name server who we are.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone, or is no HTTP client."""
        log.debug("%s did not wait for its answer", client_address)


class _Handler(WSGIRequestHandler):
    timeout = _SILENCE

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # as it is called
        """Nobody needs a line for every look."""

    def address_string(self) -> str:
        return str(self.client_address[0])  # without asking a name server


class Probes:
    """The server, in threads of its own."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        submit: Callable[[Coroutine[Any, Any, Any]], Future[Any]],
        trouble: Callable[[], Coroutine[Any, Any, str | None]],
        fleet: Callable[[], Coroutine[Any, Any, FleetState | None]],
        text: Callable[[FleetState | None], bytes],
    ) -> None:
        """`submit` runs a coroutine on the process's loop. `trouble` says why it is not ready, None
        if it is; `fleet` how the fleet stands, if Redis tells, and `text` makes of that what
        /metrics says. Raises `ConfigurationError` if the port is taken."""
        self._submit = submit
        self._trouble = trouble
        self._fleet = fleet
        self._text = text
        self._asking = threading.Lock()
        self._told: tuple[float, str | None] | None = None
        advice = {errno.EADDRINUSE: "; give each worker of a machine a port of its own, or 0"}
        try:
            self._server = make_server(
                host, port, self._answer, server_class=_Server, handler_class=_Handler
            )
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host} port {port} (RECALLQ_HTTP_HOST, RECALLQ_HTTP_PORT): "
                f"{error.strerror or error}{advice.get(error.errno or 0, '')}"
            ) from error
        named = socket.gethostname() if host in ("", "0.0.0.0", "::") else host  # noqa: S104
        named = f"[{named}]" if ":" in named else named
        self.address = f"{named}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="recallq-probes", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def _answer(self, request: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        status, kind, body = "200 OK", "text/plain; charset=utf-8", b"ok\n"
        try:
            match request["REQUEST_METHOD"], request["PATH_INFO"]:
                case (("GET" | "HEAD"), "/healthz"):
                    self._submit(_turn()).result(_ALIVE_WITHIN)
                case (("GET" | "HEAD"), "/readyz"):
                    trouble = self._readiness()
                    if trouble is not None:
                        status, body = "503 Service Unavailable", f"{trouble}\n".encode()
                case (("GET" | "HEAD"), "/metrics"):
                    kind = "text/plain; version=0.0.4; charset=utf-8"
                    body = self._text(self._submit(self._fleet()).result(_PATIENCE))
                case (("GET" | "HEAD"), _):
                    status, body = "404 Not Found", b"/healthz, /readyz and /metrics are here\n"
                case _:
                    status, body = "405 Method Not Allowed", b"only GET\n"
        except Exception as error:  # noqa: BLE001  # whatever it is, whoever asks is to know
            log.warning("cannot answer %s: %s", request["PATH_INFO"], type(error).__name__)
            status, body = "503 Service Unavailable", f"{type(error).__name__}\n".encode()
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [] if request["REQUEST_METHOD"] == "HEAD" else [body]

    def _readiness(self) -> str | None:
        with self._asking:
            now = time.monotonic()
            if self._told is None or now - self._told[0] > _ASK_AGAIN:
                trouble = self._submit(self._trouble()).result(_PATIENCE)
                self._told = (time.monotonic(), trouble)
            return self._told[1]


async def _turn() -> None:
    """Ends as soon as the loop comes to it."""
