"""What ``recallq status`` shows of a fleet."""

from __future__ import annotations

import pytest
from rich.console import Console

from recallq.cli.status import _duration, _view
from recallq.contract import Lane
from recallq.fleet import FleetState, LaneState
from recallq.workers import WorkerInfo


def fleet(
    at: float = 100.0,
    settled: int = 0,
    oldest: float | None = None,
    outstanding: int = 0,
    dead: int = 0,
    *,
    alone: bool = False,
    slow_waits: float | None = None,
) -> FleetState:
    worker = WorkerInfo(
        id="w-1", host="h", pid=1, version="1.2", backend="redis", lanes=[Lane.LIVE],
        concurrency=8, started_at=40.0,
    )  # fmt: skip
    lanes = tuple(
        LaneState(lane, outstanding, 1, oldest, settled + 10, settled, 0 if alone else 1)
        for lane in Lane
    )
    return FleetState(at, lanes, 2, 3, 4, 5, slow_waits, dead, () if alone else (worker,))


def shown(*looks: FleetState, trouble: str | None = None) -> str:
    console = Console(width=120, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(_view(list(looks), trouble))
    return capture.get()


def line_of(text: str, start: str) -> list[str]:
    (line,) = (each for each in text.splitlines() if each.startswith(start))
    return line.split()


def test_rates_are_those_between_the_looks() -> None:
    text = shown(fleet(100.0, settled=1000), fleet(105.0, settled=6000, outstanding=1234))
    assert line_of(text, "live") == ["live", "1", "1,234", "-", "1,000", "1,000"]


def test_one_look_has_no_rates() -> None:
    assert line_of(shown(fleet(oldest=0.5)), "bulk") == ["bulk", "1", "0", "500", "ms", "-", "-"]


def test_counters_that_went_back_have_none() -> None:
    text = shown(fleet(100.0, settled=1000), fleet(105.0, settled=5))
    assert line_of(text, "bulk") == ["bulk", "1", "0", "-", "-", "-"]


def test_everything_else_is_told() -> None:
    text = shown(fleet(dead=1))
    for words in ("2 running, 3 put off", "4 users to extract for, 5 batches", "dead letters: 1"):
        assert words in text
    assert "due for" not in text
    assert "searchable, the first due for 1.5 s" in shown(fleet(slow_waits=1.5))
    assert line_of(text, "w-1") == ["w-1", "redis", "live", "1.2", "60.0", "s"]


def test_a_fleet_without_workers_says_what_to_do() -> None:
    assert "recallq worker" in shown(fleet(alone=True))


def test_trouble_is_shown_above_what_was_seen_last() -> None:
    text = shown(fleet(), trouble="Redis is gone")
    assert text.index("Redis is gone") < text.index("outstanding")
    assert "Redis is gone" in shown(trouble="Redis is gone")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.02, "20 ms"), (1, "1.0 s"), (119, "119.0 s"), (600, "10 min"), (7200, "2 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert _duration(seconds) == words
