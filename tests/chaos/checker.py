"""Judges a history: what may not be, found in what callers did and were told.

The checker knows no more than callers do. A call that ended with an error may have had its effect,
now or a little later, and what it did then counts for either way; two calls that overlapped may
have come in either order. What is left is certain, and each thing that contradicts it is a
`Violation`.

Three moments of each add decide what a read may show of it. It is *due* once its caller knew that
it was stored; *threatened* from the first delete on that may have come after it; and *gone* once
the caller of a delete that surely came after it knew that the delete was done. A read must show
what was due before it began and not threatened until it ended, and nothing that was gone before it
began.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from recallq.contract import JobState, Operation
from recallq.errors import BackendUnavailable
from tests.chaos.history import SUCCEEDED, Call

CLOCK_TOLERANCE = 0.010
"""How far the clocks of two clients may be apart, in seconds."""
AFTERLIFE = 20.0
"""How long after its call ended without an answer a job may still be enqueued."""
PATIENCE = 40.0
"""Longest time that a call may take: twice the callers' own timeouts."""
LONGEST_WAIT = 3.0
"""Longest time, in seconds, for which workers wait before they try a job again."""
UNKNOWN = "unknown"

_NO_FAILURES = (None, SUCCEEDED, "JobCancelled", "JobExpired", "ResultWithdrawn")
_NO_ANSWER = "JobTimeout"
"""The caller stopped waiting for a job that went on, and may have come to any end."""
_WRITES = (Operation.ADD, Operation.DELETE)


class Kind(StrEnum):
    LOST = "lost"
    DUPLICATED = "duplicated"
    OUT_OF_ORDER = "out of order"
    RESURRECTED = "resurrected"
    FROM_NOWHERE = "from nowhere"
    """What nobody has stored there: of another user or session, or not yet submitted."""
    REFUSED = "refused and stored"
    """What no job may have stored: poison, or what was never accepted."""
    FAILED = "failed without cause"
    SETTLED_TWICE = "settled twice"
    HUNG = "hung"
    UNEXPECTED = "unexpected error"


@dataclass(slots=True)
class Violation:
    kind: Kind
    what: str
    history: list[str] = field(default_factory=list)
    """Who did what, as far as it matters."""

    def __str__(self) -> str:
        return "\n    ".join([f"{self.kind.upper()}: {self.what}", *self.history])


@dataclass
class _Add:
    """An add, and what deletes did to it."""

    call: Call
    threatened: float = math.inf
    gone: float = math.inf

    @cached_property
    def stored(self) -> bool | None:
        """None where it may be either."""
        call = self.call
        never = call.accepted is None and (call.refused or call.state == UNKNOWN)
        if never or call.poison:
            return False
        return True if call.outcome == SUCCEEDED or call.state == JobState.SUCCEEDED else None

    @cached_property
    def due(self) -> float:
        settled = self.call.settled
        return settled if self.stored and settled is not None else math.inf

    @cached_property
    def ended(self) -> float:
        """It took its place in the order between its beginning and this."""
        return math.inf if self.call.ended is None else self.call.ended


@dataclass
class _Message:
    token: str
    index: int
    user: str
    session: str
    adds: list[_Add] = field(default_factory=list)
    """More than one with an idempotency key."""

    @cached_property
    def candidates(self) -> list[_Add]:
        """The adds that may have stored it."""
        return [add for add in self.adds if add.stored is not False]


