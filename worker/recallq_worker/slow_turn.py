"""One user's turn in the slow lane: what waits for them, worked on in order.

Deletes go first, for what they concern is refused by then; then what an interrupted turn may have
stored is looked into; then come the adds, those that may be extracted together in as few calls as
the token budget allows. A turn ends early when something fails: what comes later waits with it.

What is at stake when a process dies, is with `recallq_worker.slow_ledger`: nothing here needs to
survive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

import orjson

from recallq.contract import AddJob, Lane, Operation, never_begun
from recallq.errors import (
    BackendUnavailable,
    InternalError,
    JobCancelled,
    JobError,
    JobExpired,
    UndecodableJob,
    WorkerLost,
    to_wire,
)
from recallq.tracing import Tracer
from recallq_worker.backends.base import REPEATABLE, Extracted, Submission, Superseded
from recallq_worker.insistence import insistently
from recallq_worker.meters import Meters
from recallq_worker.retries import RetryPolicy
from recallq_worker.seclusion import Seclusion
from recallq_worker.slow_ledger import (
    SUSPICIOUS,
    PendingJob,
    SlowLedger,
    Turn,
    TurnIsOver,
    Verdict,
)
from recallq_worker.slow_work import SlowWork

log = logging.getLogger(__name__)

T = TypeVar("T")

_DEATHS = 3
"""Workers that a job may take with it, alone, before it is given up."""
_RESUME_AGAIN = 5.0
"""Seconds between two tries to find out what an interrupted extraction left behind."""
_COMES = 0.05
"""Seconds between two looks whether a job has come that is on its way."""

_Answered: TypeAlias = tuple[PendingJob, bytes, bytes | None]
"""A job, its outcome, and what comes of it when it is submitted again."""

_ADOPTED, _REDONE = "adopted", "redone"


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for every turn."""

    token_budget: int
    """Most tokens in one extraction, about."""
    timeout: float
    """Seconds that one call of the extractor may take."""
    retries: RetryPolicy
    now: Callable[[], float]
    tracer: Tracer | None = None
    meters: Meters = field(default_factory=Meters)


