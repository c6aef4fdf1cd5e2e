"""Figures as a table, and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.benchmarks.speed.clients import Done


@dataclass
class Row:
    """A line of the table: a figure of each side, and how they compare."""

    work: str
    unit: str
    ours: float
    plain: float | None
    target: str
    ratio: float | None = None

    def cells(self) -> list[str]:
        plain = "" if self.plain is None else _figure(self.plain)
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return [self.work, self.unit, _figure(self.ours), plain, ratio, self.target]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = [
        "| work | unit | RecallQ | plain Celery | ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows]
    return "\n".join(lines)


@dataclass
class Rounds:
    """What a work came to on one side, round by round."""

    done: list[Done] = field(default_factory=list)
    spent: list[dict[str, float]] = field(default_factory=list)
    """Processor seconds of client, worker and Redis."""

    def per_second(self) -> float:
        return median(each.times / each.seconds for each in self.done)

    def stored_per_second(self) -> float:
        return median(each.times / each.stored for each in self.done)

    def latency(self, share: float) -> float:
        """A quantile of single calls, in ms; the median of the rounds."""
        return median(
            sorted(each.latencies)[int(share * (len(each.latencies) - 1))] * 1000
            for each in self.done
        )

    def microseconds(self, process: str) -> float:
        """Processor time of one kind of process for each call."""
        return median(
            spent[process] / done.times * 1e6
            for spent, done in zip(self.spent, self.done, strict=True)
        )

    def to_dict(self) -> list[dict[str, Any]]:
        return [
            {
                "calls": done.times,
                "seconds": done.seconds,
                "stored_after": done.stored or None,
                "latencies": done.latencies,
                "processor_seconds": spent,
            }
            for done, spent in zip(self.done, self.spent, strict=True)
        ]
