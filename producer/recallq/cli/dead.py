"""``recallq dead list | show | replay | purge``: what to do about writes that failed for good."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Optional

import orjson
import typer
from rich.console import Console
from rich.table import Table

from recallq.cli.connection import UrlOption, connect_existing
from recallq.cli.memory import (
    JsonOption,
    SessionOption,
    TenantOption,
    count,
    print_json,
    printable,
)
from recallq.cli.runner import fail, run
from recallq.client import MemoryClient
from recallq.dead_letters import DeadLetter
from recallq.errors import InvalidInput, UnknownJob

app = typer.Typer(help="Jobs that failed for good: look at them, replay or purge them.")

_SHORTEST_ERROR = 20
"""Characters of an error that a table shows at least, be it wider than the terminal."""

_UNBOUNDED = 10_000

IdsArgument = Annotated[Optional[list[str]], typer.Argument(help="Ids.", show_default=False)]
UserOption = Annotated[Optional[str], typer.Option("--user", "-u", help="Those of a user.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them, of all tenants.")]
OlderOption = Annotated[
    Optional[float], typer.Option("--older-than", min=0, help="Those that died so many days ago.")
]


@app.command("list")
def list_(
    user: UserOption = None,
    session: SessionOption = None,
    older_than: OlderOption = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most lines.")] = 50,
    tenant: TenantOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, oldest first."""

    async def work() -> None:
        async with connect_existing(url, tenant=tenant) as client:
            letters = await client.dead_letters.list(
                user, session, before=_before(older_than), limit=limit
            )
            total = await client.dead_letters.count()
        if as_json:
            print_json([_summary(letter) for letter in letters])
            return
        if not letters:
            print("no dead letters" if total == 0 else f"none of these; {total:,} in all")
            return
        _print_table(letters)
        if len(letters) < total:
            print(f"{len(letters):,} of {total:,}; 'recallq dead show ID' shows one")

    run(work())


@app.command()
def show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="Id.", show_default=False)],
    url: UrlOption = None,
) -> None:
    """Show all of a dead letter, as JSON: the job with its messages, the error, the history."""

    async def work() -> None:
        async with connect_existing(url) as client:
            letter = await client.dead_letters.get(letter_id)
        shown = orjson.dumps(letter.model_dump(mode="json"), option=orjson.OPT_INDENT_2)
        sys.stdout.write(shown.decode() + "\n")

    run(work())


@app.command()
def replay(
    ids: IdsArgument = None,
    user: UserOption = None,
    session: SessionOption = None,
    older_than: OlderOption = None,
    every: AllOption = False,
    unsigned: Annotated[
        bool,
        typer.Option(
            "--unsigned", help="Also what may be anybody's, for no signature on it was good."
        ),
    ] = False,
    tenant: TenantOption = None,
    url: UrlOption = None,
) -> None:
    """Submit dead jobs again, as old as they are: they keep their place, and nothing is stored
    twice."""

    async def again(client: MemoryClient, letter: DeadLetter) -> bool:
        handle = await client.dead_letters.replay(letter, unsigned=unsigned)
        print(f"{letter.id} runs again as {handle.id}")
        return True

    _for_each(again, "replayed", ids, user, session, older_than, every, tenant, url)


@app.command()
def purge(
    ids: IdsArgument = None,
    user: UserOption = None,
    session: SessionOption = None,
    older_than: OlderOption = None,
    every: AllOption = False,
    tenant: TenantOption = None,
    url: UrlOption = None,
) -> None:
    """Forget dead jobs for good, with what users said in them."""

    async def forget(client: MemoryClient, letter: DeadLetter) -> bool:
        return await client.dead_letters.purge(letter)

    _for_each(forget, "purged", ids, user, session, older_than, every, tenant, url)


def _for_each(
    work: Callable[[MemoryClient, DeadLetter], Awaitable[bool]],
    said: str,
    ids: list[str] | None,
    user: str | None,
    session: str | None,
    older_than: float | None,
    every: bool,
    tenant: str | None,
    url: str | None,
) -> None:
    """Does `work` for the letters that the options name, and says for how many. Of one that it
    cannot be done for, the others go on, and the command fails."""
    chosen = user is not None or older_than is not None
    if bool(ids) + chosen + every != 1:
        fail("say which: ids, or --user and --older-than, or --all", code=2)

    async def each() -> tuple[int, int]:
        done = failed = 0
        async with connect_existing(url, tenant=tenant) as client:
            letters = client.dead_letters
            if ids:
                # All, before any is done.
                found = [await letters.get(letter_id) for letter_id in ids]
            else:
                found = await letters.list(user, session, before=_before(older_than))
            for letter in found:
                try:
                    done += await work(client, letter)
                except (InvalidInput, UnknownJob) as error:
                    failed += 1
                    print(f"recallq: {error}", file=sys.stderr)
        return done, failed

    done, failed = run(each())
    print(f"{said} {count(done, 'dead letter')}")
    if failed:
        raise typer.Exit(1)


def _before(days: float | None) -> datetime | None:
    return None if days is None else datetime.now(UTC) - timedelta(days=days)


def _summary(letter: DeadLetter) -> dict[str, Any]:
    """A letter without what the user said."""
    return letter.model_dump(mode="json", exclude={"job", "payload", "epochs"})


def _print_table(letters: list[DeadLetter]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("died (UTC)", style="dim", no_wrap=True)
    table.add_column("id", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("user", no_wrap=True, max_width=20, overflow="ellipsis")
    table.add_column("runs", justify="right", no_wrap=True)
    table.add_column("error", no_wrap=True, overflow="ellipsis")  # whole in 'dead show'
    for letter in letters:
        table.add_row(
            f"{letter.died_at:%Y-%m-%d %H:%M:%S}",
            letter.id,
            letter.operation.value if letter.operation else letter.kind,
            printable(letter.scope.user_id) if letter.scope else "",
            str(letter.attempts),
            printable(f"{letter.code}: {letter.error}"),
        )
    console = Console(highlight=False, markup=False)
    # It is the error that gives way on a narrow terminal, and never an id, which commands take.
    error = table.columns[-1]
    error.max_width = 1
    unbounded = console.options.update(width=_UNBOUNDED)
    others = console.measure(table, options=unbounded).maximum - 1
    error.max_width = max(console.width - others, _SHORTEST_ERROR)
    console.width = max(console.width, others + error.max_width)
    console.print(table)
