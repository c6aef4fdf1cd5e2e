"""Ingestion against a client in this process: nothing lost, nothing twice, and in order."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import threading
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from recallq.contract import AddResult, Lane, Wait
from recallq.errors import (
    BackendError,
    BackendUnavailable,
    InvalidInput,
    JobTimeout,
    QueueFull,
    ServiceUnavailable,
    WrongBackend,
)
from recallq.ingest import IngestOptions, IngestReport, Source, gate, ingest, runner
from recallq.messages import Message

Before = Callable[[str, Message], Awaitable[None] | None]


class Store:
    """A client and its store in one: like the real ones, it adds what has a new key, and lists by
    the order that was taken first.

    `before` runs in each call after the call has taken its place, and may wait or raise.
    """

    def __init__(self, before: Before | None = None) -> None:
        self.before = before
        self.places = 0
        self.calls: list[str] = []
        """The text of each call, in the order in which calls began."""
        self.kept: dict[tuple[str, str, str], tuple[int, dict[str, Any]]] = {}
        self.in_flight = self.most_in_flight = 0
        self.lanes: set[Lane] = set()

    def next_order(self) -> int:
        self.places += 1
        return self.places

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
    ) -> AddResult:
        self.calls.append("+".join(message.text for message in messages))
        self.lanes.add(lane)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            waits = self.before(user_id, messages[0]) if self.before is not None else None
            if waits is not None:
                await waits
        finally:
            self.in_flight -= 1
        before = len(self.kept)
        ids = [f"{idempotency_key}-{index}" for index in range(len(messages))]
        for record_id, message in zip(ids, messages, strict=True):
            key = (user_id, session_id, record_id)
            self.kept.setdefault(key, (order, message.to_dict()))
        return AddResult(record_ids=ids, added=len(self.kept) - before)

    def listed(self, user: str | None = None) -> list[str]:
        """The texts of what is kept, in their order."""
        kept = sorted(
            (each for key, each in self.kept.items() if user in (None, key[0])),
            key=lambda each: each[0],
        )
        return [message["content"] for _, message in kept]


def line(text: str, **fields: Any) -> str:
    said = {"user_id": "ann", "session_id": "s", "role": "user", "content": text, **fields}
    return json.dumps(said) + "\n"


def log(count: int, start: int = 0) -> str:
    return "".join(line(f"m{n}") for n in range(start, start + count))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses and intervals that a test can wait for."""
    monkeypatch.setattr(gate, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(gate, "_LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(runner, "_TICK", 0.005)
    monkeypatch.setattr(runner, "_SAVE_EVERY", 0.01)


def rejects_of(file: Path) -> list[dict[str, Any]]:
    path = file.with_name(f"{file.name}.rejects.jsonl")
    return [json.loads(each) for each in path.read_text().splitlines()]


def checkpoint_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        file.with_name(f"{file.name}.recallq-ingest.json").read_text()
    )
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


class Seen:
    """The report, as progress saw it last."""

    def __init__(self) -> None:
        self.report = IngestReport()
        self.waited: set[str] = set()

    def __call__(self, report: IngestReport) -> None:
        self.report = report
        if report.waiting:
            self.waited.add(report.waiting)


# --- storing ------------------------------------------------------------------------------------


async def test_a_file_is_stored_once_however_often_it_is_ingested(file: Path) -> None:
    file.write_text(log(100) + line("m0"))
    store = Store()
    report = await ingest(store, [file])
    assert (report.lines, report.messages, report.added) == (101, 101, 101)
    assert (report.already_stored, report.rejected) == (0, 0)
    assert store.listed() == [f"m{n}" for n in range(100)] + ["m0"]
    assert store.lanes == {Lane.BULK}

    renamed = file.rename(file.with_name("other.jsonl"))
    for given in (renamed, str(renamed), Source("stdin", stream=io.BytesIO(renamed.read_bytes()))):
        again = await ingest(store, [given])
        assert (again.messages, again.added, again.already_stored) == (101, 0, 101)


async def test_the_same_id_twice_in_a_session_is_counted_as_already_stored(file: Path) -> None:
    file.write_text(line("m", id=1) + line("m", id=1) + line("m", id=1, session_id="t"))
    report = await ingest(Store(), [file])
    assert (report.messages, report.added, report.already_stored) == (3, 2, 1)


async def test_calls_begin_in_file_order_whatever_order_they_end_in(file: Path) -> None:
    file.write_text(log(300))
    delays = iter(range(300, 0, -1))
    store = Store(lambda *_: asyncio.sleep(next(delays) / 20_000))
    await ingest(store, [file], IngestOptions(window=50))
    assert store.calls == [f"m{n}" for n in range(300)]
    assert store.most_in_flight == 50


@pytest.mark.parametrize("own_id", [None, "c"])
async def test_a_conversation_is_stored_once_and_in_order(file: Path, own_id: str | None) -> None:
    messages = [{"role": "user", "content": f"{n}"} for n in range(70)]
    conversation = {"user": "ann", "id": own_id, "messages": messages}
    file.write_text(json.dumps(conversation) + "\n" + log(1))
    store = Store(lambda *_: asyncio.sleep(0.001))
    report = await ingest(store, [file], IngestOptions(window=7))
    assert (report.lines, report.messages, report.added) == (2, 71, 71)
    assert store.listed() == [*(f"{n}" for n in range(70)), "m0"]
    assert store.most_in_flight == (1 if own_id is None else 7)
    again = await ingest(store, [file])
    assert (again.added, again.already_stored) == (0, 71)


async def test_of_a_conversation_that_has_grown_only_what_is_new_is_added(file: Path) -> None:
    messages = [{"role": "user", "content": f"{n}"} for n in range(5)]
    store = Store()
    for count, new in ((3, 3), (5, 2)):
        file.write_text(json.dumps({"user": "ann", "id": "c", "messages": messages[:count]}))
        assert (await ingest(store, [file])).added == new
    assert store.listed() == ["0", "1", "2", "3", "4"]


async def test_several_sources_are_one_report(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two.gz"
    one.write_text(log(3))
    two.write_bytes(gzip.compress(log(4, start=3).encode()))
    stdin = Source("stdin", stream=io.BytesIO(gzip.compress(log(5).encode())))
    store = Store()
    report = await ingest(store, [one, two, stdin])
    # The fifth lines of standard input were the second of the second file.
    assert (report.lines, report.added, report.already_stored) == (12, 9, 3)
    assert store.listed("ann")[:7] == [f"m{n}" for n in range(7)]


async def test_a_pipe_is_stored_line_by_line_as_it_comes() -> None:
    reading, writing = os.pipe()
    store = Store()
    with os.fdopen(reading, "rb") as stream:
        running = asyncio.create_task(ingest(store, [Source("stdin", stream=stream)]))
        os.write(writing, log(2).encode())
        await until(lambda: len(store.kept) == 2)
        os.write(writing, log(1, start=2).encode())
        await until(lambda: len(store.kept) == 3)
        os.close(writing)
        assert (await running).added == 3


async def test_progress_tells_how_far_it_is(file: Path, hurried: None) -> None:
    file.write_text(log(200) + "bad\n")
    shares: list[float] = []

    def progress(report: IngestReport) -> None:
        assert report.bytes_total == file.stat().st_size
        shares.append(report.bytes_done / report.bytes_total)

    store = Store(lambda *_: asyncio.sleep(0.002))
    report = await ingest(store, [file], IngestOptions(window=10), progress)
    assert shares == sorted(shares)
    assert len(set(shares)) > 2
    assert shares[-1] == 1.0
    assert report.rate > 0
    assert report.to_dict()["added"] == 200


# --- rejects ------------------------------------------------------------------------------------


async def test_bad_lines_are_rejected_in_order_and_the_rest_is_stored(
    file: Path, tmp_path: Path
) -> None:
    def before(_: str, message: Message) -> None:
        if message.text == "big":
            raise InvalidInput("messages[0] is 9 bytes and the limit is 8")
        if message.text == "doomed":
            raise BackendError("no such index")

    file.write_text(log(2) + "bad\n" + line("doomed") + line("m2") + "\n" + line("big"))
    store = Store(before)
    report = await ingest(store, [file])
    assert (report.lines, report.added, report.rejected) == (6, 3, 3)
    assert rejects_of(file) == [
        {"line": 3, "reason": "not JSON: Expecting value at column 1", "raw": "bad"},
        {"line": 4, "reason": "failed: no such index", "raw": line("doomed").strip()},
        {
            "line": 7,
            "reason": "the message is 9 bytes and the limit is 8",
            "raw": line("big").strip(),
        },
    ]
    assert report.rejects == [str(file) + ".rejects.jsonl"]

    file.write_text(log(2))
    assert (await ingest(store, [file])).rejects == []
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "log.jsonl",
        "log.jsonl.recallq-ingest.json",
    ]


async def test_a_conversation_is_rejected_for_one_message_and_says_what_is_stored(
    file: Path,
) -> None:
    def before(_: str, message: Message) -> None:
        if message.text == "big":
            raise InvalidInput("messages[0] is 9 bytes and the limit is 8")

    messages = [{"role": "user", "content": text} for text in ("a", "big", "b")]
    file.write_text(json.dumps({"user": "ann", "id": 1, "messages": messages}) + "\n")
    report = await ingest(Store(before), [file])
    assert (report.messages, report.added, report.rejected) == (3, 2, 1)
    assert rejects_of(file)[0]["reason"] == (
        "message 2 of 3 is 9 bytes and the limit is 8 (of its other messages, 2 are stored)"
    )


async def test_sources_can_share_a_rejects_file(tmp_path: Path) -> None:
    one, two, bad = tmp_path / "one", tmp_path / "two", tmp_path / "bad"
    bad.write_text("of an earlier run")
    one.write_text("x\n")
    two.write_text(log(1) + "y\n")
    report = await ingest(Store(), [one, two], IngestOptions(rejects=bad))
    assert report.rejects == [str(bad)]
    rejects = [json.loads(each) for each in bad.read_text().splitlines()]
    assert [(each["file"], each["line"], each["raw"]) for each in rejects] == [
        (str(one), 1, "x"),
        (str(two), 2, "y"),
    ]


async def test_standard_input_has_its_rejects_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = await ingest(Store(), [Source("stdin", stream=io.BytesIO(b"bad\n"))])
    assert report.rejects == ["stdin.rejects.jsonl"]
    assert [each.name for each in tmp_path.iterdir()] == ["stdin.rejects.jsonl"]


async def test_what_cannot_be_ingested_is_refused_before_anything_is_sent(
    tmp_path: Path, file: Path
) -> None:
    file.write_text(log(1))
    store = Store()

    async def refused(*sources: str | Path, **options: Any) -> str:
        with pytest.raises(InvalidInput) as caught:
            await ingest(store, list(sources), IngestOptions(**options))
        return str(caught.value)

    assert "no such file" in await refused(file, tmp_path / "missing")
    assert "is a directory" in await refused(file, tmp_path)
    assert "name at least one file" in await refused()
    assert "only once" in await refused("-", "-")
    assert "that file itself" in await refused(file, rejects=file)
    assert "is a directory" in await refused(file, rejects=tmp_path)
    assert "there is no directory" in await refused(file, rejects=tmp_path / "no" / "r")
    assert "must be positive" in await refused(file, window=0)
    assert store.calls == []


async def test_a_damaged_gzip_file_is_an_error_after_what_could_be_read(tmp_path: Path) -> None:
    file = tmp_path / "log.gz"
    file.write_bytes(gzip.compress(log(20_000).encode())[:-5000])
    store, seen = Store(), Seen()
    with pytest.raises(InvalidInput, match="cannot be read to its end"):
        await ingest(store, [file], progress=seen)
    assert 0 < len(store.kept) < 20_000
    assert seen.report.added == len(store.kept)


# --- trouble ------------------------------------------------------------------------------------


async def test_a_full_queue_is_waited_for_and_nothing_is_lost_or_out_of_order(
    file: Path, hurried: None
) -> None:
    file.write_text(log(500))
    waiting = 0

    async def drained() -> None:
        nonlocal waiting
        await asyncio.sleep(0.001)
        waiting -= 1

    def before(_: str, message: Message) -> Awaitable[None]:
        nonlocal waiting
        if waiting >= 40:
            raise QueueFull("the queue is full", retry_after=0.002)
        waiting += 1
        return drained()

    store, seen = Store(before), Seen()
    report = await ingest(store, [file], IngestOptions(window=100), seen)
    assert report.added == 500
    assert len(store.calls) > 500
    assert store.listed() == [f"m{n}" for n in range(500)]
    assert report.waiting is None


async def test_a_lost_connection_is_waited_for(file: Path, hurried: None) -> None:
    file.write_text(log(200))
    up = asyncio.Event()

    async def before(_: str, message: Message) -> None:
        if not up.is_set() and message.text >= "m1":  # m0 had got through
            raise ServiceUnavailable("connection refused")
        await asyncio.sleep(0.001)

    store, seen = Store(before), Seen()
    running = asyncio.create_task(ingest(store, [file], IngestOptions(window=20), seen))
    await until(lambda: len(store.calls) > 100)
    up.set()
    assert (await running).added == 200
    assert store.listed() == [f"m{n}" for n in range(200)]
    assert seen.waited == {"connection refused"}


async def test_a_service_that_stays_away_ends_the_run_where_resume_goes_on(
    file: Path, hurried: None
) -> None:
    file.write_text(log(200))
    away = False

    async def before(_: str, message: Message) -> None:
        nonlocal away
        away = away or message.text == "m100"
        if away:
            raise ServiceUnavailable("connection refused")

    store, seen = Store(before), Seen()
    options = IngestOptions(window=20, patience=0.03)
    with pytest.raises(ServiceUnavailable, match="connection refused; stopped after line 100 of"):
        await ingest(store, [file], options, seen)
    assert seen.report.stopped is not None
    assert "--resume goes on from there" in seen.report.stopped
    assert checkpoint_of(file)["line"] == 100
    assert store.in_flight == 0

    store.before = None
    report = await ingest(store, [file], IngestOptions(resume=True))
    assert (report.lines, report.added) == (100, 100)
    assert store.listed() == [f"m{n}" for n in range(200)]


@pytest.mark.parametrize("error", [JobTimeout("no answer"), BackendUnavailable("overloaded")])
async def test_a_message_that_is_never_answered_is_rejected_if_others_are(
    file: Path, hurried: None, error: Exception
) -> None:
    file.write_text(log(50))
    tries: list[str] = []

    async def before(_: str, message: Message) -> None:
        await asyncio.sleep(0.001)
        if message.text == "m20":
            tries.append(message.text)
            raise error

    report = await ingest(Store(before), [file], IngestOptions(window=5))
    assert (report.added, report.rejected, len(tries)) == (49, 1, 3)
    assert rejects_of(file)[0]["line"] == 21


@pytest.mark.parametrize(
    "error", [JobTimeout("no answer"), BackendUnavailable("down", retry_after=0.001)]
)
async def test_if_nothing_is_answered_the_run_ends_and_nothing_is_rejected(
    file: Path, hurried: None, error: Exception
) -> None:
    file.write_text(log(50))

    def before(_: str, __: Message) -> None:
        raise error

    with pytest.raises(type(error), match="stopped after line 0"):
        await ingest(Store(before), [file], IngestOptions(window=5))
    assert not file.with_name("log.jsonl.rejects.jsonl").exists()


async def test_workers_with_another_backend_end_the_run(file: Path) -> None:
    file.write_text(log(50))

    def before(_: str, __: Message) -> None:
        raise WrongBackend("the worker runs mem0")

    store = Store(before)
    with pytest.raises(WrongBackend, match="mem0"):
        await ingest(store, [file], IngestOptions(window=5))
    assert len(store.calls) <= 5


async def test_a_defect_is_not_taken_for_a_bad_line(file: Path) -> None:
    file.write_text(log(5))

    def before(_: str, __: Message) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ingest(Store(before), [file])


# --- interruption -------------------------------------------------------------------------------


async def interrupted(
    store: Store, file: Path, after: int, seen: Seen | None = None, *, resume: bool = False
) -> None:
    """Ingests `file`, and is cancelled once `store` holds `after` messages."""
    options = IngestOptions(window=10, resume=resume)
    running = asyncio.create_task(ingest(store, [file], options, seen))
    await until(lambda: len(store.kept) >= after or running.done())
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_resume_goes_on_after_an_interruption_with_nothing_twice(
    file: Path, hurried: None
) -> None:
    file.write_text("".join(log(20, n * 20) + f"bad {n}\n" for n in range(20)))
    delays = [0.0, 0.003, 0.001]
    store = Store(lambda *_: asyncio.sleep(delays[len(store.calls) % 3]))
    seen = Seen()
    for kept in (50, 120, 333):
        await interrupted(store, file, kept, seen)
        # As if killed: what settled after the checkpoint is not on record.
        with file.with_name("log.jsonl.rejects.jsonl").open("a") as rejects:
            rejects.write('{"line": 9999}\n')
        line_number = checkpoint_of(file)["line"]
        assert seen.report.stopped == (
            f"stopped after line {line_number} of {file}; --resume goes on from there"
        )
        await interrupted(store, file, len(store.kept) + 5, seen, resume=True)
    report = await ingest(store, [file], IngestOptions(resume=True))
    assert report.lines < 420
    assert report.rejected + report.rejected_earlier == 20
    assert [each["line"] for each in rejects_of(file)] == [21 * (n + 1) for n in range(20)]
    assert sorted(store.listed()) == sorted(f"m{n}" for n in range(400))


async def test_interruption_ends_even_while_a_pipe_is_silent() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream:
        running = asyncio.create_task(ingest(Store(), [Source("stdin", stream=stream)]))
        await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(30):
                await running
        os.close(writing)
        await until(lambda: all(t.name != "recallq-ingest-read" for t in threading.enumerate()))


async def test_a_log_that_has_grown_is_resumed_at_its_new_lines(file: Path) -> None:
    file.write_text(log(10) + "bad\n" + line("cut")[:-8])
    store = Store()
    report = await ingest(store, [file])
    assert (report.lines, report.added, report.rejected) == (12, 10, 2)
    assert checkpoint_of(file)["complete"]

    file.write_text(log(10) + "bad\n" + line("cut") + log(5, 10))
    report = await ingest(store, [file], IngestOptions(resume=True))
    # The line that was cut off is read again, as a whole this time.
    assert (report.lines, report.added, report.rejected, report.rejected_earlier) == (6, 6, 0, 0)
    assert [each["raw"] for each in rejects_of(file)] == ["bad"]

    report = await ingest(store, [file], IngestOptions(resume=True))
    assert report.lines == 0
    report = await ingest(store, [file])
    assert (report.lines, report.added, report.already_stored) == (17, 0, 16)


async def test_an_array_is_resumed_at_its_next_item(file: Path, hurried: None) -> None:
    items = [json.loads(line(f"m{n}")) for n in range(200)]
    file.write_text(json.dumps(items, indent=1))
    store = Store(lambda *_: asyncio.sleep(0.001))
    await interrupted(store, file, 50)
    assert checkpoint_of(file)["item"] >= 40
    report = await ingest(store, [file], IngestOptions(resume=True))
    assert 0 < report.lines <= 160
    assert sorted(store.listed()) == sorted(f"m{n}" for n in range(200))


async def test_a_compressed_file_is_resumed(tmp_path: Path, hurried: None) -> None:
    file = tmp_path / "log.gz"
    file.write_bytes(gzip.compress(log(300).encode()))
    store = Store(lambda *_: asyncio.sleep(0.001))
    await interrupted(store, file, 100)
    report = await ingest(store, [file], IngestOptions(resume=True))
    assert report.lines <= 210
    assert len(store.kept) == 300


@pytest.mark.parametrize("change", ["rewritten", "cut short", "checkpoint damaged", "elsewhere"])
async def test_resume_refuses_what_it_did_not_begin(file: Path, change: str) -> None:
    file.write_text(log(100))
    await ingest(Store(), [file], IngestOptions(target="redis://one"))
    target = "redis://one"
    if change == "rewritten":
        file.write_text(log(100, start=1))
    elif change == "cut short":
        file.write_text(log(99))
    elif change == "checkpoint damaged":
        file.with_name("log.jsonl.recallq-ingest.json").write_text("{")
    else:
        target = "redis://two"
    store = Store()
    with pytest.raises(InvalidInput, match="without --resume"):
        await ingest(store, [file], IngestOptions(resume=True, target=target))
    assert store.calls == []
    assert (await ingest(store, [file], IngestOptions(target=target))).added >= 99


async def test_resume_without_a_checkpoint_begins_at_the_start(file: Path) -> None:
    file.write_text(log(3))
    store = Store()
    await ingest(store, [file], IngestOptions(checkpoint=False))
    assert [each.name for each in file.parent.iterdir()] == ["log.jsonl"]
    report = await ingest(store, [file], IngestOptions(resume=True))
    assert (report.lines, report.added, report.already_stored) == (3, 0, 3)


async def test_a_run_that_begins_anew_forgets_how_far_an_earlier_one_was(file: Path) -> None:
    file.write_text(log(3))
    await ingest(Store(), [file])
    gone = Store()

    def before(_: str, __: Message) -> None:
        assert not file.with_name("log.jsonl.recallq-ingest.json").exists()

    gone.before = before
    assert (await ingest(gone, [file])).added == 3


async def test_resume_with_shared_rejects_keeps_those_of_every_source(
    tmp_path: Path, hurried: None
) -> None:
    one, two, bad = tmp_path / "one", tmp_path / "two", tmp_path / "bad"
    one.write_text(log(5) + "x\n")
    two.write_text("y\n" + log(200, 5) + "z\n")
    store = Store(lambda *_: asyncio.sleep(0.001))
    options = IngestOptions(window=10, rejects=bad)
    running = asyncio.create_task(ingest(store, [one, two], options))
    await until(lambda: len(store.kept) > 50)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    options = IngestOptions(window=10, rejects=bad, resume=True)
    await ingest(store, [one, two], options)
    assert [json.loads(each)["raw"] for each in bad.read_text().splitlines()] == ["x", "y", "z"]
    assert len(store.kept) == 205


async def test_a_directory_that_takes_no_checkpoint_does_not_stop_ingestion(
    file: Path, tmp_path: Path
) -> None:
    file.write_text(log(3))
    file.with_name("log.jsonl.recallq-ingest.json").mkdir()
    report = await ingest(Store(), [file])
    assert report.added == 3
    assert "--resume will not find it" in report.warnings[0]
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "log.jsonl",
        "log.jsonl.recallq-ingest.json",
    ]


