"""The way to the workers and back: Celery messages out, Celery results in.

Celery defines the message (`recallq.envelope`) and is not used for I/O, which is blocking in it and
in kombu: messages are pushed by asyncio redis, in the same script that enters the batch in the
ledger where both live on one Redis.

Results come on one pub/sub channel per client, from the worker's result backend, and always lie in
the result backend as well. Pub/sub forgets what it could not deliver, so batches that stay
unanswered are looked up there from time to time, and all of them after a reconnect.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, cast

import orjson

from recallq.clock import FleetClock, keep_time
from recallq.contract import (
    AnyJob,
    Batch,
    BatchResult,
    JobRef,
    JobState,
    Outcome,
    failed,
)
from recallq.dead_letters import DeadLetterOffice
from recallq.envelope import CeleryEnvelope
from recallq.errors import (
    ClientClosed,
    InternalError,
    ResultWithdrawn,
    UndecodableJob,
    to_wire,
)
from recallq.fleet import FleetState, look
from recallq.keys import Keys
from recallq.ledger import LedgerEntry, ProducerLedger
from recallq.redis_client import (
    COMMAND_TIMEOUT,
    LOST,
    RedisClient,
    asking,
    connect,
    is_denied,
    reason_of,
)
from recallq.settings import ClientSettings
from recallq.signing import Signer
from recallq.workers import WorkerInfo, WorkerRegistry

log = logging.getLogger(__name__)

_FIRST_LOOK_UP = 0.5
"""Seconds after which a result is first looked up rather than waited for."""
_LOOK_UP_CHUNK = 200


@dataclass(slots=True)
class Waiter:
    """Somebody who waits for a job."""

    index: int
    """Of the job, in its batch."""
    outcome: asyncio.Future[Any]
    """Gets the job's `Outcome`; done before that when nobody waits any longer."""
    early: bool
    """Whether it is enough that the job is stored."""


@dataclass(slots=True)
class _Expected:
    """A batch of this client some of whose jobs are waited for."""

    waiters: list[Waiter]
    next_look_up: float
    over: Callable[[], None] | None = None
    """To be called when nobody waits any more."""
    interval: float = _FIRST_LOOK_UP


