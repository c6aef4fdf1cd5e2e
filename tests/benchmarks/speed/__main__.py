"""``python -m tests.benchmarks.speed``: the table of speed, and where the time goes.

Both sides run on one Redis of their own, a worker process each, in turns: whatever else the machine
does hits both. Figures are medians of the rounds; read ratios rather than figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from tests.benchmarks.speed import plain as plain_app
from tests.benchmarks.speed import stack
from tests.benchmarks.speed.clients import Client
from tests.benchmarks.speed.growth import SIZES, growth
from tests.benchmarks.speed.report import Rounds, Row, markdown
from tests.benchmarks.speed.works import (
    ADDS,
    AT_ONCE,
    BACKLOG,
    LARGE,
    NAPS,
    SEARCHES,
    SINGLE,
    SUBMITTED,
    Work,
)

WORKS = (SINGLE, ADDS, SEARCHES, SUBMITTED, LARGE, NAPS)
_REST = 0.3
"""Seconds between works."""
_MANY, _MANY_MORE = 100_000, 1_000_000
"""Jobs after which the worker's memory is looked at."""

Advance = Callable[[str], None]
Found = dict[str, dict[str, Rounds]]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; medians are told.")] = 3,
    output: Annotated[
        Path, typer.Option("--json", help="Where the figures go, round by round.")
    ] = Path("benchmark.json"),
    only: Annotated[str, typer.Option(help="Only works whose names have this in them.")] = "",
    grow: Annotated[bool, typer.Option(help="Measure one user's memory as it grows.")] = True,
    endure: Annotated[
        bool, typer.Option("--endure", help="Run a million jobs too, for the worker's memory.")
    ] = False,
) -> None:
    """RecallQ against plain Celery."""
    works = [work for work in WORKS if only in work.name]
    backlog = only in BACKLOG.name
    console = Console(stderr=True)
    steps = rounds * 2 * (len(works) + backlog) + grow * len(SIZES) + endure * 2
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    figures: dict[str, Any] = {"machine": _machine(), "rounds": rounds}
    rows: list[Row] = []
    with progress, stack.server() as redis:
        task = progress.add_task("starting", total=steps)

        def advance(what: str) -> None:
            progress.update(task, description=what, advance=1)

        progress.update(task, completed=-1)
        with contextlib.ExitStack() as running:
            ours = stack.our_worker(redis.url, "ours")
            naps = stack.our_worker(redis.url, "naps", "napping")
            running.enter_context(stack.running([ours, naps]))
            plain = running.enter_context(stack.plain_worker(redis.url))
            plain_naps = running.enter_context(
                stack.plain_worker(redis.url, plain_app.NAPS, AT_ONCE)
            )
            server_pid = stack.pid_of(redis)
            clients = {
                name: running.enter_context(stack.client(name, redis.url))
                for name in ("ours", "plain")
            }
            pids = {
                "ours": {NAPS.name: naps.pid, "": ours.pid},
                "plain": {NAPS.name: plain_naps.pid, "": plain.pid},
            }
            found: Found = defaultdict(lambda: defaultdict(Rounds))
            for number in range(rounds):
                for work in works:
                    for side in ("ours", "plain") if number % 2 else ("plain", "ours"):
                        advance(f"{work.name}: {side}")
                        worker = pids[side].get(work.name, pids[side][""])
                        _do(found, side, work, clients[side], worker, server_pid)
                if backlog:
                    _backlogs(found, redis.url, ours.pid, clients["ours"], server_pid, advance)
            rows += _rows(found, works, backlog=backlog)
            figures["works"] = {
                name: {side: each.to_dict() for side, each in sides.items()}
                for name, sides in found.items()
            }
            if grow:
                grown = asyncio.run(growth(redis.url, "ours", advance))
                figures["growth"] = grown
                rows += _growth_rows(grown)
            if endure:
                rows.append(_memory_row(clients["ours"], ours.pid, advance))
        progress.update(task, description="done", completed=steps)
    output.write_text(json.dumps(figures | {"table": [row.__dict__ for row in rows]}, indent=1))
    print(markdown(rows))
    print(f"\nEvery round is in {output}.")


def _machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": platform.python_version(), "at": time.time()}


