"""The slow lane: extractions and deletes, one at a time per user, many users at once.

A worker that has the slow lane takes up users who are due, as many as it may at once, each in a
task of its own on the process's loop. So an LLM that takes seconds holds no slot that a search
needs, and no user waits for another. Of one user everything happens in order: deletes first (what
they concern is gone by then), then the adds, those that may be extracted together in as few calls
as the token budget allows.

What is at stake when something fails, is with `recallq_worker.slow_ledger`: nothing here needs to
survive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import orjson

from recallq.contract import AddJob, never_begun
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
from recallq.redis_client import COMMAND_TIMEOUT, LOST
from recallq_worker.backends.base import Extracted, MemoryExtractor, Submission, Superseded
from recallq_worker.insistence import insistently
from recallq_worker.ledger import RENEW_EVERY
from recallq_worker.retries import RetryPolicy
from recallq_worker.slow_ledger import PendingJob, SlowLedger, Turn

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_EVERY = 0.1
"""Seconds after which a worker with room looks for users again, if nobody tells it before."""
_SUSPICIOUS = 2
"""Turns that did not come to an end after which a user's jobs are worked on one by one."""
_DEATHS = 3
"""Workers that a job may take with it, alone, before it is given up."""
_RESUME_AGAIN = 5.0
"""Seconds between two tries to find out what an interrupted extraction left behind."""
_DELETE_COMES = 0.3
"""Seconds between two looks whether a delete that is on its way has come."""
_FAREWELL = 3.0
"""Seconds that handing turns back may take when the process stops."""


@dataclass(slots=True)
class _Active:
    """A turn that is worked on here."""

    turn: Turn
    task: asyncio.Task[None]
    running: frozenset[str] = frozenset()
    """Jobs that the call which runs now is about."""
    storing: bool = False
    """Whether it may have begun to store something."""
    lost: bool = False
    """Whether it is somebody else's turn by now."""
    stopped: bool = False
    """Whether it was asked to stop."""
    entry: dict[str, Any] | None = None
    """What the journal says of the latest extraction: that something was stored, perhaps."""
    postponed: list[PendingJob] = field(default_factory=list)
    """Jobs to be tried again."""
    delay: float = 0.0
    """Seconds until then."""
    draw: float = field(default_factory=random.random)


