"""``recallq ingest``: conversation logs into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recallq.cli.connection import UrlOption, connect, describe_target
from recallq.cli.ingestion import see_through
from recallq.cli.runner import fail, guarded, run
from recallq.contract import Lane, Wait
from recallq.errors import InvalidInput
from recallq.ingest import IngestOptions, check
from recallq.ingest.stream import MAX_PIECE_BYTES


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
    adder = connect(url, tenant=tenant, max_in_flight=options.window)
    report = run(see_through(adder, files, options, as_json=as_json))
    if report.rejected or report.rejected_earlier:
        raise typer.Exit(1)


def _target(url: str | None, tenant: str | None, user: str | None, session: str | None) -> str:
    """Where the messages go, for the checkpoint: what one place has is not resumed to another."""
    parts = [describe_target(url, tenant)]
    parts += [f"--user {user}"] if user is not None else []
    parts += [f"--session {session}"] if session is not None else []
    return ", ".join(parts)
