"""The batcher, in virtual time: who leaves when, with whom, and how it ends."""

from __future__ import annotations

import asyncio
import gc
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recallq.batching import Batcher, Draft
from recallq.contract import DeleteJob, JobState, Lane, ListJob, Operation, Outcome, Scope
from recallq.errors import ClientClosed, QueueFull
from recallq.settings import ClientSettings
from tests.virtual_time import now, run_virtually

SCOPE = Scope("default", "ann")
LINGER = 0.005
EPSILON = 1e-6
DONE = Outcome(state=JobState.SUCCEEDED, result={})


async def turns(count: int = 3) -> None:
    """Lets the loop go round, without time passing."""
    for _ in range(count):
        await asyncio.sleep(0)


@dataclass
class Sent:
    """One batch as it left."""

    at: float
    lane: Lane
    operation: Operation
    drafts: list[Draft]
    over: Callable[[], None]
    """What the batcher wants called once all who wait have their answers."""

    @property
    def names(self) -> list[str]:
        return [draft.job.id for draft in self.drafts]


@dataclass
class Broker:
    """Takes batches; answers them when it is told to."""

    sent: list[Sent] = field(default_factory=list)
    before: Callable[[Sent], Awaitable[None]] | None = None
    """Awaited while a batch is being sent."""

    _taken: defaultdict[Draft, asyncio.Event] = field(
        default_factory=lambda: defaultdict(asyncio.Event)
    )

    async def send(
        self, lane: Lane, operation: Operation, drafts: list[Draft], over: Callable[[], None]
    ) -> None:
        batch = Sent(now(), lane, operation, list(drafts), over)
        self.sent.append(batch)
        if self.before is not None:
            await self.before(batch)
        for draft in drafts:
            self._taken[draft].set()

    async def took(self, draft: Draft) -> None:
        """Returns once a draft's batch is taken: the caller of one that waits is not told."""
        await self._taken[draft].wait()

    def answer(self, index: int) -> None:
        """Answers who still waits for jobs of a batch; nobody waits for them afterwards."""
        batch = self.sent[index]
        waiting = [draft for draft in batch.drafts if draft.waits]
        for draft in waiting:
            if not draft.answer.done():
                draft.answer.set_result(DONE)
        if waiting:
            batch.over()

    @property
    def batches(self) -> list[list[str]]:
        return [batch.names for batch in self.sent]


def make(broker: Broker, **changes: Any) -> Batcher:
    return Batcher(ClientSettings.load(batch_linger=LINGER, **changes), broker.send)


def put(
    batcher: Batcher,
    name: str,
    size: int = 100,
    *,
    weight: int = 1,
    lane: Lane = Lane.LIVE,
    operation: Operation = Operation.LIST,
    wait: bool = True,
) -> Draft:
    job = ListJob(id=name, scope=SCOPE, submitted_at=0, offset=0, limit=weight)
    return batcher.put(lane, operation, job, size, wait=wait)


async def use_up(broker: Broker, batcher: Batcher, window: int = 4) -> None:
    """Sends as many batches as may be unanswered, and leaves them so."""
    for number in range(window):
        await broker.took(put(batcher, f"early {number}"))


# --- when a job leaves --------------------------------------------------------------------------


def test_one_job_leaves_at_once() -> None:
    """Under low load a batch is one job and no time passes before it is sent."""

    async def main() -> None:
        broker = Broker()
        draft = put(make(broker), "a")
        await broker.took(draft)
        assert broker.batches == [["a"]]
        assert now() == 0.0
        assert draft.waits
        assert not draft.answer.done()
        broker.answer(0)
        assert await draft.answer == DONE

    run_virtually(main())


