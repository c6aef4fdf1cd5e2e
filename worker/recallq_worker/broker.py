"""Kombu's Redis transport, taught to outlive its Redis and to take any bytes for a message.

This module owns the worker's broker connection below Celery: what is read from a queue, what is
held unacknowledged, and how a connection ends. Kombu's own differs in what it does when things go
wrong, and there it takes the process down:

- Closing a channel whose connection is lost raises half-way, at the blocking pop that was under
  way. The second attempt then meets a transport that is gone, with an AttributeError that nobody
  expects. Here a channel closes whatever the state of Redis.
- An acknowledgement that Redis cannot take now raises, and is forgotten. Here it is owed, and paid
  when Redis answers again.
- Bytes that are no message raise in the event loop, or count as a lost connection and are lost
  themselves. Here they are buried as dead letters.

And in what it costs: kombu keeps a copy of every message that is held in Redis, to be found if its
worker dies. The ledger has one already, and a quicker eye on it, so of messages that are in the
ledger nothing is written: two round trips less for each.

A new connection has new channels. What the old one held is handed over with `QoS.let_go` and
`QoS.adopt`; `recallq_worker.consumer` says when.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import logging
from binascii import Error as Base64Error
from contextlib import suppress
from json import JSONDecodeError
from queue import Empty
from typing import Any

import orjson
from celery import current_app
from celery.states import SUCCESS
from kombu import serialization
from kombu import transport as transports
from kombu.exceptions import ContentDisallowed, OperationalError
from kombu.transport import redis, virtual
from kombu.utils.json import dumps, loads

from recallq.contract import BatchResult
from recallq.envelope import LISTED
from recallq.errors import ConfigurationError, UndecodableJob, to_wire
from recallq.redis_client import LOST, NO_INTRODUCTION, tls_options
from recallq_worker import runtime

log = logging.getLogger(__name__)

_TYPED = b'"__type__"'
_DEEP = 100

_SAFE_TO_QUOTE = (JSONDecodeError, UnicodeDecodeError, Base64Error, ContentDisallowed)
"""Errors whose text never holds what users wrote."""


def install() -> None:
    """Makes Redis URLs mean this transport, in this process, and lets it read JSON quickly: kombu
    and Celery do that three times for each message.

    Celery's ``broker_transport`` cannot: a ``redis+socket://`` URL overrides it.
    """
    for scheme in ("redis", "rediss"):
        transports.TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
    serialization.register("json", dumps, _loads, "application/json", "utf-8")


def explain(error: BaseException) -> str:
    """`error` for a log or a dead letter, without anything that a user wrote."""
    if isinstance(error, (*_SAFE_TO_QUOTE, Undecodable)):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__


class Undecodable(ValueError):
    """Not a message: its words say why, and hold nothing of it."""

    def __init__(self, reason: str, batch_id: str | None = None) -> None:
        super().__init__(reason)
        self.batch_id = batch_id


class Message(virtual.Message):
    """A message that has all that kombu needs in order to hold it. Raises `Undecodable`."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        batch_id = batch_id_of(payload)
        defect = _defect(payload)
        if defect is not None:
            raise Undecodable(defect, batch_id)
        try:
            super().__init__(payload, channel=channel, **options)
        except Exception as error:
            raise Undecodable(f"its body cannot be read: {explain(error)}", batch_id) from error

    # Settled once, a message stays so. One that went back to its queue with a lost connection may
    # have been on its way into the pool; it is run here, or there, and acknowledged again.

    def ack(self, multiple: bool = False) -> None:
        if not self.acknowledged:
            super().ack(multiple)

    def reject(self, requeue: bool = False) -> None:
        if not self.acknowledged:
            super().reject(requeue)

    def requeue(self) -> None:
        if not self.acknowledged:
            super().requeue()


def batch_id_of(envelope: Any) -> str | None:
    """The task's id, where there is one."""
    headers = envelope.get("headers") if isinstance(envelope, dict) else None
    task_id = headers.get("id") if isinstance(headers, dict) else None
    return task_id if isinstance(task_id, str) and task_id else None


