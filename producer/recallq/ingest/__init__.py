"""Bulk ingestion into memory: what ``recallq ingest`` and ``recallq import-tablestore`` run.

    async with MemoryClient(url) as client:
        report = await ingest(client, ["conversations.jsonl"], IngestOptions(resume=True))

Ingesting a file again adds nothing: see `recallq.ingest.formats` for what makes two messages the
same, and for the formats. A table of agentscope-runtime's in Tablestore is another feed: see
`recallq.ingest.tablestore`.
"""

from recallq.ingest.feed import Feed
from recallq.ingest.formats import Defaults, Line, Reject, Turn, parse
from recallq.ingest.journal import Checkpoint
from recallq.ingest.report import IngestOptions, IngestReport, Progress
from recallq.ingest.runner import Adder, check, ingest
from recallq.ingest.source import Source

__all__ = [
    "Adder",
    "Checkpoint",
    "Defaults",
    "Feed",
    "IngestOptions",
    "IngestReport",
    "Line",
    "Progress",
    "Reject",
    "Source",
    "Turn",
    "check",
    "ingest",
    "parse",
]
