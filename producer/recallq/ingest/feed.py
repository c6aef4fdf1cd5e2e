"""What an ingestion reads from: a conversation log (`source`), or a table (`tablestore`).

The runner asks a feed for its lines and knows nothing else of it; all that makes ingestion safe -
the order of calls, the bounds, waiting for the service, rejects - is the same for every feed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from recallq.ingest.formats import Line
from recallq.ingest.report import IngestOptions
from recallq.ingest.stream import Position


class Feed(Protocol):
    @property
    def name(self) -> str:
        """What people see."""

    @property
    def noun(self) -> str:
        """What one of its lines is called."""

    @property
    def size(self) -> int | None:
        """In the unit of `Piece.consumed`; None if it cannot be known."""

    @property
    def waiting(self) -> str | None:
        """What holds reading back, if anything does."""

    @property
    def default_rejects(self) -> Path:
        """Where its rejected lines go unless the caller says."""

    def lines(self, start: Position, options: IngestOptions) -> Iterator[Line]:
        """The lines behind `start`, read as they are asked for; blocks, so it is a thread's.

        Raises `RecallQError`, `READ_ERRORS`.
        """
