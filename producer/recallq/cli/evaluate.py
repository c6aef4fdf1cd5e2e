"""``recallq eval``: how much of what questions need the running configuration finds."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from recallq.cli.connection import UrlOption, connect
from recallq.cli.memory import JsonOption, print_json
from recallq.cli.runner import guarded, run
from recallq.evaluation import (
    CATEGORIES,
    CUTOFFS,
    Conversation,
    Report,
    evaluate,
    read_conversations,
)


def evaluate_command(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="Conversations with questions, as LoCoMo's.")
    ],
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a call may take.")] = 600.0,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure search: recall at 5, 10 and 30 by category of question.

    Stores the conversations of FILE under a tenant of their own, asks their questions as any agent
    would, and deletes them again. What is measured is the configuration that the workers run.
    """
    conversations = guarded(lambda: read_conversations(path))

    async def work() -> tuple[Report, str]:
        async with connect(url, tenant=f"eval-{secrets.token_hex(4)}") as client:
            health = await client.check_backend(timeout)
            with _progress(conversations) as progress:
                tasks = {task.description: task.id for task in progress.tasks}
                report = await evaluate(
                    client,
                    conversations,
                    timeout=timeout,
                    advance=lambda doing, done: progress.advance(tasks[doing], done),
                )
        return report, f"{health.backend}: {health.detail}"

    report, backend = run(work())
    if as_json:
        print_json({"backend": backend, **report.to_dict()})
        return
    print(f"{backend}\n")
    Console().print(_table(report))
    found = report.to_dict()
    print(
        f"{report.messages:,} messages of {len(conversations)} conversations; a search took "
        f"{found['median_search_ms']:.1f} ms (median, 16 at once)"
    )


def _progress(conversations: list[Conversation]) -> Progress:
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    messages = sum(len(said) for each in conversations for said in each.sessions.values())
    progress.add_task("stored", total=messages)
    progress.add_task("asked", total=sum(len(each.questions) for each in conversations))
    return progress


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("questions")
    table.add_column("count", justify="right")
    for cutoff in CUTOFFS:
        table.add_column(f"recall@{cutoff}", justify="right")
    for category in sorted(report.recalls):
        _add_row(table, report, CATEGORIES[category], category)
    _add_row(table, report, "all", None)
    return table


def _add_row(table: Table, report: Report, name: str, category: int | None) -> None:
    recalls = [f"{report.recall(cutoff, category):.3f}" for cutoff in CUTOFFS]
    table.add_row(name, f"{report.count(category):,}", *recalls)