class SlowLane:
    """The part that one worker process has in the slow lane."""

    def __init__(
        self,
        extractor: MemoryExtractor,
        ledger: SlowLedger,
        retries: RetryPolicy,
        *,
        now: Callable[[], float],
        users_at_once: int,
        token_budget: int,
        timeout: float,
        pause: float,
    ) -> None:
        """`timeout` in seconds: the longest that one call of the extractor may take; `pause`: for
        how long adds that are left after a turn wait for others."""
        self._extractor = extractor
        self._ledger = ledger
        self._retries = retries
        self._now = now
        self._users_at_once = users_at_once
        self._token_budget = token_budget
        self._timeout = timeout
        self._pause = pause
        self._active: dict[str, _Active] = {}
        self._news = asyncio.Event()
        self._stopping = False

    def look(self, delay: float = 0.0) -> None:
        """Says that somebody will be due, in `delay` seconds."""
        asyncio.get_running_loop().call_later(delay, self._news.set)

    async def work(self) -> None:
        """Takes up users and keeps their leases; for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take_up())
            group.create_task(self._keep_leases())

    async def stop(self, patience: float = 0.0) -> None:
        """Takes up nobody any more, and hands back what has not come to its end after `patience`
        seconds; what cannot be handed back in time is found by others."""
        self._stopping = True
        for wait in (patience, _FAREWELL + 1):
            tasks = [each.task for each in self._active.values()]
            if tasks and wait:
                await asyncio.wait(tasks, timeout=wait)
            for each in self._active.values():
                each.task.cancel()

    async def _take_up(self) -> None:
        while True:
            wait: float | None = None
            self._news.clear()
            room = self._users_at_once - len(self._active)
            if room > 0 and not self._stopping:
                try:
                    async with asyncio.timeout(COMMAND_TIMEOUT):
                        wait, turns = await self._ledger.take(room)
                except LOST as error:
                    log.debug("cannot look into the slow lane: %s", type(error).__name__)
                    await asyncio.sleep(0.5)
                    continue
                for turn in turns:
                    self._overtake(turn)
                    task = asyncio.create_task(self._have(turn))
                    self._active[turn.token] = _Active(turn, task)
            nap = _LOOK_EVERY * random.uniform(0.7, 1.0)  # noqa: S311  # not all at one moment
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(nap if wait is None else min(wait, nap)):
                    await self._news.wait()

    def _overtake(self, turn: Turn) -> None:
        """Stops what still runs here for a user whose turn has begun anew."""
        for each in self._active.values():
            if each.turn.tag == turn.tag:
                each.lost = True
                self._interrupt(each)

    @staticmethod
    def _interrupt(active: _Active) -> None:
        """Stops the call that runs, unless it may be storing something: then it finds out later."""
        if active.running and not active.storing and not active.stopped:
            active.stopped = True
            active.task.cancel()

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY)
            active = list(self._active.values())
            if not active:
                continue
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    told = await self._ledger.renew([each.turn for each in active])
            except LOST as error:
                log.warning("cannot renew leases yet: %s", type(error).__name__)
                continue
            for each, stop in zip(active, told, strict=True):
                each.lost = each.lost or stop is None
                if each.lost or each.running <= (stop or frozenset()):
                    self._interrupt(each)

    # --- one turn -------------------------------------------------------------------------------

    async def _have(self, turn: Turn) -> None:
        """Works on a user's jobs until they are done, or something fails."""
        active = self._active[turn.token]
        try:
            await self._go_through(active)
            if active.postponed:
                jobs = active.postponed
                await insistently(lambda: self._ledger.postpone(turn, active.delay, jobs))
            else:
                await insistently(lambda: self._ledger.release(turn, self._pause))
        except Superseded:
            log.info("a turn in the slow lane was taken over")
        except asyncio.CancelledError:
            # The process ends: another shall go on, at once.
            with contextlib.suppress(*LOST):
                async with asyncio.timeout(_FAREWELL):
                    await self._ledger.release(turn)
            raise
        except Exception:
            # Nothing is lost: the lease runs out, and another takes the user up.
            log.exception("a defect in the slow lane")
        finally:
            del self._active[turn.token]
            self._news.set()

    async def _go_through(self, active: _Active) -> None:
        turn = active.turn
        alone = turn.begun > _SUSPICIOUS
        for job in turn.jobs:
            if not isinstance(job.job, AddJob):
                await self._delete(active, job, alone=alone)
        if active.postponed:
            return
        if turn.journal is not None and not await self._resume(active, turn.journal):
            return
        if turn.unreadable:
            error = to_wire(UndecodableJob("the job was written by another version of RecallQ"))
            outcomes = [(job, orjson.dumps({"error": error})) for job in turn.unreadable]
            await self._answer(active, [], unreadable=outcomes)
        adds = [job for job in turn.jobs if isinstance(job.job, AddJob)]
        for group in [[job] for job in adds] if alone else self._grouped(adds, turn.deletion):
            if active.postponed:
                return  # in order: what comes later waits with it
            await self._extract(active, group, alone=alone)

    def _grouped(self, jobs: Iterable[PendingJob], deletion: int) -> list[list[PendingJob]]:
        """The jobs in groups to be extracted together, within the token budget.

        What a delete concerns that is on its way yet, and what came after it, go apart.
        """
        groups: list[list[PendingJob]] = []
        current: dict[Hashable, tuple[list[PendingJob], set[str], int]] = {}
        for job in jobs:
            submission = _submission(job)
            key = (self._extractor.group(submission), job.epoch < deletion)
            size = self._extractor.tokens(submission)
            group, seen, total = current.get(key, ([], set(), 0))
            # What was submitted twice is not extracted twice: the second finds what came of it.
            if not group or total + size > self._token_budget or job.again in seen:
                group, seen, total = [], set(), 0
                groups.append(group)
            group.append(job)
            if job.again:
                seen.add(job.again)
            current[key] = group, seen, total + size
        return groups

    async def _begin(
        self, active: _Active, jobs: Sequence[PendingJob], *, alone: bool, busy: bool = False
    ) -> list[PendingJob]:
        """Those of `jobs` that are to be worked on now; the others are answered."""
        active.entry = None
        outcomes: list[tuple[PendingJob, bytes, bytes | None]] = []
        on_time = []
        for job in jobs:
            late = 0.0 if job.job.deadline is None else self._now() - job.job.deadline
            if late > 0:
                error = JobExpired(f"the job's deadline passed {late:.1f} s before it could begin")
                outcomes.append((job, _failure(job, error), None))
            else:
                on_time.append(job)
        go, waiting = [], []
        begin = partial(self._ledger.begin, active.turn, on_time, alone=alone, busy=busy)
        verdicts = await insistently(begin)
        if verdicts is None:
            raise Superseded
        for job, verdict in zip(on_time, verdicts, strict=True):
            if verdict.what == "known":
                outcomes.append((job, verdict.outcome, None))
            elif verdict.what == "cancelled":
                outcomes.append((job, _failure(job, never_begun()), None))
            elif verdict.deaths >= _DEATHS:
                lost = WorkerLost(
                    f"{verdict.deaths} workers died while they ran this job and nothing else"
                )
                outcomes.append((job, _failure(job, lost), None))
            elif verdict.what == "wait":
                waiting.append(job)
            elif verdict.what == "go":
                go.append(job)
        if waiting:
            active.postponed, active.delay, go = waiting, _DELETE_COMES, []
        if outcomes:
            await self._answer(active, outcomes)
            if go:  # answering ends what was begun
                await insistently(
                    lambda: self._ledger.begin(active.turn, go, alone=alone, busy=busy)
                )
        return go

    async def _answer(
        self,
        active: _Active,
        outcomes: Sequence[tuple[PendingJob, bytes, bytes | None]],
        *,
        adopted: str = "",
        settled: bool | None = None,
        unreadable: Sequence[tuple[str, bytes]] = (),
    ) -> str | None:
        """`settled` is False, unless said otherwise, while nobody has looked into the journal that
        was found."""
        turn = active.turn
        settled = turn.journal is None if settled is None else settled
        return await insistently(
            lambda: self._ledger.finish(
                turn, outcomes, adopted=adopted, settled=settled, unreadable=unreadable
            )
        )

    # --- extracting -----------------------------------------------------------------------------

    async def _extract(
        self, active: _Active, group: Sequence[PendingJob], *, alone: bool = False
    ) -> None:
        jobs = await self._begin(active, group, alone=alone)
        if not jobs:
            return
        submissions = [_submission(job) for job in jobs]
        ids = [job.id for job in jobs]

        async def journal(intent: dict[str, Any]) -> None:
            if active.stopped or active.lost:
                raise Superseded
            active.storing = True
            entry = {"jobs": ids, "intent": intent}
            if not await insistently(lambda: self._ledger.journal(active.turn, entry)):
                raise Superseded
            active.entry = entry

        done = await self._calling(
            active, jobs, lambda: self._extractor.extract(submissions, journal)
        )
        if isinstance(done, JobError) and active.entry is not None:
            # Something may be stored, or even everything. Before it is tried again, nothing is.
            intent = active.entry["intent"]
            found = await self._calling(
                active, jobs, lambda: self._extractor.recover(submissions, intent)
            )
            if isinstance(found, JobError):
                for job in jobs:
                    self._try_again(active, job, found)
                return
            if found is None and await self._answer(active, []) is not None:
                raise Superseded
            done = done if found is None else found
        if not isinstance(done, JobError):
            await self._stored(active, jobs, done)
            return
        await self._failed(active, jobs, done)

    async def _failed(self, active: _Active, jobs: Sequence[PendingJob], error: JobError) -> None:
        """Nothing came of extracting jobs together, and nothing of them is stored."""
        hopeless = [job for job in jobs if self._wait(active, job, error) is None]
        if len(jobs) > 1 and hopeless:
            # It may be due to one of them: each is given a chance of its own.
            log.warning("extracting together failed (%s); one by one", type(error).__name__)
            for job in hopeless:
                await self._extract(active, [job])
        elif hopeless:
            await self._answer(active, [(jobs[0], _failure(jobs[0], error), None)])
        for job in jobs:
            if job not in hopeless:
                self._try_again(active, job, error)

    async def _stored(
        self, active: _Active, jobs: Sequence[PendingJob], done: Sequence[Extracted]
    ) -> None:
        """Answers jobs whose memories are stored."""
        verdict = await self._answer(active, _answers(jobs, done))
        if verdict is None:
            return
        if verdict != f"{active.turn.token}:adopted" and active.entry is not None:
            # Somebody has taken our turn, has not found what we stored, and does it again.
            intent = active.entry["intent"]
            await self._guarded(lambda: self._extractor.recover([], intent))
        raise Superseded

    async def _resume(self, active: _Active, entry: dict[str, Any]) -> bool:
        """Finds out how far the turn before ours came in storing something. Whether to go on."""
        turn = active.turn
        meant = set(entry["jobs"])
        jobs = [job for job in turn.jobs if job.id in meant]
        # If some of them were deleted meanwhile, nothing that was made of all of them shall stay.
        whole = len(jobs) == len(meant)
        submissions = [_submission(job) for job in jobs] if whole else []
        if await insistently(lambda: self._ledger.begin(turn, jobs, busy=True)) is None:
            raise Superseded
        done = await self._calling(
            active, jobs, lambda: self._extractor.recover(submissions, entry["intent"])
        )
        if isinstance(done, BackendUnavailable):
            # Not a failure of the jobs; but nothing can be done for the user before that is known.
            active.postponed, active.delay = turn.jobs, done.retry_after or _RESUME_AGAIN
            return False
        if isinstance(done, JobError):
            log.error("what an interrupted extraction left behind is not known: %s", done)
            done = None
        outcomes = _answers(jobs, done) if done is not None else []
        adopted = turn.journal_token if done is not None else ""
        if await self._answer(active, outcomes, adopted=adopted, settled=True) is not None:
            raise Superseded
        turn.journal = None
        if outcomes:
            turn.jobs = [job for job in turn.jobs if job.id not in meant]
        return True

    # --- deleting -------------------------------------------------------------------------------

    async def _delete(self, active: _Active, job: PendingJob, *, alone: bool) -> None:
        if active.postponed or not await self._begin(active, [job], alone=alone, busy=True):
            return
        active.storing = True
        done = await self._calling(
            active, [job], lambda: self._extractor.delete(job.job.scope, before_epoch=job.epoch)
        )
        if isinstance(done, JobError):
            if self._wait(active, job, done) is not None:
                self._try_again(active, job, done)
                return
            outcome = _failure(job, done)
        else:
            outcome = orjson.dumps({"result": {"removed": done}})
        if await self._answer(active, [(job, outcome, None)]) is not None:
            raise Superseded

    # --- failing --------------------------------------------------------------------------------

    def _wait(self, active: _Active, job: PendingJob, error: JobError) -> float | None:
        left = None if job.job.deadline is None else job.job.deadline - self._now()
        return self._retries.wait(error, job.attempts + 1, left=left, draw=active.draw)

    def _try_again(self, active: _Active, job: PendingJob, error: JobError) -> None:
        """`error` is such that a later attempt may succeed."""
        wait = self._wait(active, job, error) or 0.0
        job.attempts += 1
        job.history.append({"at": self._now(), "error": _in_words(error)})
        active.postponed.append(job)
        active.delay = max(active.delay, wait)

    async def _calling(
        self, active: _Active, jobs: Sequence[PendingJob], work: Callable[[], Awaitable[T]]
    ) -> T | JobError:
        """Calls the extractor in such a way that it can be asked to stop."""
        active.running = frozenset(job.id for job in jobs)
        try:
            return await self._guarded(work)
        except asyncio.CancelledError:
            if not active.stopped or active.task.cancelling() != 1:
                raise  # it is the process that is to stop
            active.task.uncancel()
            if active.lost:
                raise Superseded from None
            return JobCancelled("the job was stopped while it ran")
        finally:
            active.running, active.storing, active.stopped = frozenset(), False, False

    async def _guarded(self, work: Callable[[], Awaitable[T]]) -> T | JobError:
        """What `work` returns, or the error that its jobs end with. Raises `Superseded`."""
        name = self._extractor.name
        try:
            async with asyncio.timeout(self._timeout):
                return await work()
        except JobError as error:
            return error
        except Superseded:
            raise
        except TimeoutError:
            return BackendUnavailable(f"{name} did not finish within {self._timeout:g} s")
        except Exception as error:
            # Named, not quoted: what an unexpected error says may hold what users said.
            log.exception("unexpected error in backend %s", name)
            return InternalError(f"{type(error).__name__} in backend {name}; see the worker's log")


def _submission(job: PendingJob) -> Submission:
    add = job.job
    assert isinstance(add, AddJob)  # the callers' lists hold adds only
    return Submission.of(add, job.epoch)


def _answers(
    jobs: Sequence[PendingJob], done: Sequence[Extracted]
) -> list[tuple[PendingJob, bytes, bytes | None]]:
    answers: list[tuple[PendingJob, bytes, bytes | None]] = []
    for job, each in zip(jobs, done, strict=True):
        result = {"record_ids": each.record_ids, "added": each.added, "merged": each.merged}
        repeated = orjson.dumps({"result": {**result, "added": 0}}) if job.again else None
        answers.append((job, orjson.dumps({"result": result}), repeated))
    return answers


def _failure(job: PendingJob, error: JobError) -> bytes:
    return orjson.dumps(
        {"error": to_wire(error), "attempts": job.attempts + 1, "history": job.history}
    )


def _in_words(error: JobError) -> str:
    return "{code}: {message}".format_map(to_wire(error))