class Transport:
    """Publishes batches and resolves the futures of those who wait for them."""

    def __init__(self, settings: ClientSettings) -> None:
        self.client_id = secrets.token_hex(8)
        self.clock = FleetClock()
        self.keys = Keys(settings.namespace)
        self._settings = settings
        self._envelope = CeleryEnvelope(self.client_id, Signer.of(settings.signing_keys))
        self._sequence = 0
        self._expected: dict[str, _Expected] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: dict[str, RedisClient] = {}
        self._look_up_all = False

    async def start(self) -> None:
        """Connects and calibrates the clock. Raises `ServiceUnavailable`."""
        settings = self._settings
        for url in {settings.coordination_url, settings.broker_url, settings.result_url}:
            self._clients[url] = connect(url, connect_timeout=settings.connect_timeout)
        self._coordination = self._clients[settings.coordination_url]
        self._broker = self._clients[settings.broker_url]
        self._results = self._clients[settings.result_url]
        self._one_step = settings.broker_url == settings.coordination_url
        self.ledger = ProducerLedger(self._coordination, self.keys, settings.high_water_mark)
        self.dead_letters = DeadLetterOffice(self._coordination, self.keys)
        try:
            for url, client in self._clients.items():
                async with asking(url, "cannot connect"):
                    await client.ping()
            async with asking(settings.coordination_url, "cannot read the time"):
                await self.clock.calibrate(self._coordination)
        except BaseException:
            await self._disconnect()
            raise
        subscribed = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._receive(subscribed), name="recallq-receive"),
            asyncio.create_task(self._look_up_late_results(), name="recallq-look-up"),
            asyncio.create_task(keep_time(self.clock, self._coordination), name="recallq-clock"),
        ]
        # Not fatal: what is published before the subscription stands is found by looking it up.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.connect_timeout):
                await subscribed.wait()

    async def stop(self) -> None:
        """Ends the background tasks, disconnects, and fails whoever still waits."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for expected in self._expected.values():
            for waiter in expected.waiters:
                if not waiter.outcome.done():
                    waiter.outcome.set_exception(ClientClosed("the client was stopped"))
                    waiter.outcome.exception()  # a caller who is gone does not fetch it
        await self._disconnect()

    async def _disconnect(self) -> None:
        for client in self._clients.values():
            await client.aclose(close_connection_pool=True)
        self._clients = {}

    # --- out ------------------------------------------------------------------------------------

    def next_batch_id(self) -> str:
        self._sequence += 1
        return f"{self.client_id}-{self._sequence:x}"

    async def publish(
        self, batch: Batch[AnyJob], payload: str, epochs: Sequence[int] | None = None
    ) -> None:
        """Accepts `batch`: afterwards it is in the ledger and on its queue.

        `epochs` are given for jobs that were submitted before. Raises `QueueFull` and
        `ServiceUnavailable`. After the latter it is unknown whether the batch was accepted, as
        always when a connection breaks at the wrong moment.
        """
        queue = batch.lane.queue(self.keys.namespace)
        message = self._envelope.wrap(batch.id, batch.operation, payload, queue)
        async with asking(self._settings.coordination_url, "cannot enqueue"):
            await self.ledger.enter(batch, message, enqueue=self._one_step, epochs=epochs)
        if not self._one_step:
            async with asking(self._settings.broker_url, "cannot enqueue"):
                await self._broker.lpush(queue, message)

    # --- back -----------------------------------------------------------------------------------

    def expect(
        self, batch_id: str, waiters: list[Waiter], over: Callable[[], None] | None = None
    ) -> None:
        """Resolves the futures of `waiters` when jobs of a batch of this client settle, and calls
        `over` when nobody waits for any of them any more.

        To be called before the batch is published, or before its result is looked up. Who stops
        waiting says so with `give_up`.
        """
        expected = self._expected.get(batch_id)
        if expected is None:
            due = time.monotonic() + _FIRST_LOOK_UP
            self._expected[batch_id] = _Expected(waiters, due, over)
        else:
            expected.waiters += waiters

    def give_up(self, batch_id: str) -> None:
        """Drops those who wait for jobs of a batch and whose futures are done."""
        expected = self._expected.get(batch_id)
        if expected is not None:
            left = [each for each in expected.waiters if not each.outcome.done()]
            self._still_waiting(batch_id, expected, left)

    @property
    def waiting(self) -> int:
        """How many jobs somebody waits for."""
        return sum(len(expected.waiters) for expected in self._expected.values())

    def listen(self, ref: JobRef, *, early: bool = False) -> asyncio.Future[Outcome]:
        """A future for a job's outcome. Another client's comes only by looking it up."""
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.expect(ref.batch_id, [Waiter(ref.index, outcome, early)])
        return outcome

    async def cancel(self, ref: JobRef) -> JobState | None:
        """Cancels a job that is queued, asks one that runs to stop; the state it found, if any."""
        async with asking(self._settings.coordination_url, "cannot cancel the job"):
            return await self.ledger.cancel(ref.batch_id, ref.index)

    async def deadline(self, ref: JobRef) -> float | None:
        """When a job that has not settled expires, if it does."""
        async with asking(self._settings.coordination_url, "cannot look up the job"):
            return await self.ledger.deadline(ref.batch_id, ref.index)

    async def standing(self, ref: JobRef) -> str:
        """How a job that has not settled stands, as the end of a sentence about it."""
        async with asking(self._settings.coordination_url, "cannot look up the job"):
            entry = await self.ledger.look_up(ref.batch_id, ref.index)
            trouble = await self.ledger.trouble(ref.batch_id, ref.index)
        if entry is None:
            return ""
        if trouble is not None:
            return f": it is to be tried again, after {trouble}"
        stored = await self._stored_outcome(ref)
        if stored is not None and stored.state is JobState.STORED:
            return ": it is stored, and will be searchable later"
        if entry.state is JobState.RUNNING:
            return ": a worker is running it"
        return f": it is {entry.state.value}"

    async def workers(self) -> list[WorkerInfo]:
        """The workers that have given a sign of life of late."""
        async with asking(self._settings.coordination_url, "cannot look for workers"):
            return await WorkerRegistry(self._coordination, self.keys).alive()

    async def fleet(self) -> FleetState:
        """How lanes and workers stand."""
        async with asking(self._settings.coordination_url, "cannot look at the fleet"):
            return await look(self._coordination, self.keys)

    def asking(
        self, doing: str, timeout: float = COMMAND_TIMEOUT
    ) -> AbstractAsyncContextManager[None]:
        """Commands to the coordination Redis; see `recallq.redis_client.asking`."""
        return asking(self._settings.coordination_url, doing, timeout)

    async def is_open(self, ref: JobRef) -> bool:
        """Whether the ledger has a job's batch: something is yet to come of it."""
        async with asking(self._settings.coordination_url, "cannot look up the job"):
            return bool(await self._coordination.exists(self.keys.batch(ref.batch_id)))

    async def fetch(self, ref: JobRef) -> Outcome | LedgerEntry | None:
        """What is known of a job: its outcome, perhaps not its last, its place in the ledger, or
        nothing."""
        outcome = await self._stored_outcome(ref)
        if outcome is not None:
            return outcome
        async with asking(self._settings.coordination_url, "cannot look up the job"):
            entry = await self.ledger.look_up(ref.batch_id, ref.index)
        if entry is not None:
            return entry if ref.index < entry.jobs else None
        # Its result may have been stored, and its ledger entry removed, between the two reads.
        return await self._stored_outcome(ref)

    async def _stored_outcome(self, ref: JobRef) -> Outcome | None:
        async with asking(self._settings.result_url, "cannot look up the job"):
            stored = await self._results.get(self.keys.result(ref.batch_id))
        if stored is None:
            return None
        result = _read_result(cast("bytes", stored))
        outcome = _outcome_of(result, ref.index)
        is_read = ref.index < min(len(result.users), len(result.epochs))
        if outcome is None or not outcome.result or not is_read:
            return outcome
        # Its answer tells what memories there were: not any more if some were deleted.
        async with asking(self._settings.coordination_url, "cannot look up the job"):
            key = self.keys.epochs_of(result.users[ref.index])
            deletion = int(await self._coordination.hget(key, "n") or 0)
        if deletion <= result.epochs[ref.index]:
            return outcome
        return failed(
            ResultWithdrawn("memories of the user were deleted after this was asked; ask again")
        )

    async def _receive(self, subscribed: asyncio.Event) -> None:
        """Listens on this client's channel, for ever; a lost connection is made anew."""
        channel = self.keys.reply_channel(self.client_id)
        delay, told = 0.05, False
        while True:
            # Its own connection, which pub/sub takes over.
            redis = connect(
                self._settings.result_url,
                max_connections=2,
                connect_timeout=self._settings.connect_timeout,
                retries=0,
                subscribes=True,
            )
            try:
                async with redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                    async with asyncio.timeout(COMMAND_TIMEOUT):
                        await pubsub.subscribe(channel)
                    self._look_up_all = subscribed.is_set()
                    subscribed.set()
                    delay, told = 0.05, False
                    while True:
                        message = await pubsub.get_message(timeout=5.0)
                        if message is not None and message["type"] == "message":
                            self._on_reply(message["data"])
            except LOST as error:
                if not told:  # once an outage
                    why = reason_of(error) if is_denied(error) else type(error).__name__
                    log.warning("lost the result channel (%s); reconnecting", why)
                told = True
            finally:
                await redis.aclose(close_connection_pool=True)
            await asyncio.sleep(delay)
            delay = min(delay * 2, 1.0)

    def _on_reply(self, data: bytes) -> None:
        head, _, stored = data.partition(b"\n")
        batch_id = head.decode(errors="replace")
        expected = self._expected.get(batch_id)
        if expected is not None:  # else nobody waits: submitted and forgotten
            self._resolve(batch_id, expected, stored)

    def _resolve(self, batch_id: str, expected: _Expected, stored: bytes) -> None:
        result = _read_result(stored)
        left = []
        for waiter in expected.waiters:
            if waiter.outcome.done():
                continue
            outcome = _outcome_of(result, waiter.index)
            if outcome is not None and (outcome.state.settled or waiter.early):
                waiter.outcome.set_result(outcome)
            else:
                left.append(waiter)
        self._still_waiting(batch_id, expected, left)

    def _still_waiting(self, batch_id: str, expected: _Expected, waiters: list[Waiter]) -> None:
        """Notes who is left of those who wait for a batch."""
        expected.waiters = waiters
        if not waiters:
            del self._expected[batch_id]
            if expected.over is not None:
                expected.over()

    async def _look_up_late_results(self) -> None:
        """Finds results whose announcement was missed. Late ones are asked for ever more rarely."""
        while True:
            await asyncio.sleep(_FIRST_LOOK_UP / 2)
            now = time.monotonic()
            everything, self._look_up_all = self._look_up_all, False
            late = [
                batch_id
                for batch_id, expected in self._expected.items()
                if everything or expected.next_look_up <= now
            ]
            try:
                for start in range(0, len(late), _LOOK_UP_CHUNK):
                    await self._look_up(late[start : start + _LOOK_UP_CHUNK])
            except LOST as error:
                self._look_up_all = self._look_up_all or everything
                log.debug("cannot look up results yet: %s", type(error).__name__)

    async def _look_up(self, batch_ids: list[str]) -> None:
        async with asyncio.timeout(COMMAND_TIMEOUT):
            found = await self._results.mget([self.keys.result(each) for each in batch_ids])
        now = time.monotonic()
        for batch_id, stored in zip(batch_ids, found, strict=True):
            expected = self._expected.get(batch_id)
            if expected is None:
                continue
            expected.interval = min(expected.interval * 1.5, 5.0)
            expected.next_look_up = now + expected.interval
            if stored is not None:
                self._resolve(batch_id, expected, cast("bytes", stored))