class Checker:
    """Checks the calls of one run. `origin` is the moment from which times are told."""

    def __init__(
        self, calls: Sequence[Call], *, origin: float = 0.0, patience: float = PATIENCE
    ) -> None:
        self._patience = patience
        self._calls = calls
        self._origin = origin
        self._found: dict[tuple[Kind, str], Violation] = {}
        self._deletes: dict[str, list[Call]] = defaultdict(list)
        self._messages: dict[str, _Message] = {}
        self._of_user: dict[str, list[_Message]] = defaultdict(list)
        self._threatened: set[int] = set()
        """By identity, the adds that a delete may have reached before they were run."""
        for call in calls:
            if call.operation is Operation.DELETE:
                self._deletes[call.user].append(call)
        for call in calls:
            if call.operation is Operation.ADD:
                self._enter(call)

    def check(self) -> list[Violation]:
        """Everything that is wrong, each thing once."""
        for call in self._calls:
            self._check_call(call)
            if call.seen is not None:
                self._check_read(call)
        return list(self._found.values())

    # --- what adds and deletes come to ----------------------------------------------------------

    def _enter(self, call: Call) -> None:
        add = _Add(call)
        for delete in self._deletes[call.user]:
            if delete.session not in (None, call.session):
                continue
            if _latest_effect(delete) >= call.began:
                add.threatened = min(add.threatened, delete.began)
                self._threatened.add(id(call))
            if _latest_effect(call) < delete.began and _succeeded(delete):
                settled = math.inf if delete.settled is None else delete.settled
                add.gone = min(add.gone, settled)
        assert call.session is not None
        for index, token in enumerate(call.tokens):
            message = self._messages.get(token)
            if message is None:
                message = _Message(token, index, call.user, call.session)
                self._messages[token] = message
                self._of_user[call.user].append(message)
            message.adds.append(add)

    # --- calls ----------------------------------------------------------------------------------

    def _check_call(self, call: Call) -> None:
        if call.ended is None:
            self._report(Kind.HUNG, call, "it never ended")
        elif call.ended - call.began > self._patience and call.outcome != "Killed":
            self._report(Kind.HUNG, call, f"it took {call.ended - call.began:.1f} s")
        if call.outcome is not None and call.outcome.startswith("unexpected"):
            self._report(Kind.UNEXPECTED, call, f"it ended with {call.outcome}")
        if call.job_id is not None:
            self._check_job(call)
        failed = call.state in (JobState.FAILED, JobState.DEAD) or (
            _was_told(call) and call.outcome not in _NO_FAILURES
        )
        if failed and not call.poison and not _ran_out_of_time(call):
            self._report(Kind.FAILED, call, "it failed, and nothing was wrong with it")
        succeeded = SUCCEEDED in (call.outcome, call.state)
        # Where jobs wait for their user's turn, a delete ends them: nothing of them is stored.
        if call.poison and succeeded and id(call) not in self._threatened:
            self._report(Kind.REFUSED, call, "it succeeded, in spite of its poison")

    def _check_job(self, call: Call) -> None:
        known = call.accepted is not None
        if call.state in (None, JobState.QUEUED, JobState.RUNNING):
            self._report(Kind.LOST, call, "its job has not settled")
        elif call.state == UNKNOWN and known:
            self._report(Kind.LOST, call, "it was accepted, and no such job is known")
        elif _was_told(call):
            # A read's answer is withdrawn when its user deletes something.
            withdrawn = call.operation not in _WRITES and call.state == JobState.EXPIRED
            if (call.outcome == SUCCEEDED) != (call.state == JobState.SUCCEEDED) and not withdrawn:
                self._report(Kind.SETTLED_TWICE, call, "its caller was told something else")
        elif call.cancelled and call.state != JobState.CANCELLED:
            self._report(Kind.SETTLED_TWICE, call, "it was cancelled, and its state is another")

    # --- reads ----------------------------------------------------------------------------------

    def _check_read(self, read: Call) -> None:
        assert read.seen is not None
        for token, count in Counter(token for token, _ in read.seen).items():
            if count > 1:
                self._report_message(
                    Kind.DUPLICATED, token, read, f"it is there {count} times", self._adds_of(token)
                )
        for token, session in read.seen:
            self._check_presence(read, token, session)
        if read.operation is Operation.LIST:
            self._check_order(read)
            if read.whole:
                self._check_absences(read)

    def _check_presence(self, read: Call, token: str, session: str) -> None:
        message = self._messages.get(token)
        if message is None:
            self._report_message(Kind.FROM_NOWHERE, token, read, "nobody has submitted it")
            return
        at_home = message.user == read.user and message.session == session
        if not at_home or read.session not in (None, session):
            self._report_message(
                Kind.FROM_NOWHERE, token, read, f"it was seen in session {session}", message.adds
            )
            return
        adds = [add for add in message.adds if add.call.began < _end(read)]
        candidates = [add for add in adds if add.stored is not False]
        if not adds:
            self._report_message(
                Kind.FROM_NOWHERE, token, read, "it was submitted later", message.adds
            )
        elif not candidates:
            self._report_message(Kind.REFUSED, token, read, "no job may have stored it", adds)
        elif all(add.gone < read.began for add in candidates):
            self._report_message(
                Kind.RESURRECTED, token, read, "it was deleted before the read", adds
            )

    def _check_absences(self, read: Call) -> None:
        assert read.seen is not None
        seen = {token for token, _ in read.seen}
        for message in self._of_user[read.user]:
            if message.token in seen or read.session not in (None, message.session):
                continue
            if any(
                add.due < read.began and add.threatened > _end(read) for add in message.candidates
            ):
                self._report_message(
                    Kind.LOST, message.token, read, "it was stored and is not there", message.adds
                )

    def _check_order(self, read: Call) -> None:
        """Looks from the end backwards at what comes later in the list and yet is older."""
        assert read.seen is not None
        messages = [self._messages[token] for token, _ in read.seen if token in self._messages]
        oldest: tuple[float, _Message] | None = None
        oldest_of: dict[str, tuple[tuple[int, int], _Message]] = {}
        for message in reversed(messages):
            adds = message.candidates
            if not adds:
                continue  # it may not be there at all
            began = min(add.call.began for add in adds)
            ended = max(add.ended for add in adds)
            if oldest is not None and oldest[0] + CLOCK_TOLERANCE < began:
                self._report_pair(read, message, oldest[1])
            if oldest is None or ended < oldest[0]:
                oldest = (ended, message)
            clients = {add.call.client for add in adds}
            if len(clients) == 1:
                client = clients.pop()
                numbers = [add.call.number for add in adds]
                first, last = (min(numbers), message.index), (max(numbers), message.index)
                if client in oldest_of and oldest_of[client][0] < first:
                    self._report_pair(read, message, oldest_of[client][1])
                if client not in oldest_of or last < oldest_of[client][0]:
                    oldest_of[client] = (last, message)

    # --- reporting ------------------------------------------------------------------------------

    def _report(self, kind: Kind, call: Call, what: str) -> None:
        self._found.setdefault(
            (kind, call.name), Violation(kind, f"{call.name}: {what}", [self.describe(call)])
        )

    def _report_message(
        self, kind: Kind, token: str, read: Call, what: str, adds: Iterable[_Add] = ()
    ) -> None:
        if (kind, token) in self._found:
            return
        calls = [add.call for add in adds if add.call.began < _end(read)]
        for call in calls[:1]:
            # The deletes that may have met it.
            calls += [
                delete
                for delete in self._deletes[call.user]
                if delete.session in (None, call.session)
                and delete.began < _end(read)
                and _latest_effect(delete) >= call.began
            ]
        self._found[kind, token] = Violation(
            kind, f"message {token}: {what}", [*self._describe_all(calls), self.describe(read)]
        )

    def _report_pair(self, read: Call, shown_first: _Message, older: _Message) -> None:
        if (Kind.OUT_OF_ORDER, shown_first.token) not in self._found:
            calls = [add.call for message in (older, shown_first) for add in message.adds]
            self._found[Kind.OUT_OF_ORDER, shown_first.token] = Violation(
                Kind.OUT_OF_ORDER,
                f"message {shown_first.token} comes before {older.token}, which is older",
                [*self._describe_all(calls), self.describe(read)],
            )

    def _adds_of(self, token: str) -> list[_Add]:
        return self._messages[token].adds if token in self._messages else []

    def _describe_all(self, calls: Iterable[Call]) -> Iterator[str]:
        return map(self.describe, sorted(calls, key=lambda call: call.began))

    def describe(self, call: Call) -> str:
        """A call in one line, with times since the run began."""
        place = call.user if call.session is None else f"{call.user}/{call.session}"
        told = [f"{self._time(call.began)} {call.name} {call.operation} {place} ({call.lane})"]
        if call.tokens:
            told.append(f"tokens {call.tokens[0]}+{len(call.tokens) - 1}")
        told += [f"{name} {value}" for name in ("key", "poison") if (value := getattr(call, name))]
        told += [name for name in ("refused", "cancelled") if getattr(call, name)]
        told += [
            f"{name} {self._time(value)}"
            for name in ("accepted", "ended", "settled")
            if (value := getattr(call, name)) is not None
        ]
        told += [
            f"{name} {value}" for name in ("outcome", "error") if (value := getattr(call, name))
        ]
        if call.seen is not None:
            told.append(f"saw {len(call.seen)}{'' if call.whole else ' and maybe more'}")
        if call.job_id is not None:
            told.append(f"job {call.job_id} {call.state}")
        return ", ".join(told)

    def _time(self, at: float) -> str:
        return f"{at - self._origin:.3f}"


def _end(call: Call) -> float:
    return math.inf if call.ended is None else call.ended


def _was_told(call: Call) -> bool:
    """Whether the caller heard how its job ended. That a job has settled may also be known from
    asking for its state when all was over."""
    return call.settled is not None and call.outcome not in (None, _NO_ANSWER)


def _ran_out_of_time(call: Call) -> bool:
    """Whether the job was tried for as long as its caller had time: another try would have come
    too late. The caller hears of it at the end of this time, or does not hear of it any more."""
    if call.timeout is None or call.code != BackendUnavailable.code:
        return False
    return call.settled is None or call.settled - call.began > call.timeout - LONGEST_WAIT


def _succeeded(call: Call) -> bool:
    return call.outcome == SUCCEEDED or call.state == JobState.SUCCEEDED


def _latest_effect(call: Call) -> float:
    """When the call's job had been enqueued, if ever; -inf if it never was."""
    if call.accepted is not None:
        return call.accepted
    if call.refused or call.state == UNKNOWN:
        return -math.inf
    return _end(call) + AFTERLIFE
