"""The use cases over a store: what happens to one job is that job's outcome and nobody else's."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import orjson
import pytest

from recallq.contract import (
    AddBatch,
    AddJob,
    AnyBatch,
    BatchResult,
    DeleteBatch,
    DeleteJob,
    Health,
    HealthBatch,
    HealthJob,
    Hit,
    JobState,
    Lane,
    ListBatch,
    ListJob,
    Operation,
    Outcome,
    Scope,
    SearchBatch,
    SearchJob,
    StoredMessage,
    fields_of,
)
from recallq.errors import BackendError, BackendUnavailable, JobError
from recallq_worker.backends import base
from recallq_worker.backends.base import Added, Record
from recallq_worker.backends.in_memory import InMemoryStore
from recallq_worker.ledger import Claim, Waiting
from recallq_worker.retries import RetryPolicy
from recallq_worker.service import Left, MemoryService, Postponed
from tests.support import eventually
from tests.virtual_time import now, run_virtually

NOW = 1_790_000_000.0
ORDER = int(NOW * 1_000_000)
BATCH: dict[str, Any] = {"id": "0123456789abcdef-1", "lane": Lane.LIVE}
_numbers = itertools.count(1)


def add(
    *texts: str,
    user: str = "ann",
    session: str | None = "s",
    deadline: float | None = None,
    key: str | None = None,
) -> AddJob:
    number = next(_numbers)
    return AddJob(
        id=f"0123456789abcdef-{number:x}-0",
        scope=Scope("default", user, session),
        submitted_at=NOW,
        deadline=deadline,
        messages=[{"role": "user", "content": text} for text in texts],
        order=ORDER + number,
        idempotency_key=key,
    )


def listing(
    user: str = "ann", session: str | None = None, deadline: float | None = None, limit: int = 100
) -> ListJob:
    scope = Scope("default", user, session)
    return ListJob(scope=scope, submitted_at=NOW, deadline=deadline, offset=0, limit=limit)


def searching(query: str, user: str = "ann", top_k: int = 10) -> SearchJob:
    return SearchJob(scope=Scope("default", user), submitted_at=NOW, query=query, top_k=top_k)


def deleting(
    user: str = "ann", session: str | None = None, deadline: float | None = None
) -> DeleteJob:
    return DeleteJob(scope=Scope("default", user, session), submitted_at=NOW, deadline=deadline)


def adds(*jobs: AddJob, backend: str | None = None) -> AddBatch:
    return AddBatch(**BATCH, jobs=list(jobs), backend=backend)


def lists(*jobs: ListJob, backend: str | None = None) -> ListBatch:
    return ListBatch(**BATCH, jobs=list(jobs), backend=backend)


def searches(*jobs: SearchJob) -> SearchBatch:
    return SearchBatch(**BATCH, jobs=list(jobs))


def deletes(*jobs: DeleteJob) -> DeleteBatch:
    return DeleteBatch(**BATCH, jobs=list(jobs))


class Counting(InMemoryStore):
    """A store that says which calls it got, and fails for the users it is told to."""

    name: ClassVar[str] = "counting"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self.trouble: dict[str, Callable[[], Awaitable[None]]] = {}
        """What happens first to whatever concerns a user."""

    async def _note(self, call: str, *users: str) -> None:
        self.calls.append((call, users))
        for user in users:
            if user in self.trouble:
                await self.trouble[user]()

    async def add(self, records: Sequence[Record]) -> list[Added]:
        await self._note("add", *(record.scope.user_id for record in records))
        return await super().add(records)

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[base.Hit]:
        await self._note("search", scope.user_id)
        return await super().search(scope, query, top_k=top_k, score_threshold=score_threshold)

    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]:
        await self._note("list", scope.user_id)
        return await super().list(scope, offset=offset, limit=limit)

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        await self._note("delete", scope.user_id)
        return await super().delete(scope, before_epoch=before_epoch)


def raising(error: BaseException) -> Callable[[], Awaitable[None]]:
    async def fail() -> None:
        raise error

    return fail


async def hang() -> None:
    await asyncio.Event().wait()


@pytest.fixture
def store() -> Counting:
    return Counting()


class Nobody:
    """Takes note of dead jobs, and keeps no letters."""

    def __init__(self) -> None:
        self.buried: list[int] = []
        self.forgot: list[tuple[Scope, int]] = []
        self.ran_alone: list[int | None] = []

    async def dead(
        self,
        index: int,
        error: JobError,
        attempts: int,
        history: Sequence[dict[str, Any]] | None = None,
    ) -> bool:
        self.buried.append(index)
        return False

    async def forget(self, scope: Scope, before_epoch: int) -> None:
        self.forgot.append((scope, before_epoch))

    async def alone(self, index: int | None) -> None:
        self.ran_alone.append(index)


ONCE = RetryPolicy(attempts=1, base=1.0, cap=1.0)


class Time:
    now = NOW


def serve(
    store: base.MemoryStore,
    *,
    job_timeout: float = 5.0,
    parallel_jobs: int = 100,
    retries: RetryPolicy = ONCE,
) -> MemoryService:
    return MemoryService(
        store,
        now=lambda: Time.now,
        job_timeout=job_timeout,
        parallel_jobs=parallel_jobs,
        retries=retries,
    )


async def run(service: MemoryService, batch: AnyBatch, claim: Claim | None = None) -> list[Outcome]:
    """All outcomes of a batch, after checking that there is one for each job."""
    result = BatchResult()
    await service.run(batch, claim or Claim([]), result, Nobody())
    assert result.operation is batch.operation
    assert len(result.outcomes) == len(batch.jobs)
    outcomes = [outcome for outcome in result.outcomes if outcome is not None]
    assert len(outcomes) == len(batch.jobs), "a job has no outcome and never will"
    orjson.dumps(result, default=fields_of)
    return outcomes


def states(outcomes: Sequence[Outcome]) -> list[str]:
    return [outcome.state.value for outcome in outcomes]


def code_of(outcome: Outcome) -> str:
    assert outcome.error is not None
    return str(outcome.error["code"])


async def stored(store: InMemoryStore, user: str = "ann") -> list[str]:
    records = await InMemoryStore.list(store, Scope("default", user), offset=0, limit=1000)
    return [record.message["content"] for record in records]


# --- what each operation does -------------------------------------------------------------------


async def test_adds_of_a_batch_go_to_the_store_together(store: Counting) -> None:
    """One call for the whole batch; each job gets the ids of its own records."""
    jobs = [add("one", "two"), add("three", user="bob"), add("four")]
    outcomes = await run(serve(store), adds(*jobs))
    assert store.calls == [("add", ("ann", "ann", "bob", "ann"))]
    assert states(outcomes) == ["succeeded"] * 3
    assert [outcome.result for outcome in outcomes] == [
        {"record_ids": jobs[0].record_ids(), "added": 2},
        {"record_ids": jobs[1].record_ids(), "added": 1},
        {"record_ids": jobs[2].record_ids(), "added": 1},
    ]
    assert await stored(store) == ["one", "two", "four"]
    assert await stored(store, "bob") == ["three"]


async def test_a_job_that_runs_again_stores_nothing_again(store: Counting) -> None:
    """Delivery is at least once; the second run says what the first said, or would have."""
    batch = adds(add("one", "two"), add("three"))
    service = serve(store)
    first = await run(service, batch)
    second = await run(service, batch)
    assert [(outcome.result or {})["added"] for outcome in first] == [2, 1]
    assert [(outcome.result or {})["added"] for outcome in second] == [2, 1]
    assert await stored(store) == ["one", "two", "three"]


async def test_an_idempotency_key_used_twice_in_a_batch_counts_once(store: Counting) -> None:
    outcomes = await run(serve(store), adds(add("a", key="k"), add("a", key="k"), add("b")))
    assert [(outcome.result or {})["added"] for outcome in outcomes] == [1, 0, 1]
    assert await stored(store) == ["a", "b"]


async def test_an_add_without_a_session_goes_to_the_default_session(store: Counting) -> None:
    await run(serve(store), adds(add("one", session=None)))
    records = await store.list(Scope("default", "ann", "default"), offset=0, limit=9)
    assert [record.message["content"] for record in records] == ["one"]


async def test_an_add_of_no_messages_succeeds(store: Counting) -> None:
    outcomes = await run(serve(store), adds(add(), add("one")))
    assert outcomes[0].result == {"record_ids": [], "added": 0}
    assert await stored(store) == ["one"]


async def test_a_batch_of_nothing_but_empty_adds_has_outcomes_too(store: Counting) -> None:
    """Whoever sends it waits for an answer."""
    outcomes = await run(serve(store), adds(add(), add()))
    assert states(outcomes) == ["succeeded", "succeeded"]


async def test_lists_and_searches_return_what_clients_read(store: Counting) -> None:
    """Message, session, record id, time of submission and score, as JSON."""
    service = serve(store)
    job = add("green tea")
    await run(service, adds(job, add("coffee", session="t")))
    result = BatchResult()
    await service.run(lists(listing(), listing("nobody")), Claim([]), result, Nobody())
    read = BatchResult.model_validate_json(orjson.dumps(result, default=fields_of))
    pages = [(outcome.result or {})["records"] for outcome in read.outcomes if outcome]
    assert [len(page) for page in pages] == [2, 0]
    first = StoredMessage.model_validate(pages[0][0])
    assert first.message == {"role": "user", "content": "green tea"}
    assert (first.session_id, first.record_id) == ("s", job.record_ids()[0])
    submitted = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=job.order)
    assert first.created_at == submitted
    [outcome] = await run(service, searches(searching("tea")))
    [hit] = (outcome.result or {})["hits"]
    assert 0.6 < Hit.model_validate(hit).score < 0.75


async def test_pages_and_bounds_reach_the_store(store: Counting) -> None:
    service = serve(store)
    await run(service, adds(*(add(f"tea {number}") for number in range(10))))
    page = ListJob(scope=Scope("default", "ann"), submitted_at=NOW, offset=4, limit=3)
    [outcome] = await run(service, lists(page))
    found = [record["message"]["content"] for record in (outcome.result or {})["records"]]
    assert found == ["tea 4", "tea 5", "tea 6"]
    strict = searching("green tea", top_k=3)
    strict.score_threshold = 0.9
    outcomes = await run(service, searches(searching("tea", top_k=3), strict))
    assert [len((outcome.result or {})["hits"]) for outcome in outcomes] == [3, 0]


async def test_health_is_what_the_store_says(store: Counting) -> None:
    job = HealthJob(scope=Scope("default", ""), submitted_at=NOW)
    [outcome] = await run(serve(store), HealthBatch(**BATCH, jobs=[job]))
    assert Health.model_validate(outcome.result).backend == "counting"


async def test_an_empty_batch_has_no_outcomes(store: Counting) -> None:
    assert await run(serve(store), adds()) == []
    assert await run(serve(store), lists()) == []


# --- deletion epochs ----------------------------------------------------------------------------


async def test_each_add_carries_its_epoch(store: Counting) -> None:
    """Records know how many deletions their user had seen when they were submitted."""
    await run(serve(store), adds(add("a"), add("b"), add("c")), Claim([3, 5]))
    records = await store.list(Scope("default", "ann"), offset=0, limit=9)
    assert [record.epoch for record in records] == [3, 5, 0]


async def test_a_delete_removes_what_was_submitted_before_it(store: Counting) -> None:
    """Its epoch is the fence: older records go, and older ones that come late are not stored."""
    service = serve(store)
    await run(service, adds(add("old"), add("new"), add("other", user="bob")), Claim([1, 2, 1]))
    [outcome] = await run(service, deletes(deleting()), Claim([2]))
    assert outcome.result == {"removed": 1}
    assert await stored(store) == ["new"]
    assert await stored(store, "bob") == ["other"]
    late = await run(service, adds(add("late"), add("fresh")), Claim([1, 2]))
    assert states(late) == ["succeeded", "succeeded"]
    assert await stored(store) == ["new", "fresh"]


async def test_deletes_of_a_batch_keep_apart(store: Counting) -> None:
    """Each has its own scope and epoch."""
    service = serve(store)
    await run(service, adds(add("a"), add("b", session="t"), add("c", user="bob")), Claim([1] * 3))
    batch = deletes(deleting(session="t"), deleting("bob"), deleting("carl"))
    outcomes = await run(service, batch, Claim([2, 1, 7]))
    assert [(outcome.result or {})["removed"] for outcome in outcomes] == [1, 0, 0]
    assert await stored(store) == ["a"]
    assert await stored(store, "bob") == ["c"]


# --- jobs that are not run ----------------------------------------------------------------------


async def test_an_expired_job_is_not_run(store: Counting) -> None:
    """Its mates are."""
    jobs = [add("late", deadline=NOW - 2.5), add("on time", deadline=NOW + 1), add("patient")]
    outcomes = await run(serve(store), adds(*jobs))
    assert states(outcomes) == ["expired", "succeeded", "succeeded"]
    assert code_of(outcomes[0]) == "expired"
    assert await stored(store) == ["on time", "patient"]


async def test_a_job_may_begin_until_its_deadline(store: Counting) -> None:
    assert states(await run(serve(store), adds(add("a", deadline=NOW)))) == ["succeeded"]


async def test_a_cancelled_job_is_not_run(store: Counting) -> None:
    outcomes = await run(
        serve(store), adds(add("a"), add("b"), add("c")), Claim([], cancelled=frozenset({0, 2}))
    )
    assert states(outcomes) == ["cancelled", "succeeded", "cancelled"]
    assert await stored(store) == ["b"]


@pytest.mark.parametrize("batch", [adds(add("a"), backend="redis"), lists(listing(), backend="x")])
async def test_a_job_for_another_backend_is_not_run(store: Counting, batch: AnyBatch) -> None:
    """It must not land in the wrong store; the error names both."""
    [outcome] = await run(serve(store), batch)
    assert code_of(outcome) == "wrong_backend"
    assert "counting" in str(outcome.error)
    assert str(batch.backend) in str(outcome.error)
    assert store.calls == []


async def test_a_job_for_this_backend_is_run(store: Counting) -> None:
    assert states(await run(serve(store), adds(add("a"), backend="counting"))) == ["succeeded"]


async def test_a_batch_of_which_nothing_is_to_be_run_leaves_the_store_alone(
    store: Counting,
) -> None:
    outcomes = await run(serve(store), adds(add("a", deadline=NOW - 1), add("b", deadline=NOW - 1)))
    assert states(outcomes) == ["expired", "expired"]
    assert store.calls == []


async def test_a_deadline_that_passes_while_a_job_waits_for_its_turn_counts(
    store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller who was told that the job will not be run may rely on it: here, on their data."""

    async def take_long() -> None:
        monkeypatch.setattr(Time, "now", NOW + 60)

    await run(serve(store), adds(add("precious", user="bob")))
    store.trouble["ann"] = take_long
    batch = deletes(deleting("ann"), deleting("bob", deadline=NOW + 30))
    outcomes = await run(serve(store, parallel_jobs=1), batch, Claim([1, 1]))
    assert await stored(store, "bob") == ["precious"]
    assert states(outcomes) == ["succeeded", "expired"]


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BackendError("not like this"), "backend_error"),
        (BackendUnavailable("busy", retry_after=3), "backend_unavailable"),
        (ValueError("SECRET"), "internal"),
        (ExceptionGroup("SECRET", [ValueError("SECRET")]), "internal"),
        (TimeoutError("SECRET"), "backend_unavailable"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_poisonous_add_fails_alone(store: Counting, error: Exception, code: str) -> None:
    """Its mates are stored, once, and in order."""
    store.trouble["eve"] = raising(error)
    jobs = [add("one"), add("bad", user="eve"), add("two", "three"), add("four", user="bob")]
    outcomes = await run(serve(store), adds(*jobs))
    assert states(outcomes) == ["succeeded", "failed", "succeeded", "succeeded"]
    assert code_of(outcomes[1]) == code
    assert await stored(store) == ["one", "two", "three"]
    assert await stored(store, "bob") == ["four"]
    assert await stored(store, "eve") == []


async def test_a_single_add_that_fails_is_not_tried_again_on_its_own(store: Counting) -> None:
    """There are no mates to save."""
    store.trouble["ann"] = raising(BackendError("no"))
    assert states(await run(serve(store), adds(add("a", "b")))) == ["failed"]
    assert store.calls == [("add", ("ann", "ann"))]


class HalfWay(InMemoryStore):
    """Stores some of what it is given and then fails."""

    name: ClassVar[str] = "half_way"

    async def add(self, records: Sequence[Record]) -> list[Added]:
        new = []
        for record in records:
            if record.scope.user_id == "eve":
                raise BackendError("no")
            new += await super().add([record])
        return new


async def test_what_was_stored_before_a_failure_is_not_stored_twice() -> None:
    """A store may fail half way; the second attempt writes the same records."""
    store = HalfWay()
    outcomes = await run(serve(store), adds(add("one"), add("bad", user="eve"), add("two")))
    assert states(outcomes) == ["succeeded", "failed", "succeeded"]
    assert await stored(store) == ["one", "two"]


async def test_an_add_that_was_begun_in_time_does_not_expire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Expired means not run. After a failure that took its mates' time, they are still stored."""

    class Slow(HalfWay):
        async def add(self, records: Sequence[Record]) -> list[Added]:
            try:
                return await super().add(records)
            finally:
                monkeypatch.setattr(Time, "now", Time.now + 60)

    store = Slow()
    jobs = [add("one", deadline=NOW + 30), add("bad", user="eve"), add("two", deadline=NOW + 30)]
    outcomes = await run(serve(store), adds(*jobs))
    assert await stored(store) == ["one", "two"]
    assert states(outcomes) == ["succeeded", "failed", "succeeded"]


async def test_the_time_to_wait_reaches_the_caller(store: Counting) -> None:
    store.trouble["ann"] = raising(BackendUnavailable("busy", retry_after=3))
    [outcome] = await run(serve(store), adds(add("a")))
    assert outcome.error == {"code": "backend_unavailable", "message": "busy", "retry_after": 3}


@pytest.mark.parametrize(
    "batch",
    [
        lists(listing(), listing("eve"), listing("bob")),
        searches(searching("tea"), searching("tea", "eve"), searching("tea", "bob")),
        deletes(deleting(), deleting("eve"), deleting("bob")),
        adds(add("a"), add("b", user="eve"), add("c", user="bob")),
    ],
    ids=lambda batch: batch.operation.value,
)
async def test_an_unexpected_error_is_named_but_not_quoted(
    store: Counting, batch: AnyBatch
) -> None:
    """What a library puts into an error may be what a user said, or a password."""
    store.trouble["eve"] = raising(RuntimeError("SECRET"))
    outcomes = await run(serve(store), batch)
    assert states(outcomes) == ["succeeded", "failed", "succeeded"]
    assert code_of(outcomes[1]) == "internal"
    assert "RuntimeError" in str(outcomes[1].error)
    assert "counting" in str(outcomes[1].error)
    assert "SECRET" not in str(outcomes[1].error)


async def test_an_unexpected_error_is_in_the_log(
    store: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    """With its traceback: it is a defect that somebody has to find."""
    store.trouble["ann"] = raising(RuntimeError("the cause"))
    with caplog.at_level(logging.ERROR):
        await run(serve(store), lists(listing()))
    assert any(record.exc_info and "counting" in record.getMessage() for record in caplog.records)


async def test_an_expected_error_is_not_in_the_log_as_a_defect(
    store: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    store.trouble["ann"] = raising(BackendError("no such index"))
    with caplog.at_level(logging.ERROR):
        await run(serve(store), lists(listing()))
    assert caplog.records == []


async def test_a_job_whose_library_cancels_itself_fails_alone(store: Counting) -> None:
    """A cancellation that nobody asked for is an error like any other: the job has an outcome."""

    async def await_something_cancelled() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    store.trouble["eve"] = await_something_cancelled
    outcomes = await run(serve(store), lists(listing(), listing("eve")))
    assert states(outcomes) == ["succeeded", "failed"]
    outcomes = await run(serve(store), adds(add("a"), add("b", user="eve")))
    assert states(outcomes) == ["succeeded", "failed"]


async def test_cancelling_the_run_stops_it(store: Counting) -> None:
    """As when the process stops: nothing goes on behind its back, nothing is made up."""
    store.trouble["eve"] = hang
    result = BatchResult()
    batch = lists(listing("eve"), listing())
    running = asyncio.create_task(serve(store).run(batch, Claim([]), result, Nobody()))
    await eventually(lambda: _is(len(result.outcomes) == 2 and result.outcomes[1] is not None))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert result.outcomes[0] is None


async def _is(condition: bool) -> bool:
    return condition


# --- time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "waits"),
    [(lists(listing(), listing("eve")), 1), (adds(add("a"), add("b", user="eve")), 2)],
    ids=["list", "add"],
)
def test_a_job_that_takes_too_long_fails_alone(
    store: Counting, batch: AnyBatch, waits: int
) -> None:
    """It may succeed later, and the error says how long was waited."""

    async def main() -> None:
        store.trouble["eve"] = hang
        outcomes = await run(serve(store, job_timeout=60), batch)
        assert now() == 60 * waits
        assert states(outcomes) == ["succeeded", "failed"]
        assert code_of(outcomes[1]) == "backend_unavailable"
        assert "60 s" in str(outcomes[1].error)

    run_virtually(main())


@pytest.mark.parametrize(
    "batch",
    [
        lists(listing("eve"), listing(), listing("bob")),
        searches(searching("tea", "eve"), searching("tea"), searching("tea", "bob")),
        deletes(deleting("eve"), deleting(), deleting("bob")),
    ],
    ids=lambda batch: batch.operation.value,
)
async def test_a_slow_job_does_not_hold_back_its_mates(store: Counting, batch: AnyBatch) -> None:
    """Their outcomes are there while it still runs, for the task to send ahead."""
    free = asyncio.Event()

    async def wait() -> None:
        await free.wait()

    store.trouble["eve"] = wait
    result = BatchResult()
    running = asyncio.create_task(serve(store).run(batch, Claim([]), result, Nobody()))
    await eventually(lambda: _is(None not in result.outcomes[1:] and len(result.outcomes) == 3))
    assert result.outcomes[0] is None
    assert not running.done()
    free.set()
    await running
    assert result.outcomes[0] is not None


async def test_outcomes_of_refused_jobs_are_there_first(store: Counting) -> None:
    """A cancelled job's caller does not wait for the rest of the batch."""
    store.trouble["eve"] = hang
    result = BatchResult()
    batch = adds(add("a", user="eve"), add("b"), add("c", deadline=NOW - 1))
    claim = Claim([], cancelled=frozenset({1}))
    running = asyncio.create_task(serve(store).run(batch, claim, result, Nobody()))
    await eventually(lambda: _is(bool(store.calls)))
    assert result.outcomes[0] is None
    assert states([outcome for outcome in result.outcomes if outcome]) == ["cancelled", "expired"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_no_more_jobs_run_at_once_than_allowed(store: Counting) -> None:
    running = most = 0

    async def busy() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1

    store.trouble["ann"] = busy
    await run(serve(store, parallel_jobs=4), lists(*(listing() for _ in range(20))))
    assert most == 4


def test_waiting_for_a_turn_is_not_part_of_a_jobs_time(store: Counting) -> None:
    """Jobs behind slow ones get their full time once they begin."""

    async def main() -> None:
        store.trouble["ann"] = lambda: asyncio.sleep(50)
        service = serve(store, parallel_jobs=1, job_timeout=60)
        outcomes = await run(service, lists(*(listing() for _ in range(5))))
        assert states(outcomes) == ["succeeded"] * 5
        assert now() == 250

    run_virtually(main())


async def test_a_failed_job_leaves_its_place_to_the_next(store: Counting) -> None:
    store.trouble["eve"] = raising(RuntimeError("x"))
    outcomes = await run(
        serve(store, parallel_jobs=1), lists(*(listing("eve") for _ in range(3)), listing())
    )
    assert states(outcomes) == ["failed"] * 3 + ["succeeded"]


async def test_the_service_knows_all_operations(store: Counting) -> None:
    """Each kind of batch reaches the store's method of the same name."""
    batches: list[AnyBatch] = [
        adds(add("a")), lists(listing()), searches(searching("a")), deletes(deleting()),
    ]  # fmt: skip
    for batch in batches:
        [outcome] = await run(serve(store), batch, Claim([1]))
        assert outcome.state is JobState.SUCCEEDED
    assert [call for call, _ in store.calls] == ["add", "list", "search", "delete"]
    assert {batch.operation for batch in batches} == set(Operation) - {Operation.HEALTH}


# --- trying again -------------------------------------------------------------------------------

PATIENT = RetryPolicy(attempts=3, base=0.001, cap=0.001)


def unavailable(times: int, *, retry_after: float | None = None) -> Callable[[], Awaitable[None]]:
    """Trouble that passes."""
    left = itertools.count()

    async def trouble() -> None:
        if next(left) < times:
            raise BackendUnavailable("not now", retry_after=retry_after)

    return trouble


def postponed(left: Left | None) -> Postponed:
    """What is to be tried again, and nothing is for the slow lane."""
    assert left is not None
    assert left.postponed is not None
    assert not left.handed_over
    return left.postponed


def again(left: Left | None) -> Claim:
    """The claim of the run that follows one which left something, when all of it is due."""
    waiting = postponed(left).waiting
    waiting = {index: Waiting(NOW, each.attempts) for index, each in waiting.items()}
    return Claim([], attempts=1, waiting=waiting)


async def test_adds_that_fail_in_passing_are_left_open_without_a_second_call(
    store: Counting,
) -> None:
    store.trouble["eve"] = unavailable(1)
    batch = adds(add("a", user="eve"), add("b"))
    service, result = serve(store, retries=PATIENT), BatchResult()
    left = await service.run(batch, Claim([]), result, Nobody())
    assert set(postponed(left).errors) == {0, 1}
    assert result.outcomes == [None, None]
    assert len(store.calls) == 1
    # The next time one by one, so that whoever is in trouble is alone with it.
    left = await service.run(batch, again(left), result, Nobody())
    assert left is None
    assert [call for call, _ in store.calls] == ["add"] * 3
    assert states([outcome for outcome in result.outcomes if outcome]) == ["succeeded"] * 2


async def test_only_what_is_open_runs_again(store: Counting) -> None:
    store.trouble["eve"] = unavailable(1)
    batch = searches(searching("tea", user="eve"), searching("tea"))
    service, result = serve(store, retries=PATIENT), BatchResult()
    left = await service.run(batch, Claim([]), result, Nobody())
    assert set(postponed(left).errors) == {0}
    assert result.outcomes[1] is not None
    calls = len(store.calls)
    assert await service.run(batch, again(left), result, Nobody()) is None
    assert store.calls[calls:] == [("search", ("eve",))]


async def test_each_waits_as_long_as_it_was_told_to_and_for_nobody_else(store: Counting) -> None:
    store.trouble |= {
        "ann": unavailable(1, retry_after=5),
        "bob": unavailable(1, retry_after=60),
        "cid": unavailable(1, retry_after=60),
    }
    batch = lists(listing("ann"), listing("bob"), listing("cid", deadline=NOW + 30))
    service, result = serve(store, retries=PATIENT), BatchResult()
    left = await service.run(batch, Claim([]), result, Nobody())
    assert 5 <= postponed(left).delay < 6
    assert set(postponed(left).errors) == {0, 1}
    assert result.outcomes[2] is not None
    assert code_of(result.outcomes[2]) == "backend_unavailable"
    # The first is due, the second is not: it waits on, and has not used up an attempt.
    left = await service.run(
        batch,
        Claim([], attempts=1, waiting={0: Waiting(NOW, 1), 1: Waiting(NOW + 55, 1)}),
        result,
        Nobody(),
    )
    assert 54 < postponed(left).delay <= 55
    assert postponed(left).errors == {}
    assert postponed(left).waiting == {1: Waiting(NOW + 55, 1)}
    assert result.outcomes[0] is not None
    assert result.outcomes[0].state is JobState.SUCCEEDED


async def test_jobs_that_failed_together_are_tried_again_together(store: Counting) -> None:
    store.trouble |= {"ann": unavailable(1), "bob": unavailable(1)}
    patient = RetryPolicy(attempts=3, base=100, cap=100)
    service, result = serve(store, retries=patient), BatchResult()
    left = await service.run(lists(listing("ann"), listing("bob")), Claim([]), result, Nobody())
    assert len({each.due for each in postponed(left).waiting.values()}) == 1


async def test_adds_with_no_time_to_wait_get_a_chance_of_their_own(store: Counting) -> None:
    """The error of all may be due to another's job."""
    store.trouble["eve"] = unavailable(9, retry_after=6)
    batch = adds(add("a", user="eve"), add("b", deadline=NOW + 4), add("c"))
    service, result = serve(store, retries=PATIENT), BatchResult()
    left = await service.run(batch, Claim([]), result, Nobody())
    assert set(postponed(left).waiting) == {0, 2}
    assert result.outcomes[1] is not None
    assert result.outcomes[1].state is JobState.SUCCEEDED


async def test_attempts_are_counted_for_each_job(store: Counting) -> None:
    store.trouble["ann"] = unavailable(9)
    result = BatchResult()
    claim = Claim([], attempts=7, waiting={0: Waiting(NOW, 1)})
    service = serve(store, retries=PATIENT)
    left = await service.run(lists(listing()), claim, result, Nobody())
    assert postponed(left).waiting[0].attempts == 2
    claim = Claim([], attempts=8, waiting=postponed(left).waiting | {0: Waiting(NOW, 2)})
    assert await service.run(lists(listing()), claim, result, Nobody()) is None


async def test_a_dead_write_is_kept_before_it_counts_as_settled(store: Counting) -> None:
    class Keeper(Nobody):
        async def dead(
            self,
            index: int,
            error: JobError,
            attempts: int,
            history: Sequence[dict[str, Any]] | None = None,
        ) -> bool:
            assert result.outcomes[index] is None
            return await super().dead(index, error, attempts, history) or index == 0

    store.trouble["eve"] = unavailable(9)
    result, keeper = BatchResult(), Keeper()
    batch = adds(add("a", user="eve"), add("b", user="eve"), add("c"))
    assert await serve(store).run(batch, Claim([]), result, keeper) is None
    assert sorted(keeper.buried) == [0, 1]
    assert states([outcome for outcome in result.outcomes if outcome]) == [
        "dead", "failed", "succeeded"
    ]  # fmt: skip


async def test_a_dead_read_is_not_kept(store: Counting) -> None:
    store.trouble["ann"] = unavailable(9)
    keeper, result = Nobody(), BatchResult()
    await serve(store).run(lists(listing()), Claim([]), result, keeper)
    assert keeper.buried == []


async def test_a_delete_takes_dead_letters_along_first(store: Counting) -> None:
    store.trouble["ann"] = unavailable(9)
    observer = Nobody()
    await serve(store).run(deletes(deleting(session="s")), Claim([7]), BatchResult(), observer)
    assert observer.forgot == [(Scope("default", "ann", "s"), 7)]


# --- one job at a time --------------------------------------------------------------------------


async def test_a_batch_of_which_a_worker_died_runs_one_job_at_a_time(store: Counting) -> None:
    observer, result = Nobody(), BatchResult()
    batch = adds(add("a"), add("b", deadline=NOW - 1), add("c"))
    await serve(store).run(batch, Claim([], deliveries=2), result, observer)
    assert observer.ran_alone == [0, 2, None]
    assert store.calls == [("add", ("ann",))] * 2


async def test_the_job_that_took_its_workers_along_is_given_up(store: Counting) -> None:
    keeper, result = Nobody(), BatchResult()
    batch = adds(add("a"), add("b"), add("c"))
    claim = Claim([], deliveries=4, deaths={1: 3, 2: 2})
    await serve(store).run(batch, claim, result, keeper)
    assert keeper.buried == [1]
    assert keeper.ran_alone == [0, 2, None]
    [_, lost, _] = result.outcomes
    assert lost is not None
    assert code_of(lost) == "worker_lost"


# --- asking to stop -----------------------------------------------------------------------------


async def test_a_job_that_is_asked_to_stop_leaves_its_mates_alone(store: Counting) -> None:
    store.trouble["eve"] = hang
    batch = searches(searching("tea", user="eve"), searching("tea"))
    service, result = serve(store), BatchResult()
    running = asyncio.create_task(service.run(batch, Claim([]), result, Nobody()))
    await eventually(lambda: _is(len(store.calls) == 2))
    service.stop(batch.id, [0])
    service.stop("another", [0])
    assert await running is None
    assert states([outcome for outcome in result.outcomes if outcome]) == [
        "cancelled", "succeeded"
    ]  # fmt: skip


async def test_adds_that_are_stored_together_stop_together_or_not_at_all(store: Counting) -> None:
    store.trouble["eve"] = hang
    batch = adds(add("a", user="eve"), add("b"))
    service, result = serve(store), BatchResult()
    running = asyncio.create_task(service.run(batch, Claim([]), result, Nobody()))
    await eventually(lambda: _is(bool(store.calls)))
    service.stop(batch.id, [1])
    await asyncio.sleep(0.05)
    assert not running.done()
    service.stop(batch.id, [0])
    assert await running is None
    assert states([outcome for outcome in result.outcomes if outcome]) == ["cancelled"] * 2


async def test_a_job_that_waits_for_its_turn_can_be_stopped_too(store: Counting) -> None:
    store.trouble["eve"] = hang
    batch = searches(searching("tea", user="eve"), searching("tea"))
    service, result = serve(store, parallel_jobs=1), BatchResult()
    running = asyncio.create_task(service.run(batch, Claim([]), result, Nobody()))
    await eventually(lambda: _is(bool(store.calls)))
    service.stop(batch.id, [1])
    service.stop(batch.id, [0])
    await running
    assert states([outcome for outcome in result.outcomes if outcome]) == ["cancelled"] * 2
    assert len(store.calls) == 1


async def test_stopping_the_worker_is_not_taken_for_stopping_a_job(store: Counting) -> None:
    store.trouble["eve"] = hang
    batch = searches(searching("tea", user="eve"))
    service, result = serve(store), BatchResult()
    running = asyncio.create_task(service.run(batch, Claim([]), result, Nobody()))
    await eventually(lambda: _is(bool(store.calls)))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert result.outcomes == [None]