def _do(
    found: Found, side: str, work: Work, client: Client, worker: int, server: int,
    frozen: list[int] | None = None, name: str | None = None,
) -> None:  # fmt: skip
    """Has a side do a work, and enters what came of it."""
    time.sleep(_REST)
    pids = {"worker": worker, "redis": server}
    before = {process: stack.processor_time(pid) for process, pid in pids.items()}
    times = work.times if side == "ours" else work.plain_times
    done = client.do(work, times, frozen or [])
    spent = {process: stack.processor_time(pid) - before[process] for process, pid in pids.items()}
    rounds = found[name or work.name][side]
    rounds.done.append(done)
    rounds.spent.append(spent | {"client": done.cpu})


def _backlogs(
    found: Found, url: str, worker: int, client: Client, server: int, advance: Advance
) -> None:
    """A backlog for one worker, and for two."""
    advance(f"{BACKLOG.name}: one worker")
    _do(found, "ours", BACKLOG, client, worker, server, [worker], "one worker")
    advance(f"{BACKLOG.name}: two workers")
    second = stack.our_worker(url, "ours")
    with stack.running([second]):
        _do(found, "ours", BACKLOG, client, worker, server, [worker, second.pid], "two workers")


def _rows(found: Found, works: list[Work], *, backlog: bool) -> list[Row]:
    rows = []
    for work in works:
        ours, plain = found[work.name]["ours"], found[work.name]["plain"]

        def row(
            what: str, unit: str, measure: Callable[[Rounds], float], target: str,
            sides: tuple[Rounds, Rounds] = (ours, plain),
        ) -> Row:  # fmt: skip
            ours, plain = map(measure, sides)
            return Row(what, unit, ours, plain, target, ours / plain)

        if work is SINGLE:
            rows.append(row(f"{work.name}, p50", "ms", lambda it: it.latency(0.5), "at most 1"))
            rows.append(row(f"{work.name}, p99", "ms", lambda it: it.latency(0.99), "at most 1"))
        elif work is SUBMITTED:
            rows.append(row(f"{work.name}: accepted", "1/s", Rounds.per_second, "at least 20"))
            rows.append(row(f"{work.name}: stored", "1/s", Rounds.stored_per_second, "at least 15"))
        else:
            target = {
                ADDS.name: "at least 20",
                SEARCHES.name: "at least 12",
                LARGE.name: "at least 10",
                NAPS.name: "1,700 of 2,000 / s",
            }[work.name]
            rows.append(row(work.name, "1/s", Rounds.per_second, target))
        if work is ADDS:
            rows += [
                row(
                    f"processor time of one such call: {process}",
                    "us",
                    partial(Rounds.microseconds, process=process),
                    "at most 0.1" if process == "client" else "",
                )
                for process in ("client", "worker", "redis")
            ]
    if backlog:
        one, two = found["one worker"]["ours"], found["two workers"]["ours"]
        rates = [one.stored_per_second(), two.stored_per_second()]
        rows.append(Row(f"{BACKLOG.name}, one worker", "1/s", rates[0], None, ""))
        rows.append(
            Row(f"{BACKLOG.name}, two workers", "1/s", rates[1], None,
                "at least 1.6 times one", rates[1] / rates[0])
        )  # fmt: skip
    return rows


def _growth_rows(grown: dict[str, dict[int, float]]) -> list[Row]:
    rows = []
    for name, most in (("add", "1.3"), ("list", "1.3"), ("search", "4")):
        small, large = grown[name][SIZES[0]], grown[name][SIZES[-1]]
        rows.append(
            Row(
                f"{name}, {SIZES[-1]:,} messages of the user against {SIZES[0]:,}", "ms",
                large * 1000, None, f"at most {most}", large / small,
            )
        )  # fmt: skip
    return rows


def _memory_row(client: Client, worker: int, advance: Advance) -> Row:
    advance(f"{_MANY:,} jobs")
    client.do(SUBMITTED, _MANY)
    before = stack.memory(worker)
    advance(f"{_MANY_MORE:,} jobs")
    client.do(SUBMITTED, _MANY_MORE - _MANY)
    after = stack.memory(worker)
    return Row(
        f"memory of the worker after {_MANY_MORE:,} jobs against {_MANY:,}", "MB",
        after / 1e6, None, "at most 1.2", after / before,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
