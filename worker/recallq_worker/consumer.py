"""Celery's consumer, taught to keep what it holds when the connection to the broker is lost.

This module owns what happens between two connections and with messages that no task can take:

- Messages in hand are worked on to their end, and acknowledged over the next connection. Celery's
  own consumer returns them to the queue, where others find them while they still run.
- Reconnecting goes on for as long as it takes, about once a second, and is logged once.
- A message that Celery would acknowledge and drop with a line in the log is buried as a dead
  letter, and acknowledged after that.

Named in the app's ``worker_consumer`` setting.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

from celery.utils.threads import bound_open_broker_sockets
from celery.worker import consumer as celery_consumer
from celery.worker.consumer.consumer import COLLECT_SOCKET_TIMEOUT
from celery.worker.state import (
    active_requests,
    maybe_shutdown,
    reserved_requests,
    scheduled_requests,
)
from kombu.utils.json import dumps

from recallq.contract import Lane, Operation, speaks_newer
from recallq.errors import ConfigurationError
from recallq.redis_client import LOST, is_denied, reason_of
from recallq.signing import HEADER, Signer
from recallq_worker import runtime
from recallq_worker import settings as worker_settings
from recallq_worker.broker import Message, batch_id_of, explain

log = logging.getLogger(__name__)

_RETRY_STEP = 0.25
_RETRY_MAX = 1.0
_PAUSE = 0.5
_QUIET = 30.0
_TASKS = frozenset(operation.task_name for operation in Operation)
"""Celery has tasks of its own, which run other tasks in turn."""
_READS = frozenset(each.task_name for each in Operation if not each.writes)
_UNKNOWN = "it names an unknown task"
_MORE = ("callbacks", "errbacks", "chain", "chord")
"""What a worker would publish once the task is done, wherever the message says, with rights that
whoever sent it need not have."""
_REPETITIVE = (
    "celery.backends.base",
    "celery.backends.redis",
    "celery.worker.consumer.consumer",
    "recallq_worker.insistence",
    "recallq_worker.runner",
    "recallq_worker.runtime",
    "recallq_worker.slow_lane",
    "recallq_worker.tasks",
)


def quieten(*loggers: str) -> None:
    """Lets each of these loggers say the same thing, in different numbers, only now and then.

    While Redis is down, every waiting thread tells so every second, some with a traceback.
    """
    for name in loggers or _REPETITIVE:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _NowAndThen) for each in logger.filters):
            logger.addFilter(_NowAndThen())


class _NowAndThen(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.CRITICAL:
            return True
        # Celery formats some of its own before it logs them; the digits are what differs.
        text = "".join(each for each in str(record.msg) if not each.isdigit())
        if record.exc_info and isinstance(record.exc_info[1], LOST):
            record.exc_info = None
        elif record.exc_info and record.name.startswith("recallq_worker"):
            return True  # a defect, each of which may be another
        now = time.monotonic()
        if now - self._said.get(text, -_QUIET) < _QUIET:
            return False
        if len(self._said) > 1000:
            self._said.clear()
        self._said[text] = now
        return True


class Consumer(celery_consumer.Consumer):  # type: ignore[misc]  # Celery has no annotations
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # On every lost connection Celery announces the default of a setting that the app sets.
        warnings.filterwarnings("ignore", message=r"\s*In Celery 5\.1 we introduced an optional")
        self._held: list[Message] = []
        self._connected_at = 0.0
        super().__init__(*args, **kwargs)

    # --- from one connection to the next --------------------------------------------------------

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        channel = getattr(self.task_consumer, "channel", None)
        if channel is not None and not channel.closed:
            # A connection that has gone silent would keep the read waiting for ever.
            bound_open_broker_sockets(self.connection, COLLECT_SOCKET_TIMEOUT)
            channel.finish_reading()
            self._held += channel.qos.let_go()
        if is_denied(exc):
            log.error("Redis refuses what the worker needs: %s", reason_of(exc))
        super().on_connection_error_after_connected(exc)
        if time.monotonic() - self._connected_at < _PAUSE:
            time.sleep(_PAUSE)  # it answers, but refuses: read-only after a failover, say

    def on_close(self) -> None:
        # Celery forgets those that wait for their time or for a free process, so they go back.
        # On a lost connection that happens when the next one adopts them.
        forgotten = {*scheduled_requests, *reserved_requests} - {*active_requests}
        held = {id(message) for message in self._held}
        super().on_close()
        for request in forgotten:
            if id(request.message) in held and not request.message.acknowledged:
                request.message.requeue()

    def register_with_event_loop(self, hub: Any) -> None:
        # Comes once for each connection, when its channels are there and consume nothing yet: the
        # messages adopted count against the prefetch limit from the start.
        held, self._held = self._held, []
        self.task_consumer.channel.qos.adopt(held)
        super().register_with_event_loop(hub)

    def ensure_connected(self, conn: Any) -> Any:
        lost_at: float | None = None

        def tell(error: BaseException, _interval: float) -> None:
            nonlocal lost_at
            if lost_at is None:
                lost_at = time.monotonic()
                log.error(
                    "cannot connect to %s: %s; trying until it answers",
                    conn.as_uri(),
                    reason_of(error),
                )

        conn.ensure_connection(
            tell,
            interval_start=_RETRY_STEP,
            interval_step=_RETRY_STEP,
            interval_max=_RETRY_MAX,
            callback=maybe_shutdown,
        )
        self.first_connection_attempt = False
        self._connected_at = time.monotonic()
        if lost_at is not None:
            log.warning("connected again after %.1f s", time.monotonic() - lost_at)
        return conn

    # --- the end --------------------------------------------------------------------------------

    def cancel_active_requests(self) -> None:
        # What a cold shutdown calls. Celery would terminate the jobs, which threads do not allow.
        runtime.current().hand_back()

    # --- messages that no task can take ---------------------------------------------------------

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], None]:
        handle = super().create_task_handler(*args, **kwargs)
        settings = worker_settings.current()
        signer = Signer.of(settings.signing_keys)
        queues = frozenset(lane.queue(settings.namespace) for lane in Lane)

        def on_task_received(message: Message) -> None:
            keep = True
            try:
                defect = _defect(message)
                if defect is None and signer is not None:
                    defect = _forged(message, signer, queues)
                    # Who asks is told; a question is not worth asking again.
                    keep = message.headers["task"] not in _READS
                if defect is None:
                    handle(message)
                    return
                if defect is _UNKNOWN and _left(message, signer, queues):
                    message.ack()
                    return
            except LOST:
                if not message.acknowledged:
                    message.requeue()
                raise
            except Exception as error:  # noqa: BLE001  # whatever a malformed message provokes
                defect = f"it cannot be read: {explain(error)}"
            self._bury(message, defect, keep=keep)

        return on_task_received

    def on_decode_error(self, message: Message, exc: BaseException) -> None:
        self._bury(message, f"its body cannot be read: {explain(exc)}")

    def on_unknown_message(self, body: Any, message: Message) -> None:
        self._bury(message, "it names no task")

    def on_unknown_task(self, body: Any, message: Message, exc: BaseException) -> None:
        self._bury(message, _UNKNOWN)

    def on_invalid_task(self, body: Any, message: Message, exc: BaseException) -> None:
        self._bury(message, f"its headers are not a task's: {explain(exc)}")

    def _bury(self, message: Message, reason: str, *, keep: bool = True) -> None:
        if message.channel is not self.task_consumer.channel:
            log.warning("undecodable remote control message: %s; dropped", reason)
            return
        envelope = message._raw  # noqa: SLF001  # as kombu keeps and restores it
        message.channel.bury(
            dumps(envelope).encode(),
            reason,
            batch_id_of(envelope),
            message.delivery_info["routing_key"],
            keep=keep,
        )
        if not message.acknowledged:
            message.ack()


def _defect(message: Message) -> str | None:
    """What Celery takes for granted in a message, if it is not there.

    Much of it would fail in the pool only, where the message is then neither run nor given back,
    and takes a place among those in hand for ever.
    """
    task = message.headers.get("task")
    if not isinstance(task, str):
        return "it names no task; messages of Celery's protocol 1 are not understood"
    if batch_id_of(message._raw) is None:  # noqa: SLF001
        return "it has no task id"
    payload = message.payload  # kept by the message, so that Celery does not decode it again
    match payload:
        case [list(), dict(), dict() | None] if task not in _TASKS:
            return _UNKNOWN
        case [list(), dict(), dict() | None as embedded]:
            more = [name for name in _MORE if (embedded or {}).get(name)]
            return f"it asks for more than its task: {', '.join(more)}" if more else None
    return "its body is not [args, kwargs, embed]"


def _left(message: Message, signer: Signer | None, queues: frozenset[str]) -> bool:
    """Whether an unknown task is one of a newer protocol, and left to newer workers."""
    if signer is not None and _forged(message, signer, queues):
        return False
    args, _, _ = message.payload
    batch_id = batch_id_of(message._raw)  # noqa: SLF001
    if batch_id is None or len(args) != 1 or not speaks_newer(args[0]):
        return False
    try:
        process = runtime.current()
    except ConfigurationError:
        return False  # the parent of forked workers
    reason = "it asks for what this version does not know"
    return process.submit(process.services.runner.leave(batch_id, reason)).result()


def _forged(message: Message, signer: Signer, queues: frozenset[str]) -> str | None:
    """Of a message that is none by who has a key, for one of this fleet's queues: that it is so."""
    args, kwargs, _ = message.payload
    queue = message.delivery_info["routing_key"]
    if len(args) == 1 and isinstance(args[0], str) and not kwargs and queue in queues:
        headers = message.headers
        parts = (headers["task"], headers["id"], queue, args[0])
        if signer.is_signed(headers.get(HEADER), *parts):
            return None
    return "it is not signed with a key of this worker's (RECALLQ_SIGNING_KEYS)"