# --- bounds -------------------------------------------------------------------------------------


async def test_a_line_that_hangs_holds_up_a_bounded_number_of_others(
    file: Path, hurried: None
) -> None:
    file.write_text(log(1000))
    release = asyncio.Event()

    async def before(_: str, message: Message) -> None:
        if message.text == "m0":
            await release.wait()

    store = Store(before)
    running = asyncio.create_task(ingest(store, [file], IngestOptions(window=10)))
    await until(lambda: len(store.calls) == 80)
    await asyncio.sleep(0.05)
    assert len(store.calls) == 80
    assert checkpoint_of(file)["line"] == 0
    release.set()
    assert (await running).added == 1000


class Generated(io.RawIOBase):
    """Lines of a kilobyte, made as they are read."""

    def __init__(self, count: int) -> None:
        self._numbers = iter(range(count))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        number = next(self._numbers, None)
        if number is None:
            return 0
        made = line(f"{number:01000}").encode()
        buffer[: len(made)] = made
        return len(made)


async def test_memory_stays_bounded_on_30_megabytes() -> None:
    class Forgetful(Store):
        async def add_memory(self, *_: Any, **__: Any) -> AddResult:
            await asyncio.sleep(0)
            return AddResult(record_ids=["r"], added=1)

    source = Source("stdin", stream=Generated(28_000))  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        report = await ingest(Forgetful(), [source])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.added == 28_000
    assert peak < 25 * 1024 * 1024


async def test_long_lines_are_bounded_in_bytes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_MAX_BYTES_IN_FLIGHT", 100_000)
    file.write_text("".join(line(f"{n}" + "x" * 30_000) for n in range(20)))
    store = Store(lambda *_: asyncio.sleep(0.001))
    report = await ingest(store, [file])
    assert report.added == 20
    assert store.most_in_flight == 3
