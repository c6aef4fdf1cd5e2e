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
from typing import Any, TypeAlias, TypeVar

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
from recallq_worker.slow_ledger import (
    DeleteGoesFirst,
    PendingJob,
    SlowLedger,
    Turn,
    TurnIsOver,
    Verdict,
)

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


_Answered: TypeAlias = tuple[PendingJob, bytes, bytes | None]
"""A job, its outcome, and what comes of it when it is submitted again."""

_ADOPTED, _REDONE = "adopted", "redone"


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
    answers: int = 0
    """How many were written in this turn."""
    extracted: bool = False
    """Whether an extraction was begun in it."""
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
            with contextlib.suppress(DeleteGoesFirst):  # it is due at once
                await self._go_through(active)
            if active.postponed:
                jobs = active.postponed
                await insistently(lambda: self._ledger.postpone(turn, active.delay, jobs))
            else:
                pause = self._pause if active.extracted else 0.0
                await insistently(lambda: self._ledger.release(turn, pause))
        except (TurnIsOver, Superseded):
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
        if active.postponed or (turn.wait > 0 and await self._must_wait(active)):
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

    async def _must_wait(self, active: _Active) -> bool:
        """Whether an add is left that waits for another attempt; those that a delete has fenced off
        are answered now."""
        adds = [job for job in active.turn.jobs if isinstance(job.job, AddJob)]
        left = await self._begin(active, adds, alone=False)
        return bool(active.postponed) or any(job.attempts for job in left)

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
        outcomes: list[_Answered] = []
        while True:
            asked = [job for job in jobs if not any(job is done for done, *_ in outcomes)]
            begin = partial(self._ledger.begin, active.turn, asked, alone=alone, busy=busy)
            go, waiting, answers = [], [], []
            for job, verdict in zip(asked, await insistently(begin), strict=True):
                answer = self._answer_to(job, verdict)
                if answer is not None:
                    answers.append((job, answer, None))
                elif verdict.what == "wait":
                    waiting.append(job)
                elif verdict.what == "go":
                    go.append(job)
            if waiting:
                active.postponed, active.delay, go = waiting, _DELETE_COMES, []
            if not answers:
                return go
            await self._answer(active, answers)
            outcomes += answers
            if not go:
                return []
            # Answering ended what was begun.

    def _answer_to(self, job: PendingJob, verdict: Verdict) -> bytes | None:
        """What a job is answered that is not to be worked on."""
        late = 0.0
        if isinstance(job.job, AddJob) and job.job.deadline is not None:
            late = self._now() - job.job.deadline
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
        active: _Active,
        outcomes: Sequence[_Answered],
        *,
        looked_into: str = "",
        unreadable: Sequence[tuple[str, bytes]] = (),
    ) -> str | None:
        """Answers jobs; see `SlowLedger.finish`. The journal that was found stays until somebody
        has looked into it."""
        turn = active.turn
        active.answers += 1
        number = active.answers
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

    async def _extract(
        self, active: _Active, group: Sequence[PendingJob], *, alone: bool = False
    ) -> None:
        jobs = await self._begin(active, group, alone=alone)
        if not jobs:
            return
        active.extracted = True
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
            found = await self._recovering(active, jobs, submissions, active.entry)
            if isinstance(found, JobError):
                await self._unresolved(active, jobs, found)
                return
            if found is None and await self._answer(active, []) is not None:
                raise TurnIsOver
            done = done if found is None else found
        if isinstance(done, JobError):
            await self._failed(active, jobs, done)
        else:
            await self._stored(active, jobs, done)

    async def _recovering(
        self,
        active: _Active,
        jobs: Sequence[PendingJob],
        submissions: Sequence[Submission],
        entry: dict[str, Any],
    ) -> list[Extracted] | JobError | None:
        """Has the extractor look into a journal. Nobody stops it: what it finds must be known."""
        return await self._calling(
            active,
            jobs,
            lambda: self._extractor.recover(submissions, entry["intent"]),
            storing=True,
        )

    async def _failed(self, active: _Active, jobs: Sequence[PendingJob], error: JobError) -> None:
        """Nothing came of extracting jobs together, and nothing of them is stored."""
        hopeless = [job for job in jobs if self._wait(active, job, error) is None]
        if len(jobs) > 1 and hopeless:
            # It may be due to one of them: each is given a chance of its own.
            log.warning("extracting together failed (%s); one by one", type(error).__name__)
            for job in jobs:
                if active.postponed:
                    return  # in order
                if job in hopeless:
                    await self._extract(active, [job])
                else:
                    self._try_again(active, job, error)
            return
        for job in jobs:
            if job in hopeless:
                await self._answer(active, [(job, _failure(job, error), None)])
            else:
                self._try_again(active, job, error)

    async def _unresolved(
        self, active: _Active, jobs: Sequence[PendingJob], error: JobError
    ) -> None:
        """Nobody knows what is stored of jobs, because looking failed as well."""
        for job in jobs:
            if self._wait(active, job, error) is None:
                await self._answer(active, [(job, _failure(job, error), None)])
            else:
                self._try_again(active, job, error)

    async def _stored(
        self, active: _Active, jobs: Sequence[PendingJob], done: Sequence[Extracted]
    ) -> None:
        """Answers jobs whose memories are stored."""
        verdict = await self._answer(active, _answers(jobs, done))
        if verdict is None:
            return
        if verdict == _REDONE and active.entry is not None:
            # Somebody has taken our turn, had not found what we stored, and did it again.
            intent = active.entry["intent"]
            undone = await self._guarded(lambda: self._extractor.recover([], intent))
            if isinstance(undone, JobError):
                log.error("memories are stored twice, and cannot be removed: %s", undone)
        raise TurnIsOver

    async def _resume(self, active: _Active, entry: dict[str, Any]) -> bool:
        """Finds out how far the turn before ours came in storing something. Whether to go on."""
        turn = active.turn
        meant = set(entry["jobs"])
        jobs = [job for job in turn.jobs if job.id in meant]
        # If some of them were deleted meanwhile, nothing that was made of all of them shall stay.
        whole = len(jobs) == len(meant)
        submissions = [_submission(job) for job in jobs] if whole else []
        await insistently(lambda: self._ledger.begin(turn, jobs, busy=True))
        outcomes: list[_Answered] = []
        done: list[Extracted] | JobError | None = None
        if turn.begun > _SUSPICIOUS + _DEATHS:
            log.error("workers die of looking what an interrupted extraction stored; not looked")
        else:
            done = await self._recovering(active, jobs, submissions, entry)
        if isinstance(done, JobError):
            hopeless = [job for job in jobs if self._wait(active, job, done) is None]
            for job in jobs:
                if job not in hopeless:
                    self._try_again(active, job, done)
            if active.postponed:
                # Nothing can be done for the user before it is known.
                active.delay = max(active.delay, _RESUME_AGAIN)
                return False
            log.error("what an interrupted extraction left behind is not known: %s", done)
            outcomes = [(job, _failure(job, done), None) for job in jobs]
            done = None
        if done is not None:
            outcomes = _answers(jobs, done)
        looked_into = _REDONE if done is None else _ADOPTED
        if await self._answer(active, outcomes, looked_into=looked_into) is not None:
            raise TurnIsOver
        turn.journal = None
        if outcomes:
            turn.jobs = [job for job in turn.jobs if job.id not in meant]
        return True

    # --- deleting -------------------------------------------------------------------------------

    async def _delete(self, active: _Active, job: PendingJob, *, alone: bool) -> None:
        if active.postponed or not await self._begin(active, [job], alone=alone, busy=True):
            return
        done = await self._calling(
            active,
            [job],
            lambda: self._extractor.delete(job.job.scope, before_epoch=job.epoch),
            storing=True,
        )
        if isinstance(done, JobError):
            if self._wait(active, job, done) is not None:
                self._try_again(active, job, done)
                return
            outcome = _failure(job, done)
        else:
            outcome = orjson.dumps({"result": {"removed": done}})
        if await self._answer(active, [(job, outcome, None)]) is not None:
            raise TurnIsOver

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
        self,
        active: _Active,
        jobs: Sequence[PendingJob],
        work: Callable[[], Awaitable[T]],
        *,
        storing: bool = False,
    ) -> T | JobError:
        """Calls the extractor in such a way that it can be asked to stop, unless it is `storing`
        something from the beginning."""
        active.storing = storing
        active.running = frozenset(job.id for job in jobs)
        try:
            return await self._guarded(work)
        except asyncio.CancelledError:
            if not active.stopped or active.task.cancelling() != 1:
                raise  # it is the process that is to stop
            active.task.uncancel()
            if active.lost:
                raise TurnIsOver from None
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


def _answers(jobs: Sequence[PendingJob], done: Sequence[Extracted]) -> list[_Answered]:
    answers: list[_Answered] = []
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
