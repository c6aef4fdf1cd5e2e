"""``recallq ingest``: conversation logs into memory, and how far it is for whoever watches."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import orjson
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from recallq.cli.connection import UrlOption, connect, is_named, named_url
from recallq.cli.memory import printable
from recallq.cli.runner import fail, guarded, run
from recallq.cli.stack import default_data_dir
from recallq.contract import Lane, Wait
from recallq.errors import InvalidInput, RecallQError
from recallq.ingest import IngestOptions, IngestReport, check, ingest
from recallq.ingest.stream import MAX_PIECE_BYTES
from recallq.redis_client import redact
from recallq.settings import ClientSettings

_LINE_EVERY = 5.0
"""Seconds between progress lines where there is no terminal."""


def ingest_command(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Conversation logs, .gz too; '-' reads stdin."),
    ],
    user: Annotated[
        str | None, typer.Option("--user", "-u", help="User of lines that name none.")
    ] = None,
    session: Annotated[
        str | None, typer.Option("--session", "-s", help="Session of lines that name none.")
    ] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Tenant.")] = None,
    lane: Annotated[Lane, typer.Option("--lane", help="Queue to use.")] = Lane.BULK,
    rejects: Annotated[
        Path | None,
        typer.Option("--rejects", help="Where bad lines go.  [default: FILE.rejects.jsonl]"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the last run of each file stopped.")
    ] = False,
    window: Annotated[int, typer.Option("--window", min=1, help="Messages in flight.")] = 1000,
    wait: Annotated[
        Wait,
        typer.Option(help="What counts as ingested: stored, or found by searches as well."),
    ] = "stored",
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds a message may wait for its answer.")
    ] = 120.0,
    max_line_bytes: Annotated[
        int, typer.Option("--max-line-bytes", min=1, help="Longest line that is read.")
    ] = MAX_PIECE_BYTES,
    url: UrlOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, for scripts.")
    ] = False,
) -> None:
    """Store conversation logs: JSON Lines, OpenAI messages or ShareGPT conversations.

    A line is a message, {"user_id", "session_id", "role", "content", "timestamp"?, "id"?}, or a
    conversation, {"messages": [...]} or {"conversations": [...]}; one JSON array of such objects
    is taken too. Ingesting a file again stores nothing twice. Bad lines do not stop the rest:
    they are written to the rejects file, and the exit code is 1.
    """
    options = IngestOptions(
        user=user,
        session=session,
        lane=lane,
        rejects=rejects,
        resume=resume,
        window=window,
        wait=wait,
        timeout=timeout,
        max_line_bytes=max_line_bytes,
        target=guarded(lambda: _target(url, tenant, user, session)),
    )
    try:
        check(files, options)
    except InvalidInput as error:
        fail(str(error), code=2)
    report = run(_work(files, options, url, tenant, as_json=as_json))
    if report.rejected or report.rejected_earlier:
        raise typer.Exit(1)


async def _work(
    files: list[str], options: IngestOptions, url: str | None, tenant: str | None, *, as_json: bool
) -> IngestReport:
    console = Console(stderr=True)
    with _Bar(console) if console.is_terminal else _Lines() as display:
        error: str | None = None
        try:
            async with connect(url, tenant=tenant, max_in_flight=options.window) as client:
                await ingest(client, files, options, display)
        except (RecallQError, asyncio.CancelledError) as stopped:
            error = str(stopped) or "interrupted"
            raise
        finally:
            display.close()
            _conclude(display.report, error, as_json=as_json)
    return display.report


def _target(url: str | None, tenant: str | None, user: str | None, session: str | None) -> str:
    """Where the messages go, for the checkpoint: what one place has is not resumed to another."""
    where = url or named_url()
    settings = ClientSettings.load(redis_url=where, tenant=tenant)
    if url or is_named():
        place = redact(settings.redis_url)
    else:  # its address is another every time; its data is not
        place = f"the embedded Redis in {default_data_dir()}"
    parts = [place, f"namespace {settings.namespace}", f"tenant {settings.tenant}"]
    parts += [f"--user {user}"] if user is not None else []
    parts += [f"--session {session}"] if session is not None else []
    return ", ".join(parts)


def _conclude(report: IngestReport, error: str | None, *, as_json: bool) -> None:
    for warning in report.warnings:
        _note(warning)
    if as_json:
        outcome = report.to_dict() | {"error": error}
        sys.stdout.write(orjson.dumps(outcome).decode() + "\n")
        sys.stdout.flush()
    elif report.source is not None:
        print(_summary(report), flush=True)
    if report.rejects:
        lines = report.rejected + report.rejected_earlier
        where = ", ".join(report.rejects)
        _note(f"{_count(lines, 'line')} rejected; which and why is in {where}")
    if report.stopped and error == "interrupted":
        _note(report.stopped)  # else it is part of the error


def _summary(report: IngestReport) -> str:
    return (
        f"stored {_count(report.added, 'message')} from {_count(report.lines, 'line')} in "
        f"{report.seconds:.1f} s ({report.rate:,.0f}/s); {report.already_stored:,} stored before, "
        f"{_count(report.rejected, 'line')} rejected"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _note(text: str) -> None:
    print(f"recallq: {printable(text)}", file=sys.stderr, flush=True)


# --- progress -----------------------------------------------------------------------------------


def _counts(report: IngestReport) -> str:
    parts = [
        _count(report.added + report.already_stored, "message"),
        f"{report.rate:,.0f}/s",
    ]
    if report.rejected:
        parts.append(f"{report.rejected:,} rejected")
    if report.waiting:
        parts.append(f"waiting: {report.waiting}")
    return printable(", ".join(parts))


class _Bar(AbstractContextManager["_Bar"]):
    """A progress bar on a terminal."""

    def __init__(self, console: Console) -> None:
        self.report = IngestReport()
        self._source: str | None = None
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[counts]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("left", style="dim"),
            console=console,
            refresh_per_second=5,
        )
        self._task = self._progress.add_task("", total=None, counts="", visible=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __call__(self, report: IngestReport) -> None:
        self.report = report
        if report.source != self._source:
            self._source = report.source
            name = printable(report.source or "")
            self._progress.reset(
                self._task, total=report.bytes_total, visible=True, description=name
            )
        self._progress.update(self._task, completed=report.bytes_done, counts=_counts(report))

    def close(self) -> None:
        self._progress.stop()


class _Lines(AbstractContextManager["_Lines"]):
    """A line on standard error now and then."""

    def __init__(self) -> None:
        self.report = IngestReport()
        self._source: str | None = None
        self._began = (0.0, 0)
        self._next = time.monotonic() + _LINE_EVERY

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __call__(self, report: IngestReport) -> None:
        self.report = report
        now = time.monotonic()
        if report.source != self._source or not self._began[1]:
            self._source, self._began = report.source, (now, report.bytes_done)
        if now >= self._next:
            self._next = now + _LINE_EVERY
            _note(f"{report.source}: {self._share(report, now)}{_counts(report)}")

    def _share(self, report: IngestReport, now: float) -> str:
        """How much of the source is done and how long the rest will take."""
        if not report.bytes_total:
            return ""
        began, first = self._began
        share = f"{report.bytes_done / report.bytes_total:.0%}, "
        if report.bytes_done > first and now > began:
            speed = (report.bytes_done - first) / (now - began)
            left = round(max(report.bytes_total - report.bytes_done, 0) / speed)
            share += f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left, "
        return share

    def close(self) -> None:
        """Nothing to take down."""