class ActiveTurn:
    """A turn that is worked on here."""

    def __init__(
        self,
        turn: Turn,
        work: SlowWork,
        ledger: SlowLedger,
        rules: Rules,
        seclusion: Seclusion,
    ) -> None:
        self.turn = turn
        self.task: asyncio.Task[None]
        self.running: frozenset[str] = frozenset()
        """Jobs that the call which runs now is about."""
        self.lost = False
        """Whether it is somebody else's turn by now."""
        self.extracted = False
        """Whether an extraction was begun."""
        self.postponed: list[PendingJob] = []
        """Jobs to be tried again."""
        self.delay = 0.0
        """Seconds until then."""
        self._work = work
        self._ledger = ledger
        self._rules = rules
        self._seclusion = seclusion
        self._alone = turn.begun > SUSPICIOUS
        """Whether its jobs are worked on one by one, with nothing beside them in this process."""
        self._storing = False
        """Whether the call may have begun to store something."""
        self._stopped = False
        """Whether it was asked to stop."""
        self._entry: dict[str, Any] | None = None
        """What the journal says of the latest extraction: that something was stored, perhaps."""
        self._answers = 0
        """How many were written in this turn."""
        self._draw = random.random()  # noqa: S311  # spreads load

    def interrupt(self) -> None:
        """Stops the call that runs, unless it may be storing something: then it finds out later."""
        if self.running and not self._storing and not self._stopped:
            self._stopped = True
            self.task.cancel()

    async def work(self) -> None:
        """Works on the user's jobs until they are done, or something fails.

        Raises `TurnIsOver`, and `DeleteGoesFirst` if the turn is to be released at once.
        """
        turn = self.turn
        for job in turn.jobs:
            if not isinstance(job.job, AddJob):
                await self._delete(job)
        if self.postponed or (
            not self._work.indexing and turn.wait > 0 and await self._must_wait()
        ):
            return
        if turn.journal is not None and not await self._resume(turn.journal):
            return
        if turn.unreadable:
            error = to_wire(UndecodableJob("the job was written by another version of RecallQ"))
            outcomes = [(job, orjson.dumps({"error": error})) for job in turn.unreadable]
            await self._answer([], unreadable=outcomes)
        adds = [job for job in turn.jobs if isinstance(job.job, AddJob)]
        if self._work.indexing:
            self.postponed += [job for job in adds if job.due > self._rules.now()]
            adds = [job for job in adds if job not in self.postponed]
        groups = [[job] for job in adds] if self._alone else self._grouped(adds, turn.deletion)
        for group in groups:
            if self.postponed and not self._work.indexing:
                return  # in order: what comes later waits with it
            await self._extract(group)

    @property
    def pause(self) -> float:
        """Seconds until the postponed jobs are worked on again: all at the same time where they
        keep an order, else the first of them."""
        if not self._work.indexing:
            return self.delay
        return max(0.0, min(job.due for job in self.postponed) - self._rules.now())

    async def _must_wait(self) -> bool:
        """Whether an add is left that waits for another attempt; those that a delete has fenced off
        are answered now."""
        adds = [job for job in self.turn.jobs if isinstance(job.job, AddJob)]
        left = await self._begin(adds)
        return bool(self.postponed) or any(job.attempts for job in left)

    def _grouped(self, jobs: Iterable[PendingJob], deletion: int) -> list[list[PendingJob]]:
        """The jobs in groups to be extracted together, within the token budget.

        What a delete concerns that is on its way yet, and what came after it, go apart.
        """
        groups: list[list[PendingJob]] = []
        current: dict[Hashable, tuple[list[PendingJob], set[str], int]] = {}
        for job in jobs:
            submission = _submission(job)
            key = (self._work.group(submission), job.epoch < deletion)
            size = self._work.tokens(submission)
            group, seen, total = current.get(key, ([], set(), 0))
            # What was submitted twice is not extracted twice: the second finds what came of it.
            if not group or total + size > self._rules.token_budget or job.again in seen:
                group, seen, total = [], set(), 0
                groups.append(group)
            group.append(job)
            if job.again:
                seen.add(job.again)
            current[key] = group, seen, total + size
        return groups

    async def _begin(
        self, jobs: Sequence[PendingJob], *, alone: bool = False, busy: bool = False
    ) -> list[PendingJob]:
        """Those of `jobs` that are to be worked on now; the others are answered."""
        self._entry = None
        outcomes: list[_Answered] = []
        while True:
            asked = [job for job in jobs if not any(job is done for done, *_ in outcomes)]
            begin = partial(self._ledger.begin, self.turn, asked, alone=alone, busy=busy)
            go: list[PendingJob] = []
            waiting: list[PendingJob] = []
            answers: list[_Answered] = []
            for job, verdict in zip(asked, await insistently(begin), strict=True):
                answer = self._answer_to(job, verdict)
                if answer is not None:
                    answers.append((job, answer, None))
                elif verdict.what == "wait" or (verdict.what == "go" and waiting):
                    waiting.append(job)  # in order: what comes later waits with it
                elif verdict.what == "go":
                    go.append(job)
            if answers:
                await self._answer(answers)
                outcomes += answers
            if not answers or not go:
                if waiting:
                    self.postponed += waiting
                    self.delay = max(self.delay, _COMES)
                return go
            # Answering ended what was begun.

    def _answer_to(self, job: PendingJob, verdict: Verdict) -> bytes | None:
        """What a job is answered that is not to be worked on."""
        late = 0.0
        if isinstance(job.job, AddJob) and job.job.deadline is not None and job.stored is None:
            late = self._rules.now() - job.job.deadline
        if verdict.what == "known":
            return verdict.outcome
        if verdict.what == "cancelled":
            return _failure(job, never_begun())
        if verdict.what == "stopped":
            return _failure(job, JobCancelled("the job was stopped before it was tried again"))
        if verdict.what in ("go", "wait") and late > 0:
            error = JobExpired(f"the job's deadline passed {late:.1f} s before it could begin")
            return _failure(job, error)
        if verdict.deaths >= _DEATHS:
            deaths = f"{verdict.deaths} workers died while they ran this job and nothing else"
            return _failure(job, WorkerLost(deaths))
        return None

    async def _answer(
        self,
        outcomes: Sequence[_Answered],
        *,
        looked_into: str = "",
        unreadable: Sequence[tuple[str, bytes]] = (),
    ) -> str | None:
        """Answers jobs; see `SlowLedger.finish`. The journal that was found stays until somebody
        has looked into it."""
        turn = self.turn
        self._answers += 1
        number = self._answers
        settled = turn.journal is None or bool(looked_into)
        return await insistently(
            lambda: self._ledger.finish(
                turn,
                number,
                outcomes,
                looked_into=looked_into,
                settled=settled,
                unreadable=unreadable,
            )
        )

    # --- extracting -----------------------------------------------------------------------------

    async def _extract(self, group: Sequence[PendingJob]) -> None:
        async with self._secluded():
            await self._extract_now(group)

    async def _extract_now(self, group: Sequence[PendingJob]) -> None:
        jobs = await self._begin(group, alone=self._alone)
        if not jobs:
            return
        self.extracted = True
        submissions = [_submission(job) for job in jobs]
        ids = [job.id for job in jobs]

        async def journal(intent: dict[str, Any]) -> None:
            if self._stopped or self.lost:
                raise Superseded
            self._storing = True
            entry = {"jobs": ids, "intent": intent}
            if not await insistently(lambda: self._ledger.journal(self.turn, entry)):
                raise Superseded
            self._entry = entry

        done = await self._calling(
            jobs,
            "index" if self._work.indexing else "extract",
            lambda: self._work.extract(submissions, journal, alone=self._alone),
        )
        if isinstance(done, JobError) and self._entry is not None:
            # Something may be stored, or even everything. Before it is tried again, nothing is.
            found = await self._recovering(jobs, submissions, self._entry)
            if isinstance(found, JobError):
                await self._unresolved(jobs, found)
                return
            if found is None and await self._answer([]) is not None:
                raise TurnIsOver
            done = done if found is None else found
        if isinstance(done, JobError):
            await self._failed(jobs, done)
        else:
            await self._stored(jobs, done)

    async def _recovering(
        self,
        jobs: Sequence[PendingJob],
        submissions: Sequence[Submission],
        entry: dict[str, Any],
    ) -> Sequence[Extracted] | JobError | None:
        """Has the extractor look into a journal. Nobody stops it: what it finds must be known."""
        return await self._calling(
            jobs,
            "recover",
            lambda: self._work.recover(submissions, entry["intent"]),
            storing=True,
        )

    async def _failed(self, jobs: Sequence[PendingJob], error: JobError) -> None:
        """Nothing came of extracting jobs together, and nothing of them is stored."""
        hopeless = [job for job in jobs if self._wait(job, error) is None]
        # Of what is unavailable each has had its chances; where there is no order, that is enough.
        passing = isinstance(error, BackendUnavailable) and self._work.indexing
        if len(jobs) > 1 and hopeless and not passing:
            # It may be due to one of them: each is given a chance of its own.
            log.warning("extracting together failed (%s); one by one", type(error).__name__)
            before = len(self.postponed)  # who waits for what is on its way comes later anyway
            for job in jobs:
                if len(self.postponed) > before and not self._work.indexing:
                    return  # in order
                if job in hopeless:
                    await self._extract([job])
                else:
                    self._try_again(job, error)
            return
        for job in jobs:
            if job in hopeless:
                await self._answer([(job, _failure(job, error), None)])
            else:
                self._try_again(job, error)

    async def _unresolved(self, jobs: Sequence[PendingJob], error: JobError) -> None:
        """Nobody knows what is stored of jobs, because looking failed as well."""
        for job in jobs:
            if self._wait(job, error) is None:
                await self._answer([(job, _failure(job, error), None)])
            else:
                self._try_again(job, error)

    async def _stored(
        self, jobs: Sequence[PendingJob], done: Sequence[Extracted | JobError]
    ) -> None:
        """Answers jobs whose memories are stored, and those that failed beside them."""
        for job, each in zip(jobs, done, strict=True):
            if isinstance(each, JobError) and self._wait(job, each) is not None:
                self._try_again(job, each)
        verdict = await self._answer(self._told(jobs, done))
        if verdict is None:
            return
        intent = {} if self._entry is None else self._entry["intent"]
        if verdict == _REDONE and intent and not intent.get(REPEATABLE):
            # Somebody has taken our turn, had not found what we stored, and did it again.
            undone = await self._guarded(lambda: self._work.recover([], intent))
            if isinstance(undone, JobError):
                log.error("memories are stored twice, and cannot be removed: %s", undone)
        raise TurnIsOver

    async def _resume(self, entry: dict[str, Any]) -> bool:
        """Finds out how far the turn before ours came in storing something. Whether to go on."""
        turn = self.turn
        meant = set(entry["jobs"])
        jobs = [job for job in turn.jobs if job.id in meant]
        # If some of them were deleted meanwhile, nothing that was made of all of them shall stay.
        whole = len(jobs) == len(meant)
        submissions = [_submission(job) for job in jobs] if whole else []
        await insistently(lambda: self._ledger.begin(turn, jobs, busy=True))
        outcomes: list[_Answered] = []
        done: Sequence[Extracted] | JobError | None = None
        if turn.begun > SUSPICIOUS + _DEATHS:
            log.error("workers die of looking what an interrupted extraction stored; not looked")
        else:
            async with self._secluded():
                done = await self._recovering(jobs, submissions, entry)
        if isinstance(done, JobError):
            hopeless = [job for job in jobs if self._wait(job, done) is None]
            for job in jobs:
                if job not in hopeless:
                    self._try_again(job, done)
            if self.postponed:
                # Nothing can be done for the user before it is known.
                self.delay = max(self.delay, _RESUME_AGAIN)
                return False
            log.error("what an interrupted extraction left behind is not known: %s", done)
            outcomes = [(job, _failure(job, done), None) for job in jobs]
            done = None
        if done is not None:
            outcomes = self._told(jobs, done)
        looked_into = _REDONE if done is None else _ADOPTED
        if await self._answer(outcomes, looked_into=looked_into) is not None:
            raise TurnIsOver
        turn.journal = None
        if outcomes:
            turn.jobs = [job for job in turn.jobs if job.id not in meant]
        return True

    def _told(
        self, jobs: Sequence[PendingJob], done: Sequence[Extracted | JobError]
    ) -> list[_Answered]:
        """What jobs are told, but for those that are to be tried again."""
        answers: list[_Answered] = []
        for job, each in zip(jobs, done, strict=True):
            if isinstance(each, JobError):
                if job not in self.postponed:
                    answers.append((job, _failure(job, each), None))
                continue
            result = job.stored
            if result is None:
                result = {"record_ids": each.record_ids, "added": each.added, "merged": each.merged}
            repeated = orjson.dumps({"result": {**result, "added": 0}}) if job.again else None
            answers.append((job, orjson.dumps({"result": result}), repeated))
        return answers

    # --- deleting -------------------------------------------------------------------------------

    async def _delete(self, job: PendingJob) -> None:
        async with self._secluded():
            await self._delete_now(job)

    async def _delete_now(self, job: PendingJob) -> None:
        if self.postponed or not await self._begin([job], alone=self._alone, busy=True):
            return
        done = await self._calling(
            [job],
            "delete",
            lambda: self._work.delete(job.job.scope, before_epoch=job.epoch),
            storing=True,
        )
        if isinstance(done, JobError):
            if self._wait(job, done) is not None:
                self._try_again(job, done)
                return
            outcome = _failure(job, done)
        else:
            outcome = orjson.dumps({"result": {"removed": done}})
        if await self._answer([(job, outcome, None)]) is not None:
            raise TurnIsOver

    # --- failing --------------------------------------------------------------------------------

    def _wait(self, job: PendingJob, error: JobError) -> float | None:
        # What is stored shall be found, whether or not anybody still waits to hear of it.
        expires = job.job.deadline if job.stored is None else None
        left = None if expires is None else expires - self._rules.now()
        return self._rules.retries.wait(error, job.attempts + 1, left=left, draw=self._draw)

    def _try_again(self, job: PendingJob, error: JobError) -> None:
        """`error` is such that a later attempt may succeed."""
        wait = self._wait(job, error) or 0.0
        job.attempts += 1
        now = self._rules.now()
        job.history.append({"at": now, "error": _in_words(error)})
        job.due = now + wait
        self.postponed.append(job)
        self.delay = max(self.delay, wait)
        operation = Operation.ADD if isinstance(job.job, AddJob) else Operation.DELETE
        self._rules.meters.put_off(operation, Lane.SLOW, job.job, error)

    def _secluded(self) -> contextlib.AbstractAsyncContextManager[None]:
        """For a part of the turn that is to run alone, if the turn is suspicious."""
        return self._seclusion.alone() if self._alone else contextlib.nullcontext()

    async def _calling(
        self,
        jobs: Sequence[PendingJob],
        doing: str,
        work: Callable[[], Awaitable[T]],
        *,
        storing: bool = False,
    ) -> T | JobError:
        """Calls the extractor in such a way that it can be asked to stop, unless it is `storing`
        something from the beginning."""
        self._storing = storing
        self.running = frozenset(job.id for job in jobs)
        others = contextlib.nullcontext() if self._alone else self._seclusion.among_others()
        try:
            async with others:
                with self._traced(doing, jobs) as done_with:
                    return done_with(await self._guarded(work))
        except asyncio.CancelledError:
            if not self._stopped or self.task.cancelling() != 1:
                raise  # it is the process that is to stop
            self.task.uncancel()
            if self.lost:
                raise TurnIsOver from None
            return JobCancelled("the job was stopped while it ran")
        finally:
            self.running, self._storing, self._stopped = frozenset(), False, False

    @contextlib.contextmanager
    def _traced(
        self, doing: str, jobs: Sequence[PendingJob]
    ) -> Iterator[Callable[[T | JobError], T | JobError]]:
        """The spans of those of `jobs` that are traced, while a call for them lasts, whose outcome
        is to be passed through what this yields."""
        failure: JobError | None = None

        def note(done: T | JobError) -> T | JobError:
            nonlocal failure
            failure = done if isinstance(done, JobError) else None
            return done

        spans, tracer = None, self._rules.tracer
        if tracer is not None:
            spans = tracer.running(
                f"recallq.slow {doing}",
                {each.id: each.job for each in jobs},
                {"recallq.jobs_together": len(jobs)},
            )
        if spans is None:
            yield note
            return
        state, ids = "interrupted", [job.id for job in jobs]
        try:
            with spans.calling(f"{self._work.name}.{doing}", ids) as span:
                yield note
                if span is not None and failure is not None:
                    span.failed(failure.code)
            state = "done" if failure is None else "failed"
        finally:
            for each in ids:
                spans.ended(each, state, None if failure is None else failure.code)

    async def _guarded(self, work: Callable[[], Awaitable[T]]) -> T | JobError:
        """What `work` returns, or the error that its jobs end with. Raises `Superseded`."""
        name = self._work.name
        try:
            async with asyncio.timeout(self._rules.timeout):
                return await work()
        except JobError as error:
            return error
        except Superseded:
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # it is we who are to stop
            return InternalError(f"a call in backend {name} was cancelled from within")
        except TimeoutError:
            return BackendUnavailable(f"{name} did not finish within {self._rules.timeout:g} s")
        except Exception as error:
            # Named, not quoted: what an unexpected error says may hold what users said.
            log.exception("unexpected error in backend %s", name)
            return InternalError(f"{type(error).__name__} in backend {name}; see the worker's log")


def _submission(job: PendingJob) -> Submission:
    add = job.job
    assert isinstance(add, AddJob)  # the callers' lists hold adds only
    return Submission.of(add, job.epoch)


def _failure(job: PendingJob, error: JobError) -> bytes:
    wire = to_wire(error)
    if job.stored is not None:
        wire["message"] = f"stored and listed, but not searchable: {wire['message']}"
    return orjson.dumps(
        {
            "error": wire,
            "attempts": job.attempts + 1,
            "history": job.history,
            "stored": job.stored,
        }
    )


def _in_words(error: JobError) -> str:
    return "{code}: {message}".format_map(to_wire(error))
