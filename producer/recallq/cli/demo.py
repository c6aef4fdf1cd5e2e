"""``recallq demo``: the main job from end to end, in front of the user's eyes.

A real Redis, a real worker process and the public client, on the sample conversations that come
with the package. Nothing is left behind.
"""

from __future__ import annotations

import time
from collections import Counter

import orjson
from rich.cells import cell_len, chop_cells

from recallq import sample
from recallq.cli.memory import count, printable
from recallq.cli.runner import guarded, run
from recallq.cli.stack import Stack
from recallq.client import MemoryClient
from recallq.contract import StoredMessage
from recallq.errors import RecallQError
from recallq.ingest import IngestOptions, ingest

_QUERIES = (("alice", "peanut allergy"), ("小林", "龙井茶"), ("alice", "order A-1043"))
_PAGE_SIZE = 4
_WIDTH = 76


def demo() -> None:
    """Show the main job on a sample conversation log, with a Redis and a worker of its own."""
    print("Starting a private Redis and a worker process ...", flush=True)
    stack = Stack(None)
    began = time.monotonic()
    try:
        guarded(stack.start)
        print(f"  Redis at {stack.url}, worker process {stack.workers[0].pid}, "
              f"ready after {time.monotonic() - began:.1f} s", flush=True)  # fmt: skip
        run(_show(stack.url))
    finally:
        stack.stop()
    print("\nThat was the main job. Redis and the worker are stopped; nothing is left behind.")


async def _show(url: str) -> None:
    async with MemoryClient(url) as memory:
        await _ingest(memory)
        await _search(memory)
        await _list(memory, "alice")
        await _delete_session(memory, "alice", "standing-desk")
        await _delete_user(memory, "bob")


async def _ingest(memory: MemoryClient) -> None:
    log = sample.path()
    users = Counter(orjson.loads(line)["user_id"] for line in log.read_bytes().splitlines())
    _step("Ingest", f"a conversation log of {count(len(users), 'user')}, through the bulk lane")
    report = await ingest(memory, [log], IngestOptions(checkpoint=False))
    told = ", ".join(f"{user} {number}" for user, number in users.items())
    print(f"  stored {count(report.added, 'message')} in {report.seconds:.2f} s: {told}")
    again = await ingest(memory, [log], IngestOptions(checkpoint=False))
    print(f"  the same log once more stored {again.added}: "
          f"all {again.already_stored} were known by their ids")  # fmt: skip
    _expect(report.added == sum(users.values()) and again.added == 0, "ingesting twice")


async def _search(memory: MemoryClient) -> None:
    for user, query in _QUERIES:
        _step("Search", f"{user}'s memories for {query!r}, best first")
        hits = await memory.search(user, query, {"top_k": 3})
        for hit in hits:
            print(f"  {hit.score:.2f}  {_line(hit)}")
        _expect(bool(hits), f"searching for {query!r}")


async def _list(memory: MemoryClient, user: str) -> None:
    _step("List", f"{user}'s memories by page, {_PAGE_SIZE} a page, in the order they were said")
    total = page = 0
    while records := await memory.list_records(
        user, {"page_num": page + 1, "page_size": _PAGE_SIZE}
    ):
        page += 1
        total += len(records)
        if page <= 2:
            print(f"  page {page}")
            for record in records:
                print(f"    {_line(record)}")
    print(f"  ... {page} pages, {count(total, 'message')} in all")


async def _delete_session(memory: MemoryClient, user: str, session: str) -> None:
    _step("Delete a session", f"{session!r} of {user}")
    deleted = await memory.delete_memory(user, session)
    left = await memory.list_memory(user, {"session_id": session})
    rest = await memory.list_memory(user, {"page_size": 1000})
    print(f"  removed {count(deleted.removed, 'message')}; "
          f"{len(left)} left in the session, {len(rest)} in {user}'s others")  # fmt: skip
    _expect(deleted.removed > 0 and not left and bool(rest), "deleting a session")


async def _delete_user(memory: MemoryClient, user: str) -> None:
    _step("Delete a user", f"everything of {user}")
    deleted = await memory.delete_memory(user)
    left = await memory.list_memory(user)
    others = await memory.list_memory("小林", {"page_size": 1000})
    print(f"  removed {count(deleted.removed, 'message')}; {len(left)} left of {user}, "
          f"小林's {len(others)} untouched")  # fmt: skip
    _expect(deleted.removed > 0 and not left and bool(others), "deleting a user")


def _step(name: str, what: str) -> None:
    print(f"\n{name}: {what}", flush=True)


def _line(record: StoredMessage) -> str:
    """A stored message on one line: session, who, and the beginning of what was said."""
    said = " ".join(printable(record.message.text).split())
    if cell_len(said) > _WIDTH:  # a Chinese character takes two columns
        said = chop_cells(said, _WIDTH - 3)[0] + "..."
    return f"[{printable(record.session_id)}] {record.message.role}: {said}"


def _expect(as_told: bool, step: str) -> None:
    """A demo that shows something else than it says must not look like a success."""
    if not as_told:
        raise RecallQError(f"{step} did not do what it should; please report this")
