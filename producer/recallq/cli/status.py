"""``recallq status``: lanes, workers and what went wrong, once or for as long as somebody looks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import deque
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from recallq.cli.connection import UrlOption, connect_existing
from recallq.cli.memory import JsonOption
from recallq.cli.runner import guarded
from recallq.errors import ServiceUnavailable
from recallq.fleet import FleetState

_RATES_OVER = 5.0
"""Seconds that rates are taken over, at least."""
_STALE = 30.0
"""Seconds after which a message that waits is a sign that workers are missing."""


def status(
    url: UrlOption = None,
    as_json: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on looking, until Ctrl-C.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show lanes, workers and dead letters."""
    if not watch:
        guarded(lambda: asyncio.run(_look_once(url, as_json=as_json)))
        return

    def look_on() -> None:
        with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
            asyncio.run(_look_on(url, every, as_json=as_json))

    guarded(look_on)


async def _look_once(url: str | None, *, as_json: bool) -> None:
    async with connect_existing(url) as client:
        state = await client.transport.fleet()
    if as_json:
        _write(_report(state))
    else:
        Console().print(_view([state]))


async def _look_on(url: str | None, every: float, *, as_json: bool) -> None:
    # What the client would log of a lost Redis is what the view shows.
    logging.getLogger("recallq").addHandler(logging.NullHandler())
    console = Console()
    live = Live(console=console, auto_refresh=False)
    drawn = console.is_terminal and not as_json
    looks: deque[FleetState] = deque()
    trouble: str | None = None
    async with connect_existing(url) as client:
        with live if drawn else contextlib.nullcontext():
            while True:
                began = time.monotonic()
                try:
                    state = await client.transport.fleet()
                    if looks and state.at < looks[-1].at:
                        looks.clear()  # another Redis has taken over, with a clock of its own
                    looks.append(state)
                    trouble = None
                except ServiceUnavailable as error:
                    trouble = str(error)
                while len(looks) > 2 and looks[1].at < looks[-1].at - _RATES_OVER:
                    looks.popleft()
                if as_json:
                    _write(_report(looks[-1]) if trouble is None else {"error": trouble})
                elif drawn:
                    live.update(_view(looks, trouble), refresh=True)
                else:
                    console.print(_view(looks, trouble))
                await asyncio.sleep(max(every - (time.monotonic() - began), 0.0))


def _write(report: dict[str, Any]) -> None:
    sys.stdout.write(orjson.dumps(report).decode() + "\n")
    sys.stdout.flush()


def _report(state: FleetState) -> dict[str, Any]:
    """For scripts. Times are in seconds."""
    return {
        "at": state.at,
        "lanes": {
            each.lane.value: {
                "outstanding": each.outstanding,
                "queued_batches": each.queued,
                "oldest": each.oldest,
                "accepted": each.accepted,
                "settled": each.settled,
                "workers": each.workers,
            }
            for each in state.lanes
        },
        "running_batches": state.running,
        "delayed_batches": state.delayed,
        "in_slow_lane": state.extracting + state.indexing,
        "slow_lane_waits": state.slow_waits,
        "dead_letters": state.dead_letters,
        "memory": state.memory,
        "memory_limit": state.memory_limit,
        "workers": [each.model_dump(mode="json") for each in state.workers],
    }


# --- for people ---------------------------------------------------------------------------------


def _view(looks: deque[FleetState] | list[FleetState], trouble: str | None = None) -> Group:
    """What there is to see: `looks` are from old to new."""
    shown: list[RenderableType] = []
    if trouble is not None:
        shown.append(Text(trouble, style="bold red"))
    if looks:
        first, last = looks[0], looks[-1]
        shown += [_lanes(first, last), "", _rest(last)]
        if last.full:
            text = (
                f"Redis is out of memory ({last.memory:,} bytes of maxmemory "
                f"{last.memory_limit:,}) and takes no writes, not even workers' signs of life"
            )
            shown.append(Text(text, style="bold red"))
        if last.workers:
            shown += ["", _workers(last)]
        elif not last.full:
            shown.append(
                Text("no worker is running; start one with 'recallq worker'", style="bold yellow")
            )
    return Group(*shown)


def _lanes(first: FleetState, last: FleetState) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("lane")
    for name in ("workers", "outstanding jobs", "oldest waits", "accepted/s", "settled/s"):
        table.add_column(name, justify="right")
    seconds = last.at - first.at
    for lane in last.lanes:
        before = first.lane(lane.lane)
        table.add_row(
            lane.lane.value,
            str(lane.workers),
            f"{lane.outstanding:,}",
            _age(lane.oldest),
            _rate(lane.accepted - before.accepted, seconds),
            _rate(lane.settled - before.settled, seconds),
        )
    return table


def _age(seconds: float | None) -> Text:
    if seconds is None:
        return Text("-")
    return Text(_duration(seconds), style="bold yellow" if seconds > _STALE else "")


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.0f} h"


def _rate(jobs: int, seconds: float) -> str:
    """Jobs per second; counters that went back are those of a Redis that has lost them."""
    return f"{jobs / seconds:,.0f}" if seconds > 0 and jobs >= 0 else "-"


def _rest(state: FleetState) -> Text:
    text = Text(f"batches: {state.running:,} running, {state.delayed:,} put off\n")
    text.append(
        f"slow lane: {state.extracting:,} users to extract for, "
        f"{state.indexing:,} batches to make searchable"
    )
    if state.slow_waits is not None:
        text.append(", the first due for ").append(_age(state.slow_waits))
    text.append("\n")
    text.append(
        f"dead letters: {state.dead_letters:,}", style="bold red" if state.dead_letters else ""
    )
    return text


def _workers(state: FleetState) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("worker", "backend", "lanes", "version", "up"):
        table.add_column(name, justify="right" if name == "up" else "left", overflow="fold")
    for each in state.workers:
        table.add_row(
            each.id,
            each.backend,
            ", ".join(each.lanes),
            each.version,
            _duration(max(state.at - each.started_at, 0.0)),
        )
    return table
