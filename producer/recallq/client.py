"""MemoryClient: what an agent holds.

The facade over the queue. Each call becomes a job (`recallq.requests`), joins a batch
(`recallq.batching`), travels (`recallq.transport`) and comes back as a value or an error here.
Nothing in it blocks the event loop, and no call outlives its timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from recallq.batching import Batcher, Draft
from recallq.contract import (
    AddResult,
    DeleteResult,
    Health,
    Hit,
    JobRef,
    JobState,
    Lane,
    Operation,
    Outcome,
    StoredMessage,
    Wait,
    encode_batch,
    make_batch,
)
from recallq.dead_letter_box import DeadLetterBox
from recallq.errors import (
    ClientClosed,
    ConfigurationError,
    InternalError,
    InvalidInput,
    JobTimeout,
    RecallQError,
    from_wire,
)
from recallq.handle import JobHandle
from recallq.in_turn import InTurn
from recallq.messages import Message, MessageLike, returning
from recallq.requests import Filters, Request, Requests
from recallq.settings import ClientSettings
from recallq.tracing import Tracer
from recallq.transport import Transport, Waiter
from recallq.workers import WorkerInfo

_JOB_OVERHEAD_BYTES = 256
"""What a job takes in a message besides its texts and ids, about."""


class MemoryClient:
    """Long-term memory behind a task queue, as asyncio calls.

    `url` is the Redis that workers use too; everything in `ClientSettings` can be given by name,
    else by its ``RECALLQ_*`` variable. `message_type` is what `search_memory` and `list_memory`
    return: `Message`, ``dict``, a pydantic model, or a class with ``from_dict``.

    One client serves any number of concurrent calls on the event loop that started it.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        message_type: type[Any] = Message,
        settings: ClientSettings | None = None,
        **overrides: Any,
    ) -> None:
        if settings is None:
            settings = ClientSettings.load(redis_url=url, **overrides)
        elif url is not None or overrides:
            settings = settings.changed(redis_url=url, **overrides)
        self.settings = settings
        self._returning = returning(message_type)
        self._tracer = Tracer(settings.traces) if settings.traces else None
        self._transport: Transport | None = None
        self._requests: Requests
        self._batcher: Batcher
        self._in_flight: dict[bool, asyncio.Semaphore]
        """Of writes, and of reads, which do not wait for writes that take long."""
        self._writes: InTurn
        """The turns of batches of writes: they are accepted in the order of the calls."""

    # --- lifecycle ------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connects. Raises `ServiceUnavailable`. Starting twice does nothing."""
        if self._transport is not None:
            return
        transport = Transport(self.settings)
        self._requests = Requests(self.settings, transport.clock)
        self._batcher = Batcher(self.settings, self._send)
        most = self.settings.max_in_flight
        self._writes = InTurn()
        self._in_flight = {writes: asyncio.Semaphore(most) for writes in (True, False)}
        self._transport = transport  # before the await: a second start() must not make another
        try:
            await transport.start()
        except BaseException:
            self._transport = None
            await transport.stop()
            raise

    async def stop(self) -> None:
        """Disconnects; calls that still wait end with `ClientClosed`. Their jobs go on."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await self._batcher.close()
            await transport.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def health(self, timeout: float = 5.0) -> bool:
        """Whether a worker answers and its memory backend is well: a job, there and back."""
        try:
            return (await self.check_backend(timeout)).ok
        except RecallQError:
            return False

    async def check_backend(self, timeout: float = 5.0) -> Health:
        """What the memory backend says of itself, by way of a worker; raises what came between."""
        health: Health = await self._call(self._ready().health(timeout=timeout), timeout)
        return health

    @property
    def transport(self) -> Transport:
        """For handles and the CLI. Raises `ClientClosed`."""
        if self._transport is None:
            raise ClientClosed("the client is not started; use 'async with' or await start()")
        return self._transport

    @property
    def dead_letters(self) -> DeadLetterBox:
        """Writes that failed for good, of all tenants: to look at, to replay, to purge."""
        return DeadLetterBox(self)

    def next_order(self) -> int:
        """A place in the listing, behind all that this client has given: microseconds since the
        epoch on the fleet's clock."""
        return self.transport.clock.next_order()

    async def workers(self) -> list[WorkerInfo]:
        """The worker processes that have given a sign of life in the last ten seconds."""
        return await self.transport.workers()

    # --- the reference's four calls -------------------------------------------------------------

    async def add_memory(
        self,
        user_id: str,
        messages: MessageLike | Sequence[MessageLike],
        session_id: str | None = None,
        *,
        timeout: float | None = None,
        lane: Lane | str | None = None,
        idempotency_key: str | None = None,
        order: int | None = None,
        infer: bool | None = None,
        wait: Wait | None = None,
    ) -> AddResult:
        """Stores messages; returns when searches find them, or with `wait` ``"stored"`` as soon as
        they are kept and listed (None: as the settings say). Most backends do both in one step.

        `session_id` None is the session ``"default"``. A call with an `idempotency_key` that was
        used before in the same session stores nothing again; with the `order` that `next_order`
        gave before the first try, a repeated call keeps its place in the listing as well. `infer`
        tells backends that extract memories whether to ask an LLM (None: as the worker is set); to
        the others it means nothing. An empty list does nothing. Raises `InvalidInput`,
        `QueueFull`, `ServiceUnavailable`, a `JobError`.
        """
        requests, timeout = self._ready(), self._timeout(timeout)
        early = requests.is_early(wait)
        if isinstance(messages, Sequence) and not messages:
            requests.check_scope(user_id, session_id)
            return AddResult(record_ids=[], added=0)
        request = requests.add(
            user_id,
            messages,
            session_id,
            timeout=timeout,
            lane=lane,
            idempotency_key=idempotency_key,
            order=order,
            infer=infer,
        )
        added: AddResult = await self._call(request, timeout, early=early)
        return added

    async def search_memory(
        self,
        user_id: str,
        messages: MessageLike | Sequence[MessageLike],
        filters: Filters | None = None,
        *,
        timeout: float | None = None,
        lane: Lane | str | None = None,
    ) -> list[Any]:
        """The user's messages that best match the text of the last of `messages`, best first.

        Filters: ``top_k``, ``session_id``, ``score_threshold``. See `search` for scores.
        """
        requests, timeout = self._ready(), self._timeout(timeout)
        request = requests.search(user_id, messages, filters, timeout=timeout, lane=lane)
        if request is None:
            return []
        return [self._message(hit) for hit in (await self._result(request, timeout))["hits"]]

    async def list_memory(
        self,
        user_id: str,
        filters: Filters | None = None,
        *,
        timeout: float | None = None,
        lane: Lane | str | None = None,
    ) -> list[Any]:
        """One page of the user's messages, in the order in which they were submitted.

        Filters: ``page_num`` (from 1), ``page_size``, ``session_id``.
        """
        requests, timeout = self._ready(), self._timeout(timeout)
        request = requests.page(user_id, filters, timeout=timeout, lane=lane)
        found = await self._result(request, timeout)
        return [self._message(record) for record in found["records"]]

    async def delete_memory(
        self,
        user_id: str,
        session_id: str | None = None,
        *,
        timeout: float | None = None,
        lane: Lane | str | None = None,
        idempotency_key: str | None = None,
    ) -> DeleteResult:
        """Deletes a session, or with `session_id` None everything of the user.

        A call with an `idempotency_key` that was used before in the same scope removes nothing that
        was submitted after the first; keys are remembered for a week.
        """
        requests, timeout = self._ready(), self._timeout(timeout)
        request = requests.delete(
            user_id, session_id, timeout=timeout, lane=lane, idempotency_key=idempotency_key
        )
        removed: DeleteResult = await self._call(request, timeout)
        return removed

    # --- the same with more to tell -------------------------------------------------------------

    async def search(
        self,
        user_id: str,
        messages: MessageLike | Sequence[MessageLike],
        filters: Filters | None = None,
        *,
        timeout: float | None = None,
        lane: Lane | str | None = None,
    ) -> list[Hit]:
        """Like `search_memory`, with score, session, time and record id of each message."""
        requests, timeout = self._ready(), self._timeout(timeout)
        request = requests.search(user_id, messages, filters, timeout=timeout, lane=lane)
        if request is None:
            return []
        hits: list[Hit] = await self._call(request, timeout)
        return hits

    async def list_records(
        self,
        user_id: str,
        filters: Filters | None = None,
        *,
        timeout: float | None = None,
        lane: Lane | str | None = None,
    ) -> list[StoredMessage]:
        """Like `list_memory`, with session, time and record id of each message."""
        requests, timeout = self._ready(), self._timeout(timeout)
        request = requests.page(user_id, filters, timeout=timeout, lane=lane)
        records: list[StoredMessage] = await self._call(request, timeout)
        return records

    # --- handles --------------------------------------------------------------------------------

    async def submit_add(
        self,
        user_id: str,
        messages: MessageLike | Sequence[MessageLike],
        session_id: str | None = None,
        *,
        timeout: float | None = None,
        lane: Lane | str | None = None,
        idempotency_key: str | None = None,
        order: int | None = None,
        infer: bool | None = None,
    ) -> JobHandle:
        """Enqueues an add and returns once the broker holds it.

        `timeout` is the job's deadline: not begun within it, the job expires. None sets none.
        """
        request = self._ready().add(
            user_id,
            messages,
            session_id,
            timeout=timeout,
            lane=lane,
            idempotency_key=idempotency_key,
            order=order,
            infer=infer,
        )
        return await self._submit(request)

    async def submit_search(
        self,
        user_id: str,
        messages: MessageLike | Sequence[MessageLike],
        filters: Filters | None = None,
        *,
        timeout: float | None = None,
        lane: Lane | str | None = None,
    ) -> JobHandle:
        """Enqueues a search; its handle's result is a list of `Hit`."""
        request = self._ready().search(user_id, messages, filters, timeout=timeout, lane=lane)
        if request is None:
            raise InvalidInput("there is no text to search for")
        return await self._submit(request)

    async def submit_list(
        self,
        user_id: str,
        filters: Filters | None = None,
        *,
        timeout: float | None = None,
        lane: Lane | str | None = None,
    ) -> JobHandle:
        """Enqueues a list; its handle's result is a list of `StoredMessage`."""
        return await self._submit(self._ready().page(user_id, filters, timeout=timeout, lane=lane))

    async def submit_delete(
        self,
        user_id: str,
        session_id: str | None = None,
        *,
        timeout: float | None = None,
        lane: Lane | str | None = None,
        idempotency_key: str | None = None,
    ) -> JobHandle:
        """Enqueues a delete; its handle's result is a `DeleteResult`."""
        return await self._submit(
            self._ready().delete(
                user_id, session_id, timeout=timeout, lane=lane, idempotency_key=idempotency_key
            )
        )

    def handle(self, job_id: str) -> JobHandle:
        """The handle of a job that this or any other process submitted.

        Raises `UnknownJob` for what was never a job id; whether there is such a job, the handle's
        own calls tell.
        """
        return JobHandle(self, job_id)

    def value_of(self, outcome: Outcome, job_id: str, *, early: bool = False) -> Any:
        """A settled job's value as callers see it; raises the error of one that failed, unless it
        is `early` enough for them that it was stored."""
        result = self._result_of(outcome, job_id, early=early)
        try:
            return self._value_in(result, outcome.operation)
        except (ValidationError, LookupError, TypeError):
            # Not from the error, which quotes it.
            raise InternalError("the worker's result cannot be read", job_id=job_id) from None

    def _value_in(self, result: dict[str, Any], operation: Operation | None) -> Any:
        match operation:
            case Operation.ADD:
                return AddResult.model_validate(result)
            case Operation.SEARCH:
                return [Hit.model_validate(self._told(hit)) for hit in result["hits"]]
            case Operation.LIST:
                return [
                    StoredMessage.model_validate(self._told(each)) for each in result["records"]
                ]
            case Operation.DELETE:
                return DeleteResult.model_validate(result)
            case _:
                return Health.model_validate(result)

    @staticmethod
    def _result_of(outcome: Outcome, job_id: str, *, early: bool) -> dict[str, Any]:
        kept = outcome.state in (JobState.SUCCEEDED, JobState.STORED)
        if not kept and not (early and outcome.operation is Operation.ADD and outcome.result):
            raise from_wire(outcome.error or {}, job_id=job_id)
        return outcome.result or {}

    def _told(self, stored: dict[str, Any]) -> dict[str, Any]:
        """A stored record with its message as the caller's class."""
        return {**stored, "message": self._message(stored)}

    def _message(self, stored: dict[str, Any]) -> Any:
        """A stored record's message as the caller's class."""
        try:
            return self._returning(stored["message"])
        except Exception as error:
            raise ConfigurationError(
                f"the message of record {stored.get('record_id')} does not fit message_type; "
                "use message_type=dict, or one that does"
            ) from error

    # --- one call's way -------------------------------------------------------------------------

    def waits_early(self, wait: Wait | None) -> bool:
        """For handles: whether it is enough that a job is stored."""
        return self._ready().is_early(wait)

    async def _call(self, request: Request, timeout: float, *, early: bool = False) -> Any:
        """Sends a job and waits for its value."""
        outcome = await self._outcome(request, timeout, early=early)
        return self.value_of(outcome, request.job.id, early=early)

    async def _result(self, request: Request, timeout: float) -> dict[str, Any]:
        """The same for those who make less of it than a value."""
        outcome = await self._outcome(request, timeout)
        return self._result_of(outcome, request.job.id, early=False)

    def _outcome(
        self, request: Request, timeout: float, *, early: bool = False
    ) -> Coroutine[Any, Any, Outcome]:
        """Sends a job and waits until it has settled, or with `early` until it is stored."""
        if self._tracer is None or not self._tracer.is_wanted():
            return self._untraced(request, timeout, early=early)
        return self._traced(self._tracer, request, timeout, early=early)

    async def _traced(
        self, tracer: Tracer, request: Request, timeout: float, *, early: bool
    ) -> Outcome:
        with tracer.sending(request.operation, request.lane, request.job) as sent:
            outcome = await self._untraced(request, timeout, early=early)
            sent.settled(outcome)
        return outcome

    async def _untraced(self, request: Request, timeout: float, *, early: bool) -> Outcome:
        loop = asyncio.get_running_loop()
        slots = self._in_flight[request.operation.writes]
        deadline = loop.time() + timeout
        try:
            if slots.locked():
                async with asyncio.timeout_at(deadline):
                    await slots.acquire()
            else:
                await slots.acquire()  # at once
            try:
                draft = self._put(request, wait=True, early=early)
                # For itself rather than with asyncio.timeout: it is a good part of a call's cost.
                timer = loop.call_at(deadline, _give_up, draft.answer)
                try:
                    outcome = await draft.answer
                except BaseException:
                    if request.job.id and self._transport is not None:
                        self._transport.give_up(JobRef.parse(request.job.id).batch_id)
                    raise
                finally:
                    timer.cancel()
            finally:
                slots.release()
        except TimeoutError:
            hint = await self._why_no_answer(request.lane, request.job.id)
            raise JobTimeout(
                f"no answer to {request.operation.value} within {timeout:g} s{hint}",
                job_id=request.job.id or None,
            ) from None
        assert outcome is not None  # wait=True
        return outcome

    async def _submit(self, request: Request) -> JobHandle:
        """Sends a job and returns once it is accepted."""
        traced: AbstractContextManager[object] = contextlib.nullcontext()
        if self._tracer is not None and self._tracer.is_wanted():
            traced = self._tracer.sending(request.operation, request.lane, request.job)
        with traced:
            async with self._in_flight[request.operation.writes]:
                await self._put(request, wait=False).answer
        return JobHandle(self, request.job.id)

    def _put(self, request: Request, *, wait: bool, early: bool = False) -> Draft:
        self._ready()  # it may have been stopped while the call waited for its turn
        size = request.size + _JOB_OVERHEAD_BYTES
        return self._batcher.put(
            request.lane, request.operation, request.job, size, wait=wait, early=early
        )

    async def _send(
        self, lane: Lane, operation: Operation, drafts: list[Draft], over: Callable[[], None]
    ) -> None:
        """Publishes one batch; what `Batcher` calls."""
        transport = self.transport
        batch = make_batch(
            transport.next_batch_id(),
            lane,
            operation,
            [draft.job for draft in drafts],
            self.settings.backend,
        )
        payload = encode_batch(batch)
        waiters = [
            Waiter(index, draft.answer, draft.early)
            for index, draft in enumerate(drafts)
            if draft.waits
        ]
        if waiters:
            transport.expect(batch.id, waiters, over)
        if not operation.writes:
            await transport.publish(batch, payload)
            return
        async with self._writes.turn():
            await transport.publish(batch, payload)

    async def _why_no_answer(self, lane: Lane, job_id: str) -> str:
        """The likeliest reason for a timeout, as far as Redis tells it quickly."""
        with contextlib.suppress(RecallQError, TimeoutError):
            async with asyncio.timeout(1.0):
                workers = await self.workers()
                if not any(lane in worker.lanes for worker in workers):
                    if (await self.transport.fleet()).full:  # where none can say that it lives
                        return (
                            ": Redis is out of memory (maxmemory), so that workers cannot answer; "
                            "give it more"
                        )
                    return (
                        f": no worker is running for lane {lane.value}; "
                        "start one with 'recallq worker'"
                    )
                if not job_id:
                    most = self.settings.max_in_flight
                    return f": it waited for its turn behind {most:,} calls (max_in_flight)"
                standing = await self.transport.standing(JobRef.parse(job_id))
                if not any(Lane.SLOW in worker.lanes for worker in workers):
                    standing += "; no worker is running for lane slow"
                return standing
        return ""

    def _ready(self) -> Requests:
        if self._transport is None:
            raise ClientClosed("the client is not started; use 'async with' or await start()")
        return self._requests

    def _timeout(self, timeout: float | None) -> float:
        return self.settings.timeout if timeout is None else timeout


def _give_up(answer: asyncio.Future[Outcome | None]) -> None:
    """The caller's time is over."""
    if not answer.done():
        answer.set_exception(TimeoutError())
