"""A small conversation log to try things on: fictional people, several sessions, two languages."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def path() -> Path:
    """Where the log lies: JSON Lines, as ``recallq ingest`` takes them."""
    return Path(str(files(__name__).joinpath("conversations.jsonl")))