def test_jobs_of_one_turn_share_a_batch() -> None:
    """Whether one task calls several times or several tasks call at once."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker)

        async def call(name: str) -> None:
            await broker.took(put(batcher, name))

        await asyncio.gather(*(call(name) for name in "abc"))
        for name in "def":
            put(batcher, name)
        await turns()
        assert broker.batches == [["a", "b", "c"], ["d", "e", "f"]]
        assert now() == 0.0

    run_virtually(main())


def test_lanes_and_operations_travel_apart() -> None:
    async def main() -> None:
        broker = Broker()
        batcher = make(broker)
        put(batcher, "live list")
        put(batcher, "bulk list", lane=Lane.BULK)
        put(batcher, "live search", operation=Operation.SEARCH)
        put(batcher, "another live list")
        await turns()
        assert [(each.lane, each.operation, each.names) for each in broker.sent] == [
            (Lane.LIVE, Operation.LIST, ["live list", "another live list"]),
            (Lane.BULK, Operation.LIST, ["bulk list"]),
            (Lane.LIVE, Operation.SEARCH, ["live search"]),
        ]

    run_virtually(main())


def test_jobs_leave_at_once_until_the_window_is_used_up() -> None:
    """Then the next one waits for company, but no longer than the linger."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=2)
        await use_up(broker, batcher, 2)
        assert now() == 0.0
        late = put(batcher, "late")
        await turns(10)
        assert broker.batches == [["early 0"], ["early 1"]]
        await broker.took(late)
        assert now() == pytest.approx(LINGER)

    run_virtually(main())


def test_jobs_gather_while_the_window_is_used_up() -> None:
    """Calls of different moments leave in one batch."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=1)
        await use_up(broker, batcher, 1)
        for name in "abcd":
            put(batcher, name)
            await asyncio.sleep(LINGER / 10)
        await asyncio.sleep(2 * LINGER)
        assert broker.batches == [["early 0"], ["a", "b", "c", "d"]]

    run_virtually(main())


def test_an_answer_lets_the_gathered_jobs_go() -> None:
    """They do not wait out the linger when there is room again."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=2)
        await use_up(broker, batcher, 2)
        late = put(batcher, "late")
        await asyncio.sleep(LINGER / 5)
        broker.answer(0)
        await broker.took(late)
        assert now() == pytest.approx(LINGER / 5)

    run_virtually(main())


def test_a_caller_that_gives_up_is_an_answer_too() -> None:
    """A cancelled call's batch does not use up the window for ever: the sender finds that nobody
    waits for it."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=1)
        first = put(batcher, "first")
        await broker.took(first)
        first.answer.cancel()
        broker.answer(0)
        await turns(5)
        await broker.took(put(batcher, "second"))
        assert now() == 0.0

    run_virtually(main())


def test_submitted_jobs_leave_room_as_soon_as_they_are_accepted() -> None:
    """Nobody waits for their outcome, so there is no answer to wait for."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=1)
        for number in range(10):
            draft = put(batcher, str(number), wait=False)
            assert not draft.waits
            assert await draft.answer is None
            await turns()
        assert len(broker.sent) == 10
        assert now() == 0.0

    run_virtually(main())


def test_a_full_batch_leaves_though_the_window_is_used_up() -> None:
    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=1, batch_max_jobs=3)
        await use_up(broker, batcher, 1)
        for name in "abcd":
            put(batcher, name)
        await turns()
        assert broker.batches == [["early 0"], ["a", "b", "c"]]
        assert now() == 0.0
        await asyncio.sleep(2 * LINGER)
        assert broker.batches[2:] == [["d"]]

    run_virtually(main())


@pytest.mark.parametrize(
    ("limit", "size", "weight"),
    [
        ({"batch_max_jobs": 4}, 1, 1),
        ({"batch_max_bytes": 2000}, 500, 1),
        ({"batch_max_records": 20}, 1, 5),
    ],
    ids=["jobs", "bytes", "records"],
)
def test_a_batch_is_full_by_jobs_bytes_or_records(
    limit: dict[str, int], size: int, weight: int
) -> None:
    """The fourth job fills it, each time anew, and does not wait for answers."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=1, **limit)
        await use_up(broker, batcher, 1)
        for batch in range(1, 4):
            for number in range(4):
                assert len(broker.sent) == batch
                put(batcher, f"{batch}.{number}", size, weight=weight)
                await turns()
            assert broker.batches[batch] == [f"{batch}.{number}" for number in range(4)]
        assert now() == 0.0

    run_virtually(main())


def test_an_answer_makes_room_for_one_batch_and_no_more() -> None:
    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=2)
        await use_up(broker, batcher, 2)
        broker.answer(0)
        await turns()
        await broker.took(put(batcher, "in its place"))
        assert now() == 0.0
        await broker.took(put(batcher, "one too many"))
        assert now() == pytest.approx(LINGER)

    run_virtually(main())


def test_a_batch_that_is_over_twice_makes_room_once() -> None:
    """As when a sender comes across it again, at once or later."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=2)
        await use_up(broker, batcher, 2)
        broker.answer(0)
        broker.sent[0].over()
        await turns()
        await broker.took(put(batcher, "in its place"))
        assert now() == 0.0
        broker.sent[0].over()
        await turns()
        await broker.took(put(batcher, "one too many"))
        assert now() == pytest.approx(LINGER)

    run_virtually(main())


