"""The Celery tasks, one per operation: decode, claim, run, answer.

A task's thread only waits: the work is done on the process's loop (`recallq_worker.runtime`). Jobs
that settle while others of their batch still run are answered early, by storing the batch's result
as far as it goes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from celery import Celery, Task
from celery.exceptions import Ignore, Reject
from redis.exceptions import RedisError

from recallq.contract import PARTIAL, AnyBatch, BatchResult, Operation, decode_batch
from recallq.errors import UndecodableJob, to_wire
from recallq.redis_client import COMMAND_TIMEOUT
from recallq_worker import runtime
from recallq_worker.ledger import Claim, WorkerLedger
from recallq_worker.runtime import Services

log = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_GRACE = 1.0


def register(app: Celery) -> None:
    """Makes the tasks known to `app`."""
    for operation in Operation:
        app.task(run_batch, name=operation.task_name, bind=True, typing=False)


def run_batch(task: Task, *args: Any, **kwargs: Any) -> BatchResult:
    """The body of every task."""
    process = runtime.current()
    batch_id: str = task.request.id
    payload = args[0] if len(args) == 1 and not kwargs else None
    try:
        batch = decode_batch(payload)
        if batch.operation.task_name != task.name:
            raise UndecodableJob(f"a batch of {batch.operation.value} jobs came as {task.name}")
        if batch.id != batch_id:
            raise UndecodableJob(f"batch {batch.id} came as task {batch_id}")
    except UndecodableJob as error:
        process.submit(_bury(process.services, payload, error)).result()
        return BatchResult(error=to_wire(error))
    result = BatchResult()
    done = process.submit(_work(process.services, process.worker_id, batch, result))
    answered, grace = 0, process.settings.straggler_grace
    while True:
        concurrent.futures.wait([done], timeout=grace)
        if done.done():
            if done.cancelled():  # the process ends; another will run the batch
                raise Reject("the worker was stopped", requeue=True)
            if not done.result():
                raise Ignore  # done and answered before; only the acknowledgement was lost
            return result
        settled = sum(outcome is not None for outcome in result.outcomes)
        if settled > answered:
            answered = settled
            _answer_early(task, result)
        grace = min(grace * 2, _LONGEST_GRACE)


def _answer_early(task: Task, result: BatchResult) -> None:
    try:
        task.update_state(state=PARTIAL, meta=result)
    except Exception as error:  # noqa: BLE001  # the jobs go on, and their answer comes in the end
        log.warning("cannot answer a part of a batch early: %s", type(error).__name__)


async def _work(services: Services, worker_id: str, batch: AnyBatch, result: BatchResult) -> bool:
    """Runs a batch; False if it turned out to be done already."""
    claim = await _insistently(lambda: _claim(services.ledger, batch, worker_id))
    if claim is None:
        log.info("batch %s was answered before; not run again", batch.id)
        return False
    await services.memory.run(batch, claim, result)
    return True


async def _claim(ledger: WorkerLedger, batch: AnyBatch, worker_id: str) -> Claim | None:
    """None if the batch was answered before.

    A batch that a client entered in the ledger and that is there no more was settled, however long
    ago. Only one that plain Celery published was never there.
    """
    claim = await ledger.claim(batch, worker_id)
    if claim is not None or batch.listed or await ledger.has_result(batch.id):
        return claim
    return await ledger.claim_unlisted(batch)


async def _insistently(work: Callable[[], Awaitable[T]]) -> T:
    """Does `work` as soon as Redis allows. The message is ours and stays unacknowledged meanwhile,
    so nothing is lost by waiting."""
    delay = 0.05
    while True:
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT):
                return await work()
        except (RedisError, OSError) as error:
            log.warning("Redis does not answer yet: %s", type(error).__name__)
            await asyncio.sleep(delay)
            delay = min(delay * 2, 1.0)


async def _bury(services: Services, payload: object, error: UndecodableJob) -> None:
    log.error("undecodable message: %s; kept as a dead letter", error)
    await _insistently(
        lambda: services.dead_letters.add(
            kind="undecodable",
            payload=payload if isinstance(payload, str) else repr(payload),
            error=str(error),
            at=services.clock.now(),
        )
    )
