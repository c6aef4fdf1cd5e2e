"""The Celery tasks, one per operation: decode, run, answer.

A task's thread only waits: the work is done on the process's loop (`recallq_worker.runner`). Jobs
that settle while others of their batch still run are answered early, by storing the batch's result
as far as it goes.
"""

from __future__ import annotations

import concurrent.futures
import logging
from typing import Any

from celery import Celery, Task
from celery.exceptions import Ignore
from celery.signals import task_postrun
from celery.states import IGNORED

from recallq.contract import (
    PARTIAL,
    AnyBatch,
    BatchResult,
    NewerProtocol,
    Operation,
    decode_batch,
)
from recallq.errors import UndecodableJob, to_wire
from recallq_worker import runtime
from recallq_worker.runner import Settled

log = logging.getLogger(__name__)

_LONGEST_GRACE = 1.0


def register(app: Celery) -> None:
    """Makes the tasks known to `app`."""
    for operation in Operation:
        app.task(run_batch, name=operation.task_name, bind=True, typing=False)


def run_batch(task: Task, *args: Any, **kwargs: Any) -> BatchResult:
    """The body of every task."""
    process = runtime.current()
    payload = args[0] if len(args) == 1 and not kwargs else repr((args, kwargs))
    try:
        batch = _decode(task, payload)
    except NewerProtocol as error:
        batch_id = task.request.id
        if process.submit(process.services.runner.leave(batch_id, str(error))).result():
            raise Ignore from None
        return _undecodable(task, payload, error)
    except UndecodableJob as error:
        return _undecodable(task, payload, error)
    result = BatchResult(v=batch.v)
    done = process.submit(process.services.runner.run(batch, result))
    answered, grace = 0, process.settings.straggler_grace
    while not concurrent.futures.wait([done], timeout=grace).done:
        answered = _answer_early(task, result, answered)
        grace = min(grace * 2, _LONGEST_GRACE)
    if done.cancelled():  # the process ends, and the batch was handed back
        raise Ignore
    match done.result():
        case Settled.NOW:
            return result
        case Settled.ELSEWHERE:
            raise Ignore
        case left:
            _answer_early(task, result, answered)
            process.submit(process.services.runner.put_off(batch, left)).result()
            raise Ignore


def _undecodable(task: Task, payload: object, error: UndecodableJob) -> BatchResult:
    """Keeps what nobody can read."""
    text = payload if isinstance(payload, str) else repr(payload)
    runtime.current().keep_undecodable(text, str(error), task.request.id)
    return BatchResult(error=to_wire(error))


def _decode(task: Task, payload: object) -> AnyBatch:
    batch = decode_batch(payload)
    if batch.operation.task_name != task.name:
        raise UndecodableJob(f"a batch of {batch.operation.value} jobs came as {task.name}")
    if any(each in batch.id for each in "|\n"):
        raise UndecodableJob(
            "the batch's id has a character that ids must not have: | or a new line"
        )
    if batch.id != task.request.id:
        raise UndecodableJob("the batch has another id than its task")
    return batch


def _answer_early(task: Task, result: BatchResult, answered: int) -> int:
    """Stores how far the jobs have come, if that is further than `answered`; returns how far."""
    reached = result.reached
    if reached > answered:
        try:
            task.update_state(state=PARTIAL, meta=result)
        except Exception as error:  # noqa: BLE001  # jobs go on, and the answer comes in the end
            log.warning("cannot answer a part of a batch early: %s", type(error).__name__)
    return reached


@task_postrun.connect  # type: ignore[untyped-decorator]
def _let_go(task_id: str, state: str | None = None, **_: Any) -> None:
    """Celery has stored the result: the batch's lease need not be renewed any more.

    A delivery that was ignored has none; another of the same batch may be running.
    """
    if state != IGNORED:
        runtime.current().services.runner.done(task_id)
