"""``recallq import-tablestore``: what agentscope-runtime 1.0 kept in Tablestore, into memory."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from recallq.cli.connection import UrlOption, connect, describe_target, named_url
from recallq.cli.ingestion import see_through
from recallq.cli.memory import count
from recallq.cli.runner import fail, guarded, run
from recallq.contract import Lane, Wait
from recallq.errors import InvalidInput
from recallq.ingest import IngestOptions, IngestReport, check
from recallq.ingest.rehearsal import Rehearsal
from recallq.ingest.tablestore import DEFAULT_TABLE, TablestoreTable
from recallq.settings import ClientSettings
from recallq.tablestore_access import TablestoreAccess


def import_tablestore(
    end_point: Annotated[
        str | None,
        typer.Option("--end-point", help="Of the instance; else RECALLQ_TABLESTORE_END_POINT."),
    ] = None,
    instance_name: Annotated[
        str | None,
        typer.Option("--instance-name", help="Else RECALLQ_TABLESTORE_INSTANCE_NAME."),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option("--region", help="For signatures of version 4."),
    ] = None,
    table: Annotated[str, typer.Option("--table", help="The table to read.")] = DEFAULT_TABLE,
    text_field: Annotated[
        str, typer.Option("--text-field", help="The column that holds the texts.")
    ] = "text",
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="A column of your own to keep with messages; repeatable."),
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", "-u", help="Bring over this user only.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check everything, store nothing.")
    ] = False,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Tenant to store for.")] = None,
    lane: Annotated[Lane, typer.Option("--lane", help="Queue to use.")] = Lane.BULK,
    rejects: Annotated[
        Path | None,
        typer.Option("--rejects", help="Where bad rows go.  [default: TABLE.rejects.jsonl]"),
    ] = None,
    window: Annotated[int, typer.Option("--window", min=1, help="Messages in flight.")] = 1000,
    wait: Annotated[
        Wait,
        typer.Option(help="What counts as imported: stored, or found by searches as well."),
    ] = "stored",
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds a message may wait for its answer.")
    ] = 120.0,
    url: UrlOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, for scripts.")
    ] = False,
) -> None:
    """Bring over what agentscope-runtime 1.0 stored in Tablestore, to whatever backend runs here.

    The table is only read. Each row becomes a message of the same user and session, at the time at
    which it was written. Importing a table again stores nothing twice, so an import that was
    interrupted is simply run again. The access key comes from the environment alone:
    RECALLQ_TABLESTORE_ACCESS_KEY_ID, RECALLQ_TABLESTORE_ACCESS_KEY_SECRET and, if there is one,
    RECALLQ_TABLESTORE_STS_TOKEN. Bad rows do not stop the rest: they are written to the rejects
    file, and the exit code is 1.
    """
    # Of their warnings, what matters is told as progress.
    for library in ("tablestore", "urllib3.connectionpool"):
        logging.getLogger(library).setLevel(logging.ERROR)
    options = IngestOptions(
        lane=lane, rejects=rejects, checkpoint=False, window=window, wait=wait, timeout=timeout
    )
    access = guarded(
        lambda: TablestoreAccess.load(
            end_point=end_point, instance_name=instance_name, region=region
        )
    )
    try:
        source = TablestoreTable(
            access, table, text_field=text_field, extra=column or (), user=user
        )
        check([source], options)
    except InvalidInput as error:
        fail(str(error), code=2)
    guarded(source.check)
    if dry_run:
        report = guarded(lambda: _rehearse(source, options, url, tenant, as_json=as_json))
    else:
        adder = connect(url, tenant=tenant, max_in_flight=window)
        report = run(see_through(adder, [source], options, as_json=as_json))
    if report.rejected:
        raise typer.Exit(1)


def _rehearse(
    source: TablestoreTable,
    options: IngestOptions,
    url: str | None,
    tenant: str | None,
    *,
    as_json: bool,
) -> IngestReport:
    """Counts what would be stored, and looks for what could not be."""
    target = describe_target(url, tenant)
    rehearsal = Rehearsal(ClientSettings.load(redis_url=url or named_url(), tenant=tenant))

    def summary(report: IngestReport) -> str:
        first, last = rehearsal.first, rehearsal.last
        told = (
            f"dry run: would store {count(rehearsal.messages, 'message')} of "
            f"{count(rehearsal.users, 'user')} in {count(rehearsal.sessions, 'session')}"
        )
        if first is not None and last is not None:
            told += f", written from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} (UTC)"
        rows = count(report.lines, report.noun)
        return f"{told}, in {target}; {rows} read, {report.rejected:,} rejected"

    def outcome(report: IngestReport) -> dict[str, Any]:
        told = {"dry_run": True, "target": target, "added": 0}
        return report.to_dict() | told | rehearsal.to_dict()

    return run(
        see_through(
            contextlib.nullcontext(rehearsal),
            [source],
            options,
            as_json=as_json,
            summary=summary,
            outcome=outcome,
        )
    )
