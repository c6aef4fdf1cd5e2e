"""What callers did and were told: the material that the checker judges.

Every client keeps a journal in a file of its own, a line before each call and one for each thing it
learns of it later. So the same reading serves clients of this process and of processes that were
killed: a call that has no second line was made, and nobody knows how it ended.

Times are seconds of the machine's monotonic clock, which all of its processes share.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from recallq.contract import Operation

SUCCEEDED = "succeeded"


@dataclass(slots=True)
class Call:
    """One call of one client."""

    client: str
    number: int
    """Counts the client's calls in the order in which they were made."""
    operation: Operation
    user: str
    session: str | None
    """None is all of the user's sessions."""
    began: float
    lane: str = "live"
    timeout: float | None = None
    """The time that its caller had, in seconds, which is that of its job, too."""
    tokens: list[str] = field(default_factory=list)
    """Of an add: what its messages begin with. Every message has a token of its own."""
    key: str | None = None
    poison: str | None = None
    """What must keep an add from being stored."""

    accepted: float | None = None
    """When the caller knew that the job had been enqueued."""
    refused: bool = False
    """Whether the caller was told that nothing was enqueued."""
    ended: float | None = None
    """When the call returned or raised."""
    job_id: str | None = None
    settled: float | None = None
    """When the caller knew that the job had settled."""
    outcome: str | None = None
    """How the call ended: SUCCEEDED, or the name of the error."""
    error: str = ""
    cancelled: bool = False
    """Whether the caller was told that the job will not be run any more."""
    seen: list[tuple[str, str]] | None = None
    """Of a read: token and session of each message, in order."""
    whole: bool = False
    """Of a list: whether what was seen is all there was."""
    state: str | None = None
    """The job's state when all was over; "unknown" if there was no such job."""
    code: str | None = None
    """Of a job that failed: the error's, as in `recallq.errors`."""

    @property
    def name(self) -> str:
        return f"{self.client}#{self.number}"


class Journal:
    """Writes down the calls of one client, each line at once, so that a kill loses none."""

    def __init__(self, directory: Path, client: str) -> None:
        self.client = client
        self.path = directory / f"{client}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.calls = 0
        """How many there are."""

    def begin(self, call: Call) -> None:
        """Numbers `call`. To be done right before it is made, with no await between."""
        self.calls += 1
        call.client, call.number = self.client, self.calls
        self._write({name: value for name, value in dataclasses.asdict(call).items() if value})

    def learn(self, call: Call, **news: Any) -> None:
        """Enters what became known of `call`."""
        for name, value in news.items():
            setattr(call, name, value)
        self._write({"number": call.number, **news})

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")


def note_death(path: Path, at: float) -> None:
    """Enters in a journal that its writer has been killed."""
    with path.open("a") as file:
        file.write("\n" + json.dumps({"died": at}) + "\n")


def read_journals(directory: Path) -> list[Call]:
    """The calls in all journals, by the time at which they began."""
    calls: list[Call] = []
    for path in sorted(directory.glob("*.jsonl")):
        calls += _read(path)
    return sorted(calls, key=lambda call: (call.began, call.client, call.number))


def _read(path: Path) -> list[Call]:
    calls: dict[int, Call] = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn by a kill, or the empty line that ends such a one
        if "died" in line:
            for call in calls.values():
                if call.ended is None:
                    call.ended, call.outcome = line["died"], "Killed"
        elif "operation" in line:
            line["operation"] = Operation(line["operation"])
            calls[line["number"]] = Call(**{"session": None, **line})
        else:
            call = calls[line.pop("number")]
            for name, value in line.items():
                setattr(call, name, value)
    for call in calls.values():
        if call.seen is not None:
            call.seen = [(token, session) for token, session in call.seen]
    return list(calls.values())
