"""Puts the commands together."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from recallq import __version__
from recallq.cli import dead, doctor, memory, service, status
from recallq.cli.demo import demo
from recallq.cli.evaluate import evaluate_command
from recallq.cli.import_tablestore import import_tablestore
from recallq.cli.ingest import ingest_command

app = typer.Typer(
    name="recallq",
    help="Long-term memory for fleets of AI agents, behind a task queue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"recallq {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_tell_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


app.command("demo")(demo)
app.command("up")(service.up)
app.command("worker")(service.worker)
app.command("add")(memory.add)
app.command("search")(memory.search)
app.command("list")(memory.list_)
app.command("delete")(memory.delete)
app.command("ingest")(ingest_command)
app.command("import-tablestore")(import_tablestore)
app.add_typer(dead.app, name="dead", no_args_is_help=True)
app.command("status")(status.status)
app.command("doctor")(doctor.doctor)
app.command("eval")(evaluate_command)
app.command("reindex")(service.reindex)
app.command("backends")(service.backends)


def main() -> None:
    """The entry point of the ``recallq`` command."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
