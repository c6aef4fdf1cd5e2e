"""What the commands that ingest share: the run itself, and how far it is for whoever watches."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from recallq.cli.memory import count, print_json, printable
from recallq.errors import RecallQError
from recallq.ingest import Adder, Feed, IngestOptions, IngestReport, ingest

_LINE_EVERY = 5.0
"""Seconds between progress lines where there is no terminal."""
_MOST_REASONS = 5


def summary(report: IngestReport) -> str:
    """What came of it, in one line."""
    return (
        f"stored {count(report.added, 'message')} from {count(report.lines, report.noun)} in "
        f"{report.seconds:.1f} s ({report.rate:,.0f}/s); {report.already_stored:,} stored before, "
        f"{count(report.rejected, report.noun)} rejected"
    )


async def see_through(
    adder: AbstractAsyncContextManager[Adder],
    sources: Sequence[Feed | str | Path],
    options: IngestOptions,
    *,
    as_json: bool,
    summary: Callable[[IngestReport], str] = summary,
    outcome: Callable[[IngestReport], dict[str, Any]] = IngestReport.to_dict,
) -> IngestReport:
    """Ingests, shows how far it is, and tells what came of it, also if it was stopped.

    `summary` and `outcome` are how it is told to people and to scripts.
    """
    console = Console(stderr=True)
    with _Bar(console) if console.is_terminal else _Lines() as display:
        error: str | None = None
        try:
            async with adder as client:
                await ingest(client, sources, options, display)
        except (RecallQError, asyncio.CancelledError) as stopped:
            error = str(stopped) or "interrupted"
            raise
        finally:
            display.close()
            report = display.report
            for warning in report.warnings:
                _note(warning)
            if as_json:
                print_json(outcome(report) | {"error": error})
                sys.stdout.flush()
            elif report.source is not None:
                print(summary(report), flush=True)
            _tell_rejects(report)
            if report.stopped and error == "interrupted":
                _note(report.stopped)  # else it is part of the error
    return display.report


def _tell_rejects(report: IngestReport) -> None:
    if not report.rejects:
        return
    rejected = count(report.rejected + report.rejected_earlier, report.noun)
    _note(f"{rejected} rejected; which and why is in {', '.join(report.rejects)}")
    most = sorted(report.reasons.items(), key=lambda each: -each[1])
    for reason, lines in most[:_MOST_REASONS]:
        _note(f"  {lines:,} x {reason}")


def _note(text: str) -> None:
    print(f"recallq: {printable(text)}", file=sys.stderr, flush=True)


# --- progress -----------------------------------------------------------------------------------


def _counts(report: IngestReport) -> str:
    parts = [
        count(report.added + report.already_stored, "message"),
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