@pytest.mark.parametrize("every", [LINGER / 10, LINGER / 2, LINGER * 0.9])
def test_a_job_does_not_wait_for_those_that_come_after_it(every: float) -> None:
    """The linger counts from the first job that waits, however steadily others follow."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=1, batch_max_jobs=10_000)
        await use_up(broker, batcher, 1)
        left: dict[str, float] = {}
        came: dict[str, float] = {}
        for number in range(40):
            came[str(number)] = now()
            put(batcher, str(number))
            await asyncio.sleep(every)
        await asyncio.sleep(2 * LINGER)
        for batch in broker.sent[1:]:
            left.update(dict.fromkeys(batch.names, batch.at))
        assert left.keys() == came.keys()
        assert max(left[name] - came[name] for name in came) <= LINGER + EPSILON

    run_virtually(main())


@given(
    calls=st.lists(st.tuples(st.floats(0, 2 * LINGER), st.booleans()), min_size=1, max_size=30),
    window=st.integers(1, 3),
    max_jobs=st.integers(1, 10),
    answered=st.sets(st.integers(0, 30)),
)
@settings(deadline=None)
def test_no_job_ever_waits_longer_than_the_linger(
    calls: list[tuple[float, bool]], window: int, max_jobs: int, answered: set[int]
) -> None:
    """Whatever comes when, and whether answers come or not."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=window, batch_max_jobs=max_jobs)
        came: dict[str, float] = {}
        for number, (pause, wait) in enumerate(calls):
            came[str(number)] = now()
            put(batcher, str(number), wait=wait)
            await asyncio.sleep(pause)
            if number in answered and number < len(broker.sent):
                broker.answer(number)
        await asyncio.sleep(2 * LINGER)
        left = {name: batch.at for batch in broker.sent for name in batch.names}
        assert left.keys() == came.keys()
        assert max(left[name] - came[name] for name in came) <= LINGER + EPSILON

    run_virtually(main())


def test_a_stream_does_not_wait_for_another() -> None:
    """Bulk work that fills its window leaves live work alone."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=1)
        for number in range(20):
            put(batcher, f"bulk {number}", lane=Lane.BULK)
            await turns()
        before = now()
        await broker.took(put(batcher, "live"))
        assert now() == before
        assert broker.sent[-1].names == ["live"]

    run_virtually(main())


# --- what fits in -------------------------------------------------------------------------------

jobs = st.lists(
    st.tuples(st.integers(0, 3000), st.integers(1, 12), st.booleans(), st.integers(0, 2)),
    min_size=1,
    max_size=40,
)


@pytest.mark.parametrize("wait", [True, False])
@given(
    calls=jobs,
    max_jobs=st.integers(1, 8),
    max_bytes=st.integers(1024, 4096),
    max_records=st.integers(1, 20),
    window=st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_batches_keep_their_limits_and_their_order(
    wait: bool,
    calls: list[tuple[int, int, bool, int]],
    max_jobs: int,
    max_bytes: int,
    max_records: int,
    window: int,
) -> None:
    """Never more jobs, bytes or records than allowed, unless one job alone is more; every job
    leaves exactly once, in the order of the calls; what was given up before it left does not."""

    async def main() -> None:
        broker = Broker()
        batcher = make(
            broker,
            batch_max_jobs=max_jobs,
            batch_max_bytes=max_bytes,
            batch_max_records=max_records,
            batch_window=window,
        )
        drafts: list[Draft] = []
        for number, (size, weight, give_up, pause) in enumerate(calls):
            drafts.append(put(batcher, str(number), size, weight=weight, wait=wait))
            if give_up:
                drafts[-1].answer.cancel()
            await turns(pause)
        await asyncio.sleep(2 * LINGER)
        for batch in broker.sent:
            assert batch.drafts
            if len(batch.drafts) > 1:
                assert len(batch.drafts) <= max_jobs
                assert sum(draft.size for draft in batch.drafts) <= max_bytes
                assert sum(draft.job.weight for draft in batch.drafts) <= max_records
        left = [name for batch in broker.sent for name in batch.names]
        wanted = [str(number) for number, call in enumerate(calls) if not call[2]]
        assert left == wanted
        for draft in drafts:
            if not draft.answer.cancelled():
                await broker.took(draft)
                assert draft.answer.done() == (not wait)
        for index in range(len(broker.sent)):
            broker.answer(index)
        assert all(draft.answer.done() for draft in drafts)
        answers = [draft.answer.result() for draft in drafts if not draft.answer.cancelled()]
        assert answers == [DONE if wait else None] * len(wanted)

    run_virtually(main())


def test_a_burst_fills_whole_batches() -> None:
    """Many calls at once make few batches, not many."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_max_jobs=64)
        for number in range(1000):
            put(batcher, str(number))
        await asyncio.sleep(2 * LINGER)
        assert [len(each.drafts) for each in broker.sent] == [64] * 15 + [40]
        assert [name for batch in broker.batches for name in batch] == list(map(str, range(1000)))

    run_virtually(main())


