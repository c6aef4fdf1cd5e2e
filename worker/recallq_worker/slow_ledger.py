"""What the slow lane keeps in Redis: who waits, whose turn it is, and how far that went.

Writes to a backend that extracts memories are handed over by their batch (`park`) and wait, each
user's by themselves and in order. A worker takes up a user under a lease with a fencing token: a
token that is not the last given for the user changes nothing any more. What came of a job is
written into its batch in the ledger, and the batch is pushed, to be answered as any other.

Adds that are stored and not yet searchable take the same way. Among them there is no order to keep,
so those of a batch stay together, whosever they are: what is said here of a user and a hash tag
holds for such a batch and its own.

Everything a crash may fall between is one script. Of a user, by hash tag (see `recallq.keys`):

    slow      when somebody may take up the user: after a pause for others to join, at the end of
              the lease, when another attempt is due; `indexing` is the same for stored adds, which
              another kind of backend must not take for adds to extract
    slow-tokens    the last token given;  :heard  when a worker last asked for users, or renewed a
              lease;  :spare  until when nobody is taken from a worker, for Redis was away
    coming    adds that were submitted, and are not here yet: what was submitted later waits for
              them, but not for ever, nor for what another lane is behind with
    deleting  the same of deletes, by their epochs: an add that was submitted before waits for one
              that may be about to remove what came of it
    waiting   job ids in order: deletes by their epoch (ms), which is below the order key (µs) of
              any add, so they come first; what they concern is gone by then
    pending   job id -> job;  job id and "+" -> earlier attempts
    turn      t token   w worker, while there is one   d turns begun since one last came to an end
              r the jobs worked on now   x set while they must not be disturbed
              j token and journal of what is being stored   b until when adds wait for another try
              o the batch that an add waits for which was submitted before, and since when
              l the place of the first add that has come since the turn began
              k<job> how often it died alone, and the token of the turn that counted last
              v the newest version of the protocol in which something is written here, if it is not
              the first: workers that do not speak it leave the user to others
    turn:f<token>  the last of a turn's answers that was written
    turn:v<token>  what a later turn made of the journal of this one: adopted, or redone
    done      what came of an add that may be submitted again, with its epoch
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from recallq import contract
from recallq.contract import DEFAULT_SESSION, AddJob, AnyBatch, DeleteJob
from recallq.keys import Keys, escape
from recallq.redis_client import RedisClient
from recallq_worker import slow_scripts as scripts
from recallq_worker.ledger import LEASE, NextRun, WorkerLedger

log = logging.getLogger(__name__)

_LOOK_AGAIN = 600.0
"""Seconds after which, about, a batch is looked after whose jobs are in the slow lane. It is pushed
when one of them is done; this is for what nobody has thought of."""
_REMEMBERED = 30 * 24 * 3600
"""Seconds for which it is remembered what came of an add that may be submitted again."""
_NOT_BRIEF = 2
_MOST_BYTES = 4 * 1024 * 1024
"""What one turn takes up of a user at most, about."""
_MOST_BYTES_ALTOGETHER = 16 * 1024 * 1024
"""What one look takes up of all users, about: Redis does nothing else meanwhile."""
SUSPICIOUS = 2
"""Turns that did not come to an end after which jobs are worked on one by one."""


class TurnIsOver(Exception):
    """Somebody else has taken up the user."""


class DeleteGoesFirst(Exception):
    """A delete has come, and goes before what was to begin."""


@dataclass(frozen=True, slots=True)
class Handover:
    """A job that a batch hands over to the slow lane."""

    index: int
    job: AddJob | DeleteJob
    epoch: int
    pause: float
    """Seconds for which others may join before it is worked on."""
    stored: dict[str, Any] | None = None
    """Of an add that is stored, and to be made searchable: what came of it."""
    again: bool = False
    """Whether it was handed over before, most likely."""

    @property
    def kind(self) -> str:
        """As the scripts call it."""
        if isinstance(self.job, DeleteJob):
            return "d"
        return "a" if self.stored is None else "i"

    @property
    def again_id(self) -> str:
        """What is the same when it is submitted once more; empty if nothing can be, or if stores
        see to it."""
        return _again_id(self.job, self.stored)


@dataclass(eq=False, slots=True)
class PendingJob:
    """A job in the slow lane."""

    id: str
    job: AddJob | DeleteJob
    epoch: int
    stored: dict[str, Any] | None = None
    """Of an add that is stored, and to be made searchable: what came of it."""
    attempts: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    """Earlier attempts, oldest first: ``at``, ``error``."""
    due: float = 0.0
    """When the next attempt is, in seconds since the epoch."""

    @property
    def again(self) -> str:
        """As `Handover.again_id`."""
        return _again_id(self.job, self.stored)


@dataclass(slots=True)
class Turn:
    """A user whom this worker has taken up."""

    tag: str
    token: str
    begun: int
    """Turns begun for the user since one last came to an end, this one included."""
    deletion: int
    """Epoch of the user's last deletion that was submitted, and may be on its way yet."""
    wait: float
    """Seconds that adds have yet to wait for another attempt."""
    journal: dict[str, Any] | None
    """What the one before was storing when it was interrupted."""
    journal_token: str
    jobs: list[PendingJob]
    unreadable: list[str] = field(default_factory=list)
    """Ids of jobs that another version wrote."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a look into the slow lane brought."""

    wait: float | None
    """Seconds until the next user is due; None if there is none."""
    newest: int
    """The newest version of the protocol among users who were left to newer workers; 0 if nobody
    was."""
    turns: list[Turn]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a job whose turn it is."""

    what: str
    """``go``, ``gone`` (nobody waits for it any more), ``cancelled``, ``stopped`` (it ran before),
    ``known``, or ``wait``: for an add that was submitted before, or because it is known and a
    delete is on its way that may concern what came of it."""
    outcome: bytes = b""
    """What came of it before, of one that is known."""
    deaths: int = 0
    """How often a worker died while it ran this job alone."""


class SlowLedger:
    """The slow lane's state, as one worker process uses it. Errors are redis-py's."""

    def __init__(
        self, redis: RedisClient, keys: Keys, ledger: WorkerLedger, *, indexing: bool = False
    ) -> None:
        """`indexing`: whether adds are taken up that are stored, to be made searchable."""
        self._keys = keys
        self._ledger = ledger
        self._redis = redis
        self._take = redis.register_script(scripts.TAKE)
        self._park = redis.register_script(scripts.PARK)
        self._begin = redis.register_script(scripts.BEGIN)
        self._journal = redis.register_script(scripts.JOURNAL)
        self._finish = redis.register_script(scripts.FINISH)
        self._postpone = redis.register_script(scripts.POSTPONE)
        self._release = redis.register_script(scripts.RELEASE)
        self._renew = redis.register_script(scripts.RENEW)
        self._refused = redis.register_script(scripts.REFUSED)
        mine = keys.indexing if indexing else keys.slow
        ours = [keys.delayed, keys.held, mine, keys.slow_tokens]
        self._script_keys = [*ours, keys.coming(""), keys.slow, keys.indexing, keys.deleting("")]
        prefixes = (keys.waiting(""), keys.pending(""), keys.turn(""), keys.epochs_of(""))
        self._common = [*ledger.script_arguments, *prefixes, keys.done("")[:-1]]

    async def park(
        self, batch: AnyBatch, jobs: Sequence[Handover], next_run: NextRun | None = None
    ) -> bool:
        """Hands over jobs of a batch that runs here, all or none, and ends its run.

        `next_run` is for jobs beside them that are to be tried again. False if the batch is not
        ours any more. Repeating it changes nothing.
        """
        look_again = int(_LOOK_AGAIN * 1000 * random.uniform(0.8, 1.2))  # noqa: S311  # spreads load
        later = ["", "", ""] if next_run is None else next_run.arguments()
        known = any(each.again for each in jobs)
        for brief in (True, False) if known else (False,):
            args = [part for each in jobs for part in self._handover(batch, each, brief=brief)]
            verdict, pushed = await self._park(
                keys=self._script_keys,
                args=[
                    *self._common,
                    batch.id,
                    self._ledger.worker_id,
                    look_again,
                    *later,
                    contract.PROTOCOL_VERSION,
                    *args,
                ],
            )
            await self._ledger.push(pushed)
            if verdict != _NOT_BRIEF:
                break
        return bool(verdict)

    def _handover(
        self, batch: AnyBatch, handover: Handover, *, brief: bool
    ) -> list[str | int | bytes]:
        job, scope = handover.job, handover.job.scope
        session, kind = _session_of(job), handover.kind
        header = f"{kind}|{handover.epoch}|{batch.id}|{handover.index}|{escape(session)}\n"
        item = header.encode()
        if handover.stored is not None:
            item += orjson.dumps(handover.stored) + b"\n"
        return [
            handover.index,
            job.id,
            self._keys.user_tag(scope.tenant, scope.user_id)
            if handover.stored is None
            else self._keys.batch_tag(batch.id),
            kind,
            job.order if isinstance(job, AddJob) else handover.epoch,
            handover.epoch,
            session,
            int(handover.pause * 1000),
            handover.again_id,
            b"" if brief and handover.again else item + job.model_dump_json().encode(),
        ]

    async def refused(self, job: AddJob | DeleteJob) -> None:
        """Says that a write does not come to the slow lane: nobody waits for it any more."""
        scope = job.scope
        tag = self._keys.user_tag(scope.tenant, scope.user_id)
        args = [*self._common, tag, job.id, _session_of(job)]
        await self._refused(keys=self._script_keys, args=args)

    async def take(self, most: int, most_jobs: int) -> Taken:
        """Takes up to `most` users who are due, with the first of their jobs each."""
        wait, newest, turns = await self._take(
            keys=self._script_keys,
            args=[
                *self._common,
                self._ledger.worker_id,
                int(LEASE * 1000),
                most,
                most_jobs,
                _MOST_BYTES,
                _MOST_BYTES_ALTOGETHER,
                SUSPICIOUS + 1,
                contract.PROTOCOL_VERSION,
            ],
        )
        return Taken(
            None if wait < 0 else float(wait) / 1000, newest, [_turn(*each) for each in turns]
        )

    async def begin(
        self, turn: Turn, jobs: Sequence[PendingJob], *, alone: bool = False, busy: bool = False
    ) -> list[Verdict]:
        """Begins work on jobs of a user, and on nothing else; says of each whether to go on.

        `alone`: remember who it was if this process dies of it. `busy`: no delete shall interrupt.
        Raises `TurnIsOver`, and `DeleteGoesFirst` unless `busy`.
        """
        args: list[str] = []
        for each in jobs:
            args += [each.id, _session_of(each.job), each.again]
        said = await self._begin(
            keys=self._script_keys,
            args=[
                *self._common,
                turn.tag,
                turn.token,
                "1" if alone else "0",
                "1" if busy else "0",
                *args,
            ],
        )
        if isinstance(said, int):
            raise DeleteGoesFirst if said else TurnIsOver
        return [_verdict(*each) for each in said]

    async def journal(self, turn: Turn, intent: Mapping[str, Any]) -> bool:
        """Notes what is about to be stored; False if it is not our turn any more."""
        args: list[str | bytes] = [*self._common, turn.tag, turn.token, orjson.dumps(intent)]
        return bool(await self._journal(keys=self._script_keys, args=args))

    async def finish(
        self,
        turn: Turn,
        number: int,
        outcomes: Sequence[tuple[PendingJob, bytes, bytes | None]],
        *,
        looked_into: str = "",
        settled: bool = True,
        unreadable: Sequence[tuple[str, bytes]] = (),
    ) -> str | None:
        """Answers jobs: of each its outcome, and what is to come of it when it is submitted again.

        It is answer `number` of the turn, from 1: asked once more, after a lost reply, it is not
        given twice. `looked_into` tells what became of the journal that the turn found: ``adopted``
        or ``redone``. `settled`: whether the journal speaks of nothing that is open any more.
        Returns None once that is written; if it is not our turn any more, what another has made of
        our journal, as far as it is known.
        """
        args: list[str | int | bytes] = []
        for job, outcome, repeated in outcomes:
            again = "" if repeated is None else job.again
            args += [job.id, outcome, again, job.epoch, repeated or b""]
        for job_id, outcome in unreadable:
            args += [job_id, outcome, "", 0, b""]
        written, verdict, pushed = await self._finish(
            keys=self._script_keys,
            args=[
                *self._common,
                turn.tag,
                turn.token,
                number,
                turn.journal_token if looked_into else "",
                looked_into,
                _REMEMBERED,
                "1" if settled else "0",
                *args,
            ],
        )
        await self._ledger.push(pushed)
        return None if written else cast("bytes", verdict).decode()

    async def postpone(self, turn: Turn, delay: float, jobs: Iterable[PendingJob]) -> None:
        """Ends a turn, for another attempt in `delay` seconds."""
        args: list[str | int | bytes] = []
        for job in jobs:
            tried = {"attempts": job.attempts, "history": job.history, "due": job.due}
            args += [job.id, orjson.dumps(tried)]
        await self._postpone(
            keys=self._script_keys,
            args=[*self._common, turn.tag, turn.token, int(delay * 1000), *args],
        )

    async def release(self, turn: Turn, pause: float = 0.0) -> None:
        """Ends a turn. What is left of the user's adds may be taken up after `pause` seconds."""
        args: list[str | int] = [*self._common, turn.tag, turn.token, int(pause * 1000)]
        await self._release(keys=self._script_keys, args=args)

    async def renew(self, turns: Sequence[Turn]) -> list[frozenset[str] | None]:
        """Keeps the leases of turns. Returns of each the jobs that are asked to stop, None for one
        that is not ours any more."""
        args: list[str | int] = [int(LEASE * 1000)]
        for turn in turns:
            args += [turn.tag, turn.token]
        told = await self._renew(keys=self._script_keys, args=[*self._common, *args])
        return [
            None if each == b"-" else frozenset(filter(None, each.decode().split(",")))
            for each in told
        ]


