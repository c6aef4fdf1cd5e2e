"""Brings a feed of any size to the queue: in its order, within bounds, resumably where it can be.

Owns the way of a line from the reader to its answer; what gives the lines, `feed` says. Every turn
is one add job; the client packs jobs of concurrent calls into batches, so that a window of calls in
flight is all that speed needs. Calls begin in file order, since a message that does not bring its
place in its session is given one when its call begins; answers come in any order, and are settled
in file order (see `journal`).

What a line itself is to blame for rejects the line. What the service is to blame for - a full
queue, a lost connection, no answer - holds everything back and tries again, in file order, and
ends the run only if nothing gets through for long; what had settled by then is on record. A
message that was refused while a later one of its session, in flight at the same moment, was not
comes to stand behind it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from recallq.contract import AddResult, Lane, Wait
from recallq.errors import (
    BackendUnavailable,
    ClientClosed,
    InvalidInput,
    JobError,
    JobExpired,
    JobTimeout,
    QueueFull,
    RecallQError,
    ServiceUnavailable,
    WrongBackend,
)
from recallq.ingest.feed import Feed
from recallq.ingest.formats import Line, Turn
from recallq.ingest.gate import Gate
from recallq.ingest.journal import Journal
from recallq.ingest.reader import LineReader
from recallq.ingest.report import IngestOptions, IngestReport, Progress
from recallq.ingest.source import READ_ERRORS, Source
from recallq.ingest.stream import Position
from recallq.messages import Message

_ATTEMPTS = 3
"""Times a turn is tried that the service had no answer for."""
_NAMED = re.compile(r"messages\[(\d+)\]")
_MAX_BYTES_IN_FLIGHT = 32 * 1024 * 1024
_SPAN = 8
"""How many times the window may have settled behind a line that has not."""
_MAX_PENDING_REJECTS = 500
_TICK = 0.1
_SAVE_EVERY = 1.0


class Adder(Protocol):
    """What is asked of a client; `recallq.MemoryClient` is one."""

    async def add_memory(
        self,
        user_id: str,
        messages: list[Message],
        session_id: str,
        *,
        timeout: float,
        lane: Lane,
        idempotency_key: str,
        order: int,
        wait: Wait,
    ) -> AddResult: ...

    def next_order(self) -> int: ...


def check(sources: Sequence[Feed | str | Path], options: IngestOptions) -> list[Journal]:
    """What `ingest` would begin with. Raises `InvalidInput` for what cannot be ingested."""
    if not sources:
        raise InvalidInput("name at least one file, or - for standard input")
    if options.window < 1 or options.timeout <= 0 or options.max_line_bytes < 1:
        raise InvalidInput("window, timeout and max_line_bytes must be positive")
    found: list[Feed] = [
        Source.of(each) if isinstance(each, (str, Path)) else each for each in sources
    ]
    if sum(isinstance(each, Source) and each.stream is not None for each in found) > 1:
        raise InvalidInput("standard input can be read only once")
    shared = options.rejects is not None and len(found) > 1
    return [
        Journal(
            each,
            options.rejects,
            resume=options.resume,
            checkpoint=options.checkpoint,
            shared=shared,
            first=index == 0,
            target=options.target,
        )
        for index, each in enumerate(found)
    ]


async def ingest(
    client: Adder,
    sources: Sequence[Feed | str | Path],
    options: IngestOptions | None = None,
    progress: Progress | None = None,
) -> IngestReport:
    """Stores the messages of `sources`, one source after the other.

    Returns once each line is stored or among the rejects. Raises `InvalidInput` before anything
    is sent if a source cannot be read, and the service's error if it stays out of reach. On that
    and on cancellation, what has settled is on record for ``resume``, and the report that
    `progress` saw last says where it stopped.
    """
    options = options or IngestOptions()
    journals = await asyncio.to_thread(check, sources, options)
    report = IngestReport()
    started = time.monotonic()

    def show() -> None:
        report.seconds = time.monotonic() - started
        if progress is not None:
            progress(report)

    for journal in journals:
        await _Run(client, journal, options, report, show).run()
    return report


@dataclass(slots=True, eq=False)
class _Entry:
    """A line on its way."""

    line: Line | None
    """Dropped once it cannot be rejected any more."""
    after: Position
    unfinished: bool
    consumed: int
    messages: int
    left: int
    """Messages that have not settled."""
    held: int
    """Bytes it takes, about, until `line` is dropped."""
    problem: str | None
    stored: int = 0


class _GiveUp(Exception):
    """The run cannot go on, for the reason that is its cause."""

    def __init__(self, error: RecallQError) -> None:
        super().__init__(str(error))
        self.error = error


class _Run:
    """One source's way through."""

    def __init__(
        self,
        client: Adder,
        journal: Journal,
        options: IngestOptions,
        report: IngestReport,
        show: Callable[[], None],
    ) -> None:
        self._client = client
        self._journal = journal
        self._source = journal.source
        self._options = options
        self._report = report
        self._show = show
        self._gate = Gate()
        self._entries: deque[_Entry] = deque()
        self._in_flight = 0
        self._bytes = 0
        self._sequence = 0
        self._room = asyncio.Event()

    async def run(self) -> None:
        report, journal = self._report, self._journal
        report.source, report.noun = self._source.name, self._source.noun
        report.bytes_total = self._source.size
        report.bytes_done = 0
        report.rejected_earlier += journal.rejected_earlier
        await asyncio.to_thread(journal.begin)
        if journal.rejected_earlier:
            self._name_rejects()
        reader = LineReader(lambda: self._source.lines(journal.start, self._options))
        try:
            async with asyncio.TaskGroup() as group:
                ticker = group.create_task(self._tick())
                while lines := await reader.take():
                    for line in lines:
                        await self._admit(line, group)
                    await asyncio.sleep(0)  # lines that are all rejected wait for nothing
                while self._entries:
                    await self._wait()
                ticker.cancel()
            if reader.error is not None:
                raise _reading_failed(self._source, reader.error)
            await asyncio.to_thread(journal.save, complete=True)
            report.bytes_done = report.bytes_total or report.bytes_done
        except BaseExceptionGroup as failures:
            error = _first(failures)
            raise _placed(error, self._stopped()) from error
        except RecallQError as error:
            raise _placed(error, self._stopped()) from error
        except BaseException:
            self._stopped()
            raise
        finally:
            reader.stop()
            report.waiting = None
            if journal.warning:
                report.warnings.append(journal.warning)
            self._show()

    def _stopped(self) -> str:
        """Puts on record what has settled; returns where that is and how to go on."""
        try:
            self._journal.save()
        except InvalidInput as error:
            self._report.warnings.append(str(error))
        mark, name = self._journal.mark, self._source.name
        place = f"stopped after {self._source.noun} {mark.line:,} of {name}"
        if self._journal.keeps_checkpoint:
            how = "--resume goes on from there"
        else:
            how = "run it again from the start: what is stored is not stored twice"
        self._report.stopped = f"{place}; {how}"
        return self._report.stopped

    async def _tick(self) -> None:
        saved = time.monotonic()
        while True:
            await asyncio.sleep(_TICK)
            self._report.waiting = self._gate.reason or self._source.waiting
            self._show()
            if time.monotonic() - saved >= _SAVE_EVERY:
                await asyncio.to_thread(self._journal.save)
                saved = time.monotonic()

    # --- lines ----------------------------------------------------------------------------------

    async def _admit(self, line: Line, group: asyncio.TaskGroup) -> None:
        """Begins to store a line once there is room for it."""
        options = self._options
        if self._journal.pending > _MAX_PENDING_REJECTS:
            await asyncio.to_thread(self._journal.save)
        while len(self._entries) >= _SPAN * options.window or (
            self._bytes and self._bytes + line.piece.size > _MAX_BYTES_IN_FLIGHT
        ):
            await self._wait()
        turns, line.turns = line.turns, []
        messages = sum(len(turn.messages) for turn in turns)
        entry = _Entry(
            line=line,
            after=line.piece.after,
            unfinished=line.piece.unfinished,
            consumed=line.piece.consumed,
            messages=messages,
            left=messages,
            held=line.piece.size if turns else len(line.piece.raw),
            problem=line.problem,
        )
        self._entries.append(entry)
        self._bytes += entry.held
        self._report.lines += 1
        self._report.messages += messages
        if not turns:
            self._settle()
        first = 0
        for turn in turns:
            size = len(turn.messages)
            while self._in_flight and self._in_flight + size > options.window:
                await self._wait()
            self._in_flight += size
            self._sequence += 1
            group.create_task(self._store(entry, first, turn, self._sequence))
            first += size

    async def _wait(self) -> None:
        """Until something has settled."""
        self._room.clear()
        await self._room.wait()

    async def _store(self, entry: _Entry, first: int, turn: Turn, sequence: int) -> None:
        """Sees a turn through, whose first message is the line's message `first`, from 0."""
        size = len(turn.messages)
        try:
            result = await self._add(turn, sequence)
        except (InvalidInput, JobError) as error:
            if entry.problem is None:
                entry.problem = _problem(error, first, entry.messages)
        else:
            entry.stored += size
            self._report.added += min(result.added, size)
            self._report.already_stored += max(size - result.added, 0)
        self._in_flight -= size
        entry.left -= size
        if not entry.left:
            if entry.problem is None:
                self._drop(entry)
            self._settle()
        self._room.set()

    def _drop(self, entry: _Entry) -> None:
        self._bytes -= entry.held
        entry.line, entry.held = None, 0

    def _settle(self) -> None:
        """Writes down the lines at the head that are done."""
        report = self._report
        while self._entries and not self._entries[0].left:
            entry = self._entries.popleft()
            reject = None
            if entry.problem is not None and entry.line is not None:
                problem = entry.problem
                if entry.stored:
                    problem += f" (of its other messages, {entry.stored:,} are stored)"
                reject = entry.line.reject(problem)
                report.reject(entry.problem)
                self._name_rejects()
                self._drop(entry)
            self._journal.settle(entry.after, reject, unfinished=entry.unfinished)
            report.bytes_done = entry.consumed

    def _name_rejects(self) -> None:
        path = str(self._journal.rejects)
        if path not in self._report.rejects:
            self._report.rejects.append(path)

    # --- messages -------------------------------------------------------------------------------

    async def _add(self, turn: Turn, sequence: int) -> AddResult:
        """Adds a turn, however many attempts that takes. Raises what no trying again would help."""
        options, gate = self._options, self._gate
        began = time.monotonic()
        attempts = 0
        # Once: tried again, the turn keeps its place.
        order = self._client.next_order() if turn.order is None else turn.order
        while True:
            await gate.passed(sequence)
            try:
                result = await self._client.add_memory(
                    turn.user_id,
                    turn.messages,
                    turn.session_id,
                    timeout=options.timeout,
                    lane=options.lane,
                    idempotency_key=turn.key,
                    order=order,
                    wait=options.wait,
                )
            except QueueFull as error:
                gate.hold("the queue is full", error.retry_after)
            except ServiceUnavailable as error:
                if gate.trouble() > options.patience:
                    raise
                gate.hold(str(error))
            except WrongBackend as error:
                raise _GiveUp(error) from error
            except (JobTimeout, JobExpired, BackendUnavailable) as error:
                attempts += 1
                if attempts >= _ATTEMPTS and gate.last_success < began:
                    raise _GiveUp(error) from error  # it is not this turn's fault
                if attempts >= _ATTEMPTS:
                    raise
                gate.hold(str(error), getattr(error, "retry_after", None))
            else:
                gate.succeeded()
                return result