def test_a_job_beyond_the_limits_travels_alone() -> None:
    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_max_bytes=1024, batch_max_records=5)
        for name, size, weight in [("a", 1, 1), ("b", 9999, 1), ("c", 1, 99), ("d", 1, 1)]:
            put(batcher, name, size, weight=weight)
        await turns()
        assert broker.batches == [["a"], ["b"], ["c"], ["d"]]

    run_virtually(main())


def test_limits_are_reached_exactly() -> None:
    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_max_bytes=1024, batch_max_records=10)
        put(batcher, "a", 512, weight=1)
        put(batcher, "b", 512, weight=1)
        put(batcher, "c", 1, weight=1)
        await turns()
        for name in "def":
            put(batcher, name, 1, weight=5)
        await turns()
        assert broker.batches == [["a", "b"], ["c"], ["d", "e"], ["f"]]

    run_virtually(main())


# --- who gave up --------------------------------------------------------------------------------


def test_a_batch_of_which_all_gave_up_is_not_sent() -> None:
    async def main() -> None:
        broker = Broker()
        batcher = make(broker)
        for name in "abc":
            put(batcher, name).answer.cancel()
        await asyncio.sleep(2 * LINGER)
        assert broker.sent == []
        await broker.took(put(batcher, "d"))
        assert broker.batches == [["d"]]
        assert now() == pytest.approx(2 * LINGER)

    run_virtually(main())