def _session_of(job: AddJob | DeleteJob) -> str:
    """Where an add goes, or what a delete is about: "" for all of the user's."""
    return job.scope.session_id or ("" if isinstance(job, DeleteJob) else DEFAULT_SESSION)


def _again_id(job: AddJob | DeleteJob, stored: dict[str, Any] | None) -> str:
    if isinstance(job, DeleteJob) or stored is not None:
        return ""
    return job.again or ""


def _turn(
    tag: bytes,
    token: bytes,
    begun: int,
    deletion: bytes,
    wait: int,
    journal: bytes,
    jobs: list[tuple[bytes, bytes, bytes]],
) -> Turn:
    before, _, intent = journal.partition(b" ")
    try:
        entry = orjson.loads(intent) if intent else None
    except ValueError:
        log.exception("a journal of the slow lane cannot be read")
        entry = None
    turn = Turn(
        tag.decode(),
        token.decode(),
        begun,
        int(deletion),
        wait / 1000,
        entry,
        before.decode(),
        [],
    )
    for job_id, item, tried in jobs:
        try:
            turn.jobs.append(_pending(job_id.decode(), item, tried))
        except ValueError:
            turn.unreadable.append(job_id.decode())
    return turn


def _pending(job_id: str, item: bytes, tried: bytes) -> PendingJob:
    """Raises ValueError for what cannot be read."""
    header, _, body = item.partition(b"\n")
    kind, epoch, *_ = header.decode().split("|")
    stored: dict[str, Any] | None = None
    if kind == "i":
        before, _, body = body.partition(b"\n")
        stored = _object(before)
    job: AddJob | DeleteJob
    job = (DeleteJob if kind == "d" else AddJob).model_validate_json(body)
    pending = PendingJob(job_id, job, int(epoch), stored)
    if tried:
        match {"due": 0.0, **_object(tried)}:
            case {
                "attempts": int() as attempts,
                "history": list() as history,
                "due": int() | float() as due,
            }:
                pending.attempts, pending.history, pending.due = attempts, history, due
            case _:
                raise ValueError("its earlier tries cannot be read")
    return pending


def _object(value: bytes) -> dict[str, Any]:
    found = orjson.loads(value)
    if not isinstance(found, dict):
        raise ValueError("no object")  # noqa: TRY004  # what is read is wrong, not what is called
    return found


def _verdict(what: bytes, detail: bytes) -> Verdict:
    if what == b"go":
        return Verdict("go", deaths=int(detail))
    return Verdict(what.decode(), outcome=detail)
