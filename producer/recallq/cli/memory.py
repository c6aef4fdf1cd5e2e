"""``recallq add | search | list | delete``: the four calls from a shell."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Optional

import orjson
import typer
from rich.console import Console
from rich.table import Table

from recallq.cli.connection import UrlOption, connect
from recallq.cli.runner import fail, run
from recallq.contract import StoredMessage, Wait
from recallq.messages import Message

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
UserArgument = Annotated[str, typer.Argument(help="User id.", show_default=False)]
SessionOption = Annotated[Optional[str], typer.Option("--session", "-s", help="Session id.")]
TenantOption = Annotated[Optional[str], typer.Option("--tenant", help="Tenant.")]
WaitOption = Annotated[
    Optional[Wait],
    typer.Option(help="Wait until messages are stored, or until searches find them as well."),
]
TimeoutOption = Annotated[
    Optional[float], typer.Option("--timeout", help="Seconds to wait for the answer.")
]


def add(
    user: UserArgument,
    text: Annotated[
        list[str], typer.Argument(help="Messages to remember; '-' reads one from stdin.")
    ],
    session: SessionOption = None,
    role: Annotated[str, typer.Option(help="Who said it.")] = "user",
    infer: Annotated[
        Optional[bool],
        typer.Option(help="Have an LLM extract memories, or not, where the backend can."),
    ] = None,
    wait: WaitOption = None,
    tenant: TenantOption = None,
    timeout: TimeoutOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remember messages of a user."""
    texts = [sys.stdin.read().rstrip("\n") if each == "-" else each for each in text]
    messages = [{"role": role, "content": each} for each in texts]

    async def work() -> None:
        async with connect(url, tenant=tenant) as client:
            added = await client.add_memory(
                user, messages, session, timeout=timeout, infer=infer, wait=wait
            )
        if as_json:
            print_json(added.model_dump())
        else:
            print(f"stored {count(added.added, 'message')} for {user}")

    run(work())


def search(
    user: UserArgument,
    query: Annotated[list[str], typer.Argument(help="What to look for.", show_default=False)],
    session: SessionOption = None,
    top_k: Annotated[Optional[int], typer.Option("--top-k", "-k", help="Most hits.")] = None,
    threshold: Annotated[Optional[float], typer.Option("--threshold", help="Lowest score.")] = None,
    tenant: TenantOption = None,
    timeout: TimeoutOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find what a user said, best matches first."""
    filters = {"session_id": session, "top_k": top_k, "score_threshold": threshold}

    async def work() -> None:
        async with connect(url, tenant=tenant) as client:
            hits = await client.search(user, " ".join(query), filters, timeout=timeout)
        if as_json:
            print_json([_as_json(hit) for hit in hits])
        elif not hits:
            print("nothing found")
        else:
            _print_table(hits, score=True)

    run(work())


def list_(
    user: UserArgument,
    session: SessionOption = None,
    page: Annotated[int, typer.Option("--page", "-p", help="Page number, from 1.")] = 1,
    size: Annotated[int, typer.Option("--size", "-n", help="Messages a page.")] = 10,
    tenant: TenantOption = None,
    timeout: TimeoutOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a user's messages, oldest first, by page."""
    filters = {"session_id": session, "page_num": page, "page_size": size}

    async def work() -> None:
        async with connect(url, tenant=tenant) as client:
            records = await client.list_records(user, filters, timeout=timeout)
        if as_json:
            print_json([_as_json(record) for record in records])
        elif not records:
            print("no messages" if page == 1 else f"no messages on page {page}")
        else:
            _print_table(records, score=False)
            if len(records) == size:
                print(f"page {page}; the next is --page {page + 1}")

    run(work())


def delete(
    user: UserArgument,
    session: SessionOption = None,
    whole_user: Annotated[
        bool, typer.Option("--all", help="Delete everything of the user.")
    ] = False,
    tenant: TenantOption = None,
    timeout: TimeoutOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a session of a user, or with --all everything of the user."""
    if whole_user == (session is not None):
        fail("say either --session ID or --all", code=2)

    async def work() -> None:
        async with connect(url, tenant=tenant) as client:
            deleted = await client.delete_memory(user, session, timeout=timeout)
        if as_json:
            print_json(deleted.model_dump())
        else:
            what = "everything" if session is None else f"session {session}"
            print(f"deleted {what} of {user}: {count(deleted.removed, 'message')}")

    run(work())


def _as_json(record: StoredMessage) -> dict[str, Any]:
    message = record.message
    plain = message.to_dict() if isinstance(message, Message) else message
    return {**record.model_dump(mode="json", exclude={"message"}), "message": plain}


def print_json(value: Any) -> None:
    sys.stdout.write(orjson.dumps(value).decode() + "\n")


def _print_table(records: list[Any], *, score: bool) -> None:
    table = Table(box=None, pad_edge=False)
    if score:
        table.add_column("score", justify="right")
    table.add_column("time (UTC)", style="dim", no_wrap=True)
    table.add_column("session", no_wrap=True, max_width=24, overflow="ellipsis")
    table.add_column("who", no_wrap=True, max_width=12, overflow="ellipsis")
    table.add_column("message", overflow="fold")
    for record in records:
        message: Message = record.message
        row = [
            f"{record.created_at:%Y-%m-%d %H:%M:%S}",
            printable(record.session_id),
            printable(message.role or ""),
            printable(message.text),
        ]
        table.add_row(*([f"{record.score:.2f}"] if score else []), *row)
    Console(highlight=False, markup=False).print(table)


def printable(text: str) -> str:
    """`text` without what would move the cursor or colour the terminal."""
    return "".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in text)


def count(number: int, noun: str) -> str:
    """``1 message``, ``1,451 messages``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