def _problem(error: InvalidInput | JobError, first: int, messages: int) -> str:
    """Why a line of so many messages is rejected: a turn met `error` that begins with `first`."""
    text = str(error)
    if isinstance(error, JobError):
        return f"failed: {text}"
    named = _NAMED.match(text)
    if named is None:
        return text
    # The client counts from the first message that it was given, and people from 1.
    which = f"message {first + int(named[1]) + 1:,} of {messages:,}"
    return f"{'the message' if messages == 1 else which}{text[named.end() :]}"


def _reading_failed(source: Feed, error: Exception) -> Exception:
    if isinstance(error, READ_ERRORS) and not isinstance(error, RecallQError):
        return InvalidInput(f"{source.name} cannot be read to its end: {error}")
    return error


def _first(failures: BaseExceptionGroup) -> BaseException:
    """The failure that the others follow from."""
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error.error if isinstance(error, _GiveUp) else error


def _placed(error: BaseException, place: str) -> BaseException:
    """`error`, saying where the run stopped as well."""
    text = f"{error}; {place}"
    if isinstance(error, JobError):
        return type(error)(text, job_id=error.job_id)
    if isinstance(error, (InvalidInput, ServiceUnavailable, ClientClosed)):
        return type(error)(text)
    return RecallQError(text) if isinstance(error, RecallQError) else error