def test_giving_up_while_the_batch_is_sent_harms_nobody_else() -> None:
    async def main() -> None:
        sending = asyncio.Event()
        broker = Broker(before=lambda _: _wait(sending))
        batcher = make(broker)
        first, second = put(batcher, "a"), put(batcher, "b")
        await turns()
        first.answer.cancel()
        sending.set()
        await broker.took(second)
        assert broker.batches == [["a", "b"]]
        broker.answer(0)
        assert await second.answer == DONE

    run_virtually(main())


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [QueueFull("full", retry_after=1.5), OSError("gone"), ValueError("a defect")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_batch_that_cannot_be_sent_fails_for_each_of_its_callers(error: Exception) -> None:
    """Whatever the error is, those who wait see it, and nobody else."""

    async def main() -> None:
        async def fail_once(batch: Sent) -> None:
            if len(broker.sent) == 1:
                raise error

        broker = Broker(before=fail_once)
        batcher = make(broker, batch_window=1)
        drafts = [put(batcher, name) for name in "abc"]
        for draft in drafts:
            with pytest.raises(type(error)) as caught:
                await draft.answer
            assert caught.value is error
        await broker.took(put(batcher, "d"))
        assert now() == 0.0

    run_virtually(main())


def test_a_batch_that_cannot_be_sent_makes_room_for_one_other() -> None:
    """What gathered meanwhile leaves at once. That the sender, too, finds in the end that nobody
    waits for the failed batch makes no more room."""

    async def main() -> None:
        refused = asyncio.Event()

        async def fail_first(batch: Sent) -> None:
            if len(broker.sent) == 1:
                await refused.wait()
                raise OSError("gone")

        broker = Broker(before=fail_first)
        batcher = make(broker, batch_window=1)
        first = put(batcher, "first")
        await turns()
        gathered = put(batcher, "gathered")
        await turns()
        assert broker.batches == [["first"]]
        refused.set()
        with pytest.raises(OSError, match="gone"):
            await first.answer
        await broker.took(gathered)
        assert now() == 0.0
        broker.sent[0].over()
        await turns()
        await broker.took(put(batcher, "one too many"))
        assert now() == pytest.approx(LINGER)
        assert broker.batches == [["first"], ["gathered"], ["one too many"]]

    run_virtually(main())


def test_a_failure_that_nobody_fetches_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The caller may be gone; asyncio would complain of an exception never retrieved."""

    async def main() -> None:
        async def fail(batch: Sent) -> None:
            raise OSError("gone")

        batcher = make(Broker(before=fail))
        put(batcher, "a")
        await turns(5)
        await batcher.close()

    run_virtually(main())
    gc.collect()
    assert caplog.records == []


# --- the end ------------------------------------------------------------------------------------


def test_after_the_end_nothing_is_taken() -> None:
    async def main() -> None:
        batcher = make(Broker())
        await batcher.close()
        with pytest.raises(ClientClosed):
            put(batcher, "a")
        await batcher.close()

    run_virtually(main())


@pytest.mark.parametrize("turns_before", range(6))
@pytest.mark.parametrize("wait", [True, False])
def test_the_end_ends_every_call_whenever_it_comes(turns_before: int, wait: bool) -> None:
    """A call is either accepted or refused: none is left waiting for an answer to neither."""

    async def main() -> None:
        never = asyncio.Event()
        broker = Broker(before=lambda _: _wait(never))
        batcher = make(broker, batch_window=1, batch_max_jobs=2)
        drafts = [put(batcher, name, wait=wait) for name in "abcde"]
        await turns(turns_before)
        await batcher.close()
        for draft in drafts:
            assert draft.answer.done(), f"{draft.job.id} waits for ever"
            with pytest.raises(ClientClosed):
                await draft.answer

    run_virtually(main())


def test_the_end_leaves_no_task_and_no_timer_behind() -> None:
    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=1)
        await use_up(broker, batcher, 1)
        waiting = put(batcher, "waiting")
        await turns()
        await batcher.close()
        with pytest.raises(ClientClosed):
            await waiting.answer
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await asyncio.sleep(10 * LINGER)
        assert broker.batches == [["early 0"]]

    run_virtually(main())


@pytest.mark.parametrize("turns_before", range(4))
def test_what_was_accepted_before_the_end_stays_accepted(turns_before: int) -> None:
    """However soon the end comes after it: who waits can still be answered by the sender."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker)
        submitted, waiting = put(batcher, "a", wait=False), put(batcher, "b")
        await broker.took(waiting)
        assert await submitted.answer is None
        await turns(turns_before)
        await batcher.close()
        assert submitted.answer.result() is None
        assert not waiting.answer.done()
        broker.answer(0)
        assert waiting.answer.result() == DONE

    run_virtually(main())


def test_a_call_cancelled_while_it_waits_does_not_leave() -> None:
    """As when a caller's timeout passes while jobs gather."""

    async def main() -> None:
        broker = Broker()
        batcher = make(broker, batch_window=1)
        await use_up(broker, batcher, 1)

        async def call(name: str) -> None:
            async with asyncio.timeout(LINGER / 2):
                await put(batcher, name).answer

        with pytest.raises(TimeoutError):
            await call("impatient")
        patient = put(batcher, "patient")
        await broker.took(patient)
        assert broker.batches == [["early 0"], ["patient"]]

    run_virtually(main())


def test_jobs_of_any_kind_are_carried() -> None:
    async def main() -> None:
        broker = Broker()
        batcher = make(broker)
        job = DeleteJob(id="d", scope=SCOPE, submitted_at=0)
        draft = batcher.put(Lane.LIVE, Operation.DELETE, job, 0, wait=True)
        await broker.took(draft)
        assert broker.sent[0].drafts == [draft]
        assert broker.sent[0].drafts[0].job is job

    run_virtually(main())
