"""How much of what a question needs a search finds: recall, on conversations in LoCoMo's format.

A file has conversations with their questions, and for each question the turns that hold the
answer, its evidence (snap-research/locomo; Maharana et al., "Evaluating Very Long-Term
Conversational Memory of LLM Agents", 2024). Each conversation becomes a user of its own; recall at
k is the share of a question's evidence among the first k hits for the question, averaged over the
questions.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, Protocol

import orjson

from recallq.contract import Hit, Lane
from recallq.errors import InvalidInput
from recallq.messages import Message

CUTOFFS = (5, 10, 30)
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop"}
"""Those that have an answer in the conversation; 5 is of questions that have none."""

_SESSION = re.compile(r"session_(\d+)")
_SEPARATORS = re.compile(r"[;,\s]+")
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    category: int
    evidence: tuple[str, ...]
    """Ids of turns."""


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    sessions: Mapping[str, list[Message]]
    """In their order. Each message has the turn's id in the field ``id``."""
    questions: Sequence[Question]


@dataclass(slots=True)
class Report:
    """What came of it."""

    recalls: dict[int, list[dict[int, float]]] = field(default_factory=dict)
    """Of each question of a category, the recall at each cutoff."""
    seconds: list[float] = field(default_factory=list)
    """How long each search took, as its caller sees it."""
    messages: int = 0

    def recall(self, cutoff: int, category: int | None = None) -> float:
        """The mean over the questions of a category, or over all."""
        return mean(each[cutoff] for each in self._of(category))

    def count(self, category: int | None = None) -> int:
        return sum(1 for _ in self._of(category))

    def _of(self, category: int | None) -> Iterator[dict[int, float]]:
        for each, recalls in self.recalls.items():
            if category in (None, each):
                yield from recalls

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = {CATEGORIES[each]: each for each in sorted(self.recalls)}
        return {
            "messages": self.messages,
            "questions": self.count(),
            "recall": {str(cutoff): self.recall(cutoff) for cutoff in CUTOFFS},
            "by_category": {
                name: {
                    "questions": self.count(each),
                    "recall": {str(cutoff): self.recall(cutoff, each) for cutoff in CUTOFFS},
                }
                for name, each in rows.items()
            },
            "median_search_ms": median(self.seconds) * 1000,
        }


class Searchable(Protocol):
    """The part of a `MemoryClient` that is needed."""

    async def add_memory(
        self, user_id: str, messages: Any, session_id: str, *, lane: Lane, timeout: float
    ) -> Any: ...

    async def search(
        self, user_id: str, messages: Any, filters: Any, *, timeout: float
    ) -> list[Hit]: ...

    async def delete_memory(self, user_id: str, *, timeout: float) -> Any: ...


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of a file. Raises `InvalidInput`, which says what is wrong with it."""
    try:
        parsed = orjson.loads(path.read_bytes())
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from error
    samples = parsed if isinstance(parsed, list) else [parsed]
    found = []
    for number, sample in enumerate(samples):
        try:
            found.append(_conversation(sample, number))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InvalidInput(
                f"{path}: entry {number} is not a conversation in LoCoMo's format, "
                '{"conversation": {"session_1": [{"speaker", "dia_id", "text"}, ...], '
                '"session_1_date_time": ...}, "qa": [{"question", "evidence", "category"}, ...]}: '
                f"{type(error).__name__}: {error}"
            ) from error
    if not any(each.questions for each in found):
        raise InvalidInput(f"{path} has no question with evidence")
    return found


def _conversation(sample: Mapping[str, Any], number: int) -> Conversation:
    talk = sample["conversation"]
    names = sorted(
        (name for name in talk if _SESSION.fullmatch(name)),
        key=lambda name: int(name.removeprefix("session_")),
    )
    sessions: dict[str, list[Message]] = {}
    for name in names:
        said = {"timestamp": when} if (when := talk.get(f"{name}_date_time")) else {}
        sessions[name] = [
            Message(
                role="user" if turn["speaker"] == talk.get("speaker_a") else "assistant",
                content=turn.get("text") or "",
                name=turn["speaker"],
                id=turn["dia_id"],
                **said,
            )
            for turn in talk[name]
        ]
    questions = []
    for each in sample["qa"]:
        evidence = [
            turn
            for given in each.get("evidence") or []
            for turn in _SEPARATORS.split(given)
            if turn
        ]
        if each["category"] in CATEGORIES and evidence:
            questions.append(Question(each["question"], each["category"], tuple(evidence)))
    return Conversation(str(sample.get("sample_id", number)), sessions, questions)


async def evaluate(
    client: Searchable,
    conversations: Sequence[Conversation],
    *,
    timeout: float = 600.0,
    advance: Callable[[str, int], None] = lambda doing, done: None,
) -> Report:
    """Stores the conversations, asks their questions, and deletes them again.

    The users are named by the conversations' ids, so the client should have a tenant for this
    alone. `timeout` in seconds, of each call. `advance` is told how many messages were ``stored``
    and questions ``asked``. Raises what the client's calls do, and `InvalidInput` for a backend
    that does not give back what was stored.
    """
    report = Report()
    try:
        for each in conversations:
            await _store(client, each, report, timeout, advance)
        slots = asyncio.Semaphore(_AT_ONCE)
        questions = [
            asyncio.ensure_future(_ask(client, each, question, report, slots, timeout, advance))
            for each in conversations
            for question in each.questions
        ]
        try:
            # The first error is the caller's; not a group of errors, of which one is enough.
            await asyncio.gather(*questions)
        finally:
            for each_question in questions:
                each_question.cancel()
    finally:
        await asyncio.shield(_forget(client, conversations, timeout))
    return report


async def _store(
    client: Searchable,
    conversation: Conversation,
    report: Report,
    timeout: float,
    advance: Callable[[str, int], None],
) -> None:
    adds = []
    for session, messages in conversation.sessions.items():
        if messages:
            adds.append(
                client.add_memory(
                    conversation.id, messages, session, lane=Lane.BULK, timeout=timeout
                )
            )
            report.messages += len(messages)
    await asyncio.gather(*adds)
    advance("stored", sum(map(len, conversation.sessions.values())))


async def _ask(
    client: Searchable,
    conversation: Conversation,
    question: Question,
    report: Report,
    slots: asyncio.Semaphore,
    timeout: float,
    advance: Callable[[str, int], None],
) -> None:
    async with slots:
        began = time.perf_counter()
        hits = await client.search(
            conversation.id, question.text, {"top_k": max(CUTOFFS)}, timeout=timeout
        )
        report.seconds.append(time.perf_counter() - began)
    found = [hit.message.to_dict().get("id") for hit in hits]
    if hits and not any(found):
        raise InvalidInput(
            "what the backend found does not say which messages it is from: recall can be measured "
            "of backends that keep messages as they are"
        )
    recalls = {
        cutoff: mean(turn in found[:cutoff] for turn in question.evidence) for cutoff in CUTOFFS
    }
    report.recalls.setdefault(question.category, []).append(recalls)
    advance("asked", 1)


async def _forget(
    client: Searchable, conversations: Sequence[Conversation], timeout: float
) -> None:
    await asyncio.gather(
        *(client.delete_memory(each.id, timeout=timeout) for each in conversations)
    )