def _read_result(stored: bytes) -> BatchResult:
    """The batch result in what Celery's backend stored; if it cannot be read, one that says so."""
    try:
        return _parse_result(stored)
    except ValueError as error:
        log.error("unreadable result: %s", type(error).__name__)  # noqa: TRY400  # it would be quoted
        return _defect("the worker's result could not be read")


def _parse_result(stored: bytes) -> BatchResult:
    """Raises ValueError."""
    meta = orjson.loads(stored)
    if not isinstance(meta, dict) or "status" not in meta:
        raise ValueError("not a Celery result")
    if meta["status"] == "FAILURE":
        problem = meta.get("result") or {}
        kind = problem.get("exc_type", "an error") if isinstance(problem, dict) else "an error"
        return _defect(f"the worker failed on the whole batch: {kind}; see its log")
    return BatchResult.model_validate(meta.get("result"))


def _outcome_of(result: BatchResult, index: int) -> Outcome | None:
    """The outcome of job `index`; None while it is pending."""
    if result.error is not None:
        dead = result.error.get("code") == UndecodableJob.code  # workers keep what they cannot read
        return Outcome(state=JobState.DEAD if dead else JobState.FAILED, error=result.error)
    outcome = result.outcomes[index] if index < len(result.outcomes) else None
    if outcome is not None:
        outcome.operation = result.operation
    return outcome


def _defect(message: str) -> BatchResult:
    return BatchResult(error=to_wire(InternalError(message)))
