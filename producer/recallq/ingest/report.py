"""What an ingestion is asked for, and what it tells: its options and its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recallq.contract import Lane, Wait
from recallq.ingest.stream import MAX_PIECE_BYTES

_MOST_REASONS = 20


@dataclass(frozen=True, slots=True)
class IngestOptions:
    """Times are in seconds."""

    user: str | None = None
    """For lines that name no user; None rejects them."""
    session: str | None = None
    """For lines that name no session; None rejects single messages, and gives each conversation
    a session of its own."""
    lane: Lane = Lane.BULK
    rejects: Path | None = None
    """Where rejected lines go; None is ``FILE.rejects.jsonl`` next to each file."""
    resume: bool = False
    """Go on where the last run of each file stopped, by its checkpoint."""
    checkpoint: bool = True
    """Keep ``FILE.recallq-ingest.json`` next to each file, for `resume`."""
    window: int = 1000
    """Messages in flight. More than the client's ``max_in_flight`` only wait there."""
    wait: Wait = "stored"
    """What counts as ingested, where the backend tells the two apart."""
    timeout: float = 120.0
    """How long a message may wait for its answer."""
    patience: float = 60.0
    """How long Redis may be out of reach before the run ends."""
    max_line_bytes: int = MAX_PIECE_BYTES
    target: str = ""
    """Where it goes, for people to read: what was ingested to one place is not resumed to
    another. No credentials; it is written to the checkpoint."""


@dataclass(slots=True)
class IngestReport:
    """What came of it; while it runs, what has come of it so far."""

    lines: int = 0
    """Lines and items of arrays that were read, blank ones not counted; of a table, its rows."""
    messages: int = 0
    """Messages in them."""
    added: int = 0
    already_stored: int = 0
    """Messages that were stored before this run, came twice in it, or were stored by an attempt
    whose answer was lost."""
    rejected: int = 0
    """Lines."""
    rejected_earlier: int = 0
    """Lines rejected by the interrupted runs that this one resumed."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How many lines were rejected and why; of very many reasons, the later ones together."""
    seconds: float = 0.0
    rejects: list[str] = field(default_factory=list)
    """The files that hold the rejected lines."""
    warnings: list[str] = field(default_factory=list)
    stopped: str | None = None
    """Where it stopped and how to go on, if it did not come to the end."""

    source: str | None = None
    """The one at hand."""
    noun: str = "line"
    """What one of its lines is called."""
    bytes_done: int = 0
    """How far it is, in bytes as it lies on disk; 0 until its first line has settled."""
    bytes_total: int | None = None
    """None if its size cannot be known."""
    waiting: str | None = None
    """What holds it back, if anything does."""

    @property
    def rate(self) -> float:
        """Messages per second."""
        return (self.added + self.already_stored) / self.seconds if self.seconds > 0 else 0.0

    def reject(self, reason: str) -> None:
        """Counts a line that is rejected."""
        self.rejected += 1
        if reason not in self.reasons and len(self.reasons) >= _MOST_REASONS:
            reason = "other reasons"
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        names = ("lines", "messages", "added", "already_stored", "rejected", "rejected_earlier",
                 "reasons", "rejects", "warnings", "stopped")  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        return found | {
            "seconds": round(self.seconds, 3),
            "messages_per_second": round(self.rate, 1),
        }


Progress = Callable[[IngestReport], None]
"""Called on the event loop a few times a second, and at the end of each source."""