def _defect(envelope: Any) -> str | None:
    if not isinstance(envelope, dict):
        return "not a JSON object"
    headers = envelope.get("headers") or {}
    if not isinstance(headers, dict):
        return "its headers are not an object"
    # Kombu unpacks a body before anybody has looked at it, and decodes one of a type that it does
    # not know by whatever codec the message names: a few hundred bytes become a gigabyte.
    if headers.get("compression"):
        return "its body is compressed"
    if envelope.get("content-type") != "application/json":
        return "its body is not JSON"
    properties = envelope.get("properties")
    if not isinstance(properties, dict):
        return "it has no properties"
    tag = properties.get("delivery_tag")
    if not isinstance(tag, str) or not tag:
        return "it has no delivery tag"
    delivery = properties.get("delivery_info")
    if not isinstance(delivery, dict) or not all(
        isinstance(delivery.get(name), str) for name in ("exchange", "routing_key")
    ):
        return "it does not tell its exchange and routing key"
    return None


def _is_listed(message: Message) -> bool:
    return message.headers.get(LISTED) is True


class QoS(redis.QoS):
    """The messages that a channel holds. Nothing here raises because of Redis.

    An error would take the event loop down with messages in hand; if the connection is lost, the
    loop finds that out by itself.
    """

    def append(self, message: Message, delivery_tag: str) -> None:
        if _is_listed(message):
            virtual.QoS.append(self, message, delivery_tag)
            return
        try:
            super().append(message, delivery_tag)
        except LOST as error:
            # It is not in its queue any more and nowhere else: to work on it is what saves it.
            log.warning("cannot note a message as taken: %s", explain(error))
            virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        message = self._delivered.get(delivery_tag)
        if message is not None and _is_listed(message):
            virtual.QoS.ack(self, delivery_tag)
            return
        self._settle(super().ack, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self._settle(super().reject, delivery_tag, requeue)

    def _settle(self, settle: Any, *args: Any) -> None:
        # Where it does not succeed, the message stays among those delivered, though its state says
        # that it is settled: that is how `pay` knows it.
        if not self.channel.closed:
            try:
                settle(*args)
            except LOST as error:
                log.info("an acknowledgement has to wait: %s", explain(error))

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        message = self._delivered.get(tag)
        if message is None or not _is_listed(message):
            super().restore_by_tag(tag, client, leftmost)
            return
        if tag in self._dirty:
            return  # settled meanwhile
        with self.channel.conn_or_acquire(client) as connection:
            pipe = connection.pipeline()
            delivery = message.delivery_info
            self.channel._do_restore_message(  # noqa: SLF001  # as kombu does
                message._raw,  # noqa: SLF001
                delivery["exchange"],
                delivery["routing_key"],
                pipe,
                leftmost,
            )
            pipe.execute()

    def pay(self) -> None:
        """Settles in Redis what could not be settled when it was time."""
        for tag, message in tuple(self._delivered.items()):
            if message.acknowledged and tag not in self._dirty:
                self.reject(tag, requeue=message._state == "REQUEUED")  # noqa: SLF001

    def restore_visible(self, *args: Any, **options: Any) -> None:
        self.pay()  # kombu comes here every few seconds
        try:
            super().restore_visible(*args, **options)
        except LOST as error:
            log.info("cannot look for messages of lost workers now: %s", explain(error))

    def restore_unacked(self, client: Any = None) -> None:
        self.pay()
        self._flush()
        try:
            super().restore_unacked(client)
        except LOST as error:
            log.warning(
                "cannot return %d messages to their queues now: %s",
                len(self._delivered),
                explain(error),
            )
            self._delivered.clear()

    def let_go(self) -> list[Message]:
        """The messages held, which this channel forgets and leaves as they are in Redis."""
        self._flush()
        held = list(self._delivered.values())
        self._delivered.clear()
        return held

    def adopt(self, messages: list[Message]) -> None:
        """Holds what another channel let go, and settles what should have been meanwhile."""
        for message in messages:
            message.channel = self.channel
            # Noted once more: Redis may have lost its last second, or all it had.
            self.append(message, message.delivery_tag)
        self.pay()


class Channel(redis.Channel):
    _in_poll: Any
    QoS = QoS
    Message = Message

    def _connparams(self, *args: Any, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = super()._connparams(*args, **options)
        return found | tls_options(found) | NO_INTRODUCTION

    def _brpop_read(self, **options: Any) -> bool:
        # Kombu's own, but for what it does with bytes that are no message.
        try:
            try:
                reply = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if not reply:
            raise Empty
        key, raw = reply
        queue = key.decode().rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        try:
            self.connection._deliver(_parse(raw), queue)  # noqa: SLF001  # as kombu does
        except Undecodable as error:
            self.bury(raw, str(error), error.batch_id, queue)
        return True

    def bury(
        self, raw: bytes, reason: str, batch_id: str | None, queue: str, *, keep: bool = True
    ) -> None:
        """Keeps what cannot be worked on, if it is to be kept; returns when that is done."""
        try:
            process = runtime.current()
        except ConfigurationError:
            # The parent of forked workers takes the messages, and has no runtime to keep them.
            aside = f"{queue}.undecodable"
            with self.conn_or_acquire() as client:
                client.lpush(aside, raw)
            log.warning("undecodable message: %s; put on the list %s", reason, aside)
        else:
            if process.bury(raw, reason, batch_id, keep=keep):
                # Somebody waits for it, as for a batch that ran.
                answer = BatchResult(error=to_wire(UndecodableJob(reason)))
                current_app.backend.store_result(batch_id, answer, SUCCESS)

    def _deliver_fanout_message(self, message: Any, exchange: str) -> bool:
        try:
            return bool(super()._deliver_fanout_message(message, exchange))
        except Undecodable as error:
            log.warning("undecodable remote control message: %s; dropped", error)
            return False

    def finish_reading(self) -> None:
        """Takes the message that a blocking pop under way may already have brought."""
        if self._in_poll:
            with suppress(Empty, *self.connection_errors, *LOST):
                self._brpop_read()
            self._in_poll = None

    def close(self) -> None:
        self.finish_reading()
        try:
            super().close()
        except (*self.connection_errors, *LOST):
            # It could not delete its own reply queues. They go with the connection, or expire.
            self._fanout_queues: dict[str, Any] = {}
            super().close()


class Transport(redis.Transport):
    """Named for Redis URLs by `install`."""

    Channel = Channel
    # What kombu makes of a connection error where it retries by itself.
    connection_errors = (*redis.Transport.connection_errors, OperationalError)


def _parse(raw: bytes) -> Any:
    try:
        return _loads(raw)
    except Undecodable:
        raise
    except Exception as error:
        raise Undecodable(f"not JSON: {explain(error)}") from error


def _loads(data: Any) -> Any:
    """What a message says in JSON. Raises `Undecodable` for what kombu may be unable to write
    again, as it does with what it holds."""
    found = _read(data)
    if _is_deep(found):
        raise Undecodable("its JSON is nested too deep")
    return found


def _read(data: Any) -> Any:
    """What kombu reads in JSON, in a fifth of the time; anything unusual is left to kombu."""
    if isinstance(data, (str, bytes, bytearray, memoryview)):
        text = data.encode() if isinstance(data, str) else bytes(data)
        if _TYPED not in text:  # a date, say, in kombu's own way of writing one
            with suppress(ValueError):  # what is not quite JSON
                return orjson.loads(text)
    return loads(data)


def _is_deep(value: Any) -> bool:
    """Whether it is nested so deep that Python's own JSON may be at its end with it."""
    level = [value]
    for _ in range(_DEEP):
        level = [
            child
            for each in level
            if isinstance(each, (dict, list))
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return True
