"""Recall on conversations with questions: how it is counted, and what is left behind."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from recallq.contract import Hit
from recallq.errors import BackendUnavailable, InvalidInput
from recallq.evaluation import evaluate, read_conversations
from recallq.messages import Message

SAMPLE: dict[str, Any] = {
    "sample_id": "talk",
    "conversation": {
        "speaker_a": "Ann",
        "session_10": [{"speaker": "Bob", "dia_id": "D10:1", "text": "last"}],
        "session_2": [
            {"speaker": "Ann", "dia_id": "D2:1", "text": "first"},
            {"speaker": "Bob", "dia_id": "D2:2", "text": "second", "blip_caption": "a dog"},
        ],
        "session_2_date_time": "8 May, 2023",
        "session_3": [],
    },
    "qa": [
        {"question": "one", "evidence": ["D2:1"], "category": 4},
        {"question": "two", "evidence": ["D2:1; D2:2", "D10:1"], "category": 1},
        {"question": "three", "evidence": ["D9:9"], "category": 4},
        {"question": "none", "evidence": ["D2:1"], "category": 5},
        {"question": "nothing", "evidence": [], "category": 1},
        {"question": "neither", "category": 1},
    ],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([SAMPLE]))
    return path


class Memory:
    """Finds everything of a user, in the order of storing."""

    def __init__(self, error: Exception | None = None, *, as_stored: bool = True) -> None:
        self.users: dict[str, list[Message]] = {}
        self.sessions: list[str] = []
        self.deleted: list[str] = []
        self.error = error
        self.as_stored = as_stored

    async def add_memory(self, user_id: str, messages: Any, session_id: str, **_: Any) -> None:
        self.sessions.append(session_id)
        self.users.setdefault(user_id, []).extend(messages)

    async def search(self, user_id: str, messages: Any, filters: Any, **_: Any) -> list[Hit]:
        if self.error is not None:
            raise self.error
        found = self.users[user_id] if self.as_stored else [Message.user("a memory")]
        return [
            Hit(
                message=each,
                record_id="r",
                session_id="s",
                created_at=datetime.now(UTC),
                score=1.0,
            )
            for each in found[: filters["top_k"]]
        ]

    async def delete_memory(self, user_id: str, **_: Any) -> None:
        self.deleted.append(user_id)


def test_reads_sessions_in_their_order_and_questions_that_have_an_answer(path: Path) -> None:
    (talk,) = read_conversations(path)
    assert list(talk.sessions) == ["session_2", "session_3", "session_10"]
    first, second = (message.to_dict() for message in talk.sessions["session_2"])
    assert first == {
        "role": "user", "content": "first", "name": "Ann", "id": "D2:1", "timestamp": "8 May, 2023",
    }  # fmt: skip
    assert second["role"] == "assistant"
    assert [question.text for question in talk.questions] == ["one", "two", "three"]
    assert talk.questions[1].evidence == ("D2:1", "D2:2", "D10:1")


async def test_counts_the_share_of_evidence_by_question(path: Path) -> None:
    memory = Memory()
    told: list[tuple[str, int]] = []
    report = await evaluate(
        memory, read_conversations(path), advance=lambda *done: told.append(done)
    )
    assert memory.sessions == ["session_2", "session_10"]
    assert report.recall(10, 4) == 0.5
    assert report.recall(10, 1) == 1.0
    assert report.recall(5) == pytest.approx(2 / 3)
    assert report.count() == 3
    assert told == [("stored", 3), ("asked", 1), ("asked", 1), ("asked", 1)]
    assert memory.deleted == ["talk"]
    assert report.to_dict()["by_category"]["single-hop"]["questions"] == 2


async def test_an_error_is_the_callers_and_nothing_is_left(path: Path) -> None:
    memory = Memory(BackendUnavailable("down"))
    with pytest.raises(BackendUnavailable):
        await evaluate(memory, read_conversations(path))
    assert memory.deleted == ["talk"]


async def test_a_backend_that_extracts_memories_cannot_be_measured(path: Path) -> None:
    memory = Memory(as_stored=False)
    with pytest.raises(InvalidInput, match="as they are"):
        await evaluate(memory, read_conversations(path))
    assert memory.deleted == ["talk"]
