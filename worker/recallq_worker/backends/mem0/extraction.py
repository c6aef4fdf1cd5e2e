"""What mem0 makes of submissions, as it is to be stored: with ids and fields of ours.

An LLM's memories keep mem0's ids, but for the beginning, by which those of one extraction sort in
the order in which mem0 made them. Messages that are stored as they are get ids that are made of
their record ids, so that storing them once more changes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recallq.contract import timestamp
from recallq_worker.backends.base import REPEATABLE, Extracted, Submission, together
from recallq_worker.backends.mem0 import shapes
from recallq_worker.backends.mem0.drafts import Draft, DraftRow, drafting
from recallq_worker.backends.mem0.vector_store import owner_is
from recallq_worker.backends.submissions import said

_IDS = uuid.UUID("5d7d4b0e-6f0a-4b5e-9a53-0f6ce0f0c9b1")
"""The namespace of ids that are made of record ids."""


@dataclass(slots=True)
class Finished:
    """A draft as it is to be stored."""

    draft: Draft
    epoch: int
    extracted: list[Extracted]
    repeatable: bool = False
    """Whether its memories have the same ids whenever they are made."""

    @property
    def ids(self) -> list[str]:
        return [row.id for row in self.draft.memories]

    @property
    def intent(self) -> dict[str, Any]:
        """What `Mem0Library.recover` has to know."""
        entities = [row.id for row in self.draft.entities]
        return {
            "owner": self.draft.owner,
            "ids": self.ids,
            "entities": entities,
            REPEATABLE: self.repeatable,
        }


def extract(
    memory: Any, submissions: Sequence[Submission], draft: Draft, *, infer: bool
) -> Finished:
    """Has `memory`, a ``mem0.Memory`` with the parts of `drafts`, make memories of one user's
    submissions of one group, and stores none."""
    last = submissions[-1]
    sent = [
        (each, index, message)
        for each in submissions
        for index, message in said(each, infer=infer).items()
    ]
    lowest = min(each.epoch for each in submissions)
    if not sent:
        return Finished(draft, lowest, together([], len(submissions)))
    with owner_is(draft.owner, epoch=lowest), drafting(draft):
        if not infer:
            # mem0 would ask for each by itself, one after the other.
            memory.embedding_model.embed_batch([each["content"] for *_, each in sent])
        memory.add(
            [message for *_, message in sent],
            user_id=draft.owner,
            run_id=draft.run,
            metadata=shapes.metadata_of_all(last) if infer else None,
            infer=infer,
        )
    if not infer:
        return _as_they_are(draft, submissions, sent)
    ids: dict[str, str] = {}
    for place, row in enumerate(draft.memories):
        # Sorted by id, memories of one extraction are in the order in which mem0 made them.
        ids[row.id] = row.id = f"{place:08x}{row.id[8:]}"
        _mark(row, last.order, lowest)
    payloads = [each.payload for each in draft.entities] + [*draft.entity_updates.values()]
    for payload in payloads:
        linked = payload.get("linked_memory_ids") or []
        payload["linked_memory_ids"] = sorted(ids.get(each, each) for each in linked)
        payload[shapes.EPOCH] = lowest
    extracted = together([row.id for row in draft.memories], len(submissions))
    return Finished(draft, lowest, extracted)


def _as_they_are(
    draft: Draft,
    submissions: Sequence[Submission],
    sent: Sequence[tuple[Submission, int, dict[str, Any]]],
) -> Finished:
    """Every message a memory, under an id that is the same whenever it is stored."""
    found: dict[str, list[str]] = {each.job_id: [] for each in submissions}
    for row, (submission, index, message) in zip(draft.memories, sent, strict=True):
        original = submission.messages[index]
        row.id = _id_of(submission.record_ids[index], index)
        row.payload |= shapes.metadata(original) | shapes.whole(original, message)
        _mark(row, submission.order, submission.epoch)
        found[submission.job_id].append(row.id)
    extracted = [
        Extracted(found[each.job_id], len(found[each.job_id]), len(submissions))
        for each in submissions
    ]
    lowest = min(each.epoch for each in submissions)
    return Finished(draft, lowest, extracted, repeatable=True)


def _mark(row: DraftRow, order: int, epoch: int) -> None:
    row.payload |= {shapes.ORDER: order, shapes.EPOCH: epoch}
    row.payload["created_at"] = row.payload["updated_at"] = timestamp(order).isoformat()


def _id_of(record_id: str, index: int) -> str:
    """A UUID, as some vector stores want; those of one add sort by its messages."""
    return f"{index:08x}{str(uuid.uuid5(_IDS, record_id))[8:]}"


def by_submission(submissions: Sequence[Submission], ids: Sequence[str]) -> list[Extracted]:
    known, found = set(ids), []
    for each in submissions:
        made = [_id_of(record_id, index) for index, record_id in enumerate(each.record_ids)]
        mine = [record_id for record_id in made if record_id in known]
        found.append(Extracted(mine, len(mine), len(submissions)))
    return found
