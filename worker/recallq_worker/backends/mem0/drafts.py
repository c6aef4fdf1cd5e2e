"""Keeps mem0 from storing anything while it extracts, and from passing over what goes wrong.

``Memory.add`` asks the LLM, embeds and writes in one go, with ids of its own making, and carries on
where an embedding or an answer is unusable: the memories in question are missing then, and nobody
is told. Here its parts are wrapped. While a draft is open in the calling thread, what it writes is
collected in the draft, to be stored afterwards in one step that can be journaled, fenced and
repeated; and the first failure is kept, to be raised when it returns. Without a draft the wrapped
parts do what they always did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import openai

# mem0 carries annotations here and there, and no marker that it does.
from mem0.embeddings.base import EmbeddingBase  # type: ignore[import-untyped]
from mem0.memory.utils import extract_json, remove_code_blocks  # type: ignore[import-untyped]
from mem0.vector_stores.base import VectorStoreBase  # type: ignore[import-untyped]

from recallq.errors import BackendError
from recallq_worker.backends.failures import CutOffAnswer, UnusableAnswer, noting
from recallq_worker.embedding.texts import beginning
from recallq_worker.model_usage import EMBEDDING_USAGE, LLM_USAGE, ModelUsage

Vector = Sequence[float]


@dataclass(slots=True)
class DraftRow:
    """A row that mem0 wants to store."""

    id: str
    vector: Vector
    payload: dict[str, Any]


@dataclass(slots=True)
class Draft:
    """What one ``Memory.add`` came to."""

    run: str
    """What mem0 calls the session: its recent messages go into the prompt."""
    owner: str
    memories: list[DraftRow] = field(default_factory=list)
    entities: list[DraftRow] = field(default_factory=list)
    """New ones."""
    entity_updates: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Known ones: id -> payload."""
    said: list[dict[str, Any]] = field(default_factory=list)
    """The messages that mem0 wants to remember for the next prompt."""
    vectors: dict[str, Vector] = field(default_factory=dict)
    """Embeddings that are known already, by their texts."""
    failure: BaseException | None = None


_draft: ContextVar[Draft | None] = ContextVar("recallq_mem0_draft", default=None)


@contextmanager
def drafting(draft: Draft) -> Iterator[Draft]:
    """Opens a draft for what mem0 does in this thread. Raises the failure that mem0 passed over."""
    token = _draft.set(draft)
    try:
        yield draft
    finally:
        _draft.reset(token)
        if draft.failure is not None:
            # Whatever mem0 made of it: the first failure says best what went wrong.
            raise draft.failure


def current() -> Draft | None:
    """The draft that is open in this thread."""
    return _draft.get()


class DraftedStore(VectorStoreBase):  # type: ignore[misc]  # to the type checker it is Any
    """A vector store that puts what is written into the open draft."""

    def __init__(self, inner: Any, *, entities: bool = False) -> None:
        self.inner = inner
        self._entities = entities

    def insert(
        self, vectors: Sequence[Vector], payloads: Any = None, ids: Any = None, **more: Any
    ) -> Any:
        draft = current()
        if draft is None:
            return self.inner.insert(vectors=vectors, payloads=payloads, ids=ids, **more)
        rows = [
            DraftRow(str(row_id), vector, payload)
            for row_id, vector, payload in zip(ids, vectors, payloads, strict=True)
        ]
        (draft.entities if self._entities else draft.memories).extend(rows)
        return None

    def update(self, vector_id: str, vector: Any = None, payload: Any = None) -> Any:
        draft = current()
        if draft is None or not self._entities:
            return self.inner.update(vector_id=vector_id, vector=vector, payload=payload)
        draft.entity_updates[str(vector_id)] = payload
        return None

    def create_col(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.create_col(*args, **kwargs)

    def search(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.search(*args, **kwargs)

    def search_batch(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.search_batch(*args, **kwargs)

    def keyword_search(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.keyword_search(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.delete(*args, **kwargs)

    def get(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.get(*args, **kwargs)

    def list(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.list(*args, **kwargs)

    def list_cols(self) -> Any:
        return self.inner.list_cols()

    def delete_col(self) -> Any:
        return self.inner.delete_col()

    def col_info(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.col_info(*args, **kwargs)

    def reset(self) -> Any:
        return self.inner.reset()


class DraftingEmbedder(EmbeddingBase):  # type: ignore[misc]  # see above
    """An embedder that asks for many texts at once, within the provider's limit, and for none
    twice."""

    def __init__(
        self, inner: Any, most_texts: int, *, dimensions: int | None, searcher: Any = None
    ) -> None:
        """`dimensions` of the collection, where they are known. `searcher` is asked instead of
        `inner` without a draft: by searches, which somebody waits for."""
        super().__init__(inner.config)
        self.inner = inner
        self._searcher = searcher or inner
        self._most_texts = most_texts
        self._dimensions = dimensions

    def embed(self, text: str, memory_action: Any = None) -> Vector:
        draft = current()
        if draft is not None and text in draft.vectors:
            return draft.vectors[text]
        embedder = self.inner if draft is not None else self._searcher
        with noting(draft), _counted(EMBEDDING_USAGE):
            vector: Vector = embedder.embed(beginning(text), memory_action)
            self._check(vector)
        EMBEDDING_USAGE.embedded(1)
        return vector

    def embed_batch(self, texts: Sequence[str], memory_action: Any = "add") -> list[Vector]:
        draft = current()
        vectors = draft.vectors if draft is not None else {}
        embedder = self.inner if draft is not None else self._searcher
        wanted = [text for text in dict.fromkeys(texts) if text not in vectors]
        for start in range(0, len(wanted), self._most_texts):
            portion = wanted[start : start + self._most_texts]
            with noting(draft), _counted(EMBEDDING_USAGE):
                found = embedder.embed_batch([beginning(text) for text in portion], memory_action)
                if len(found) != len(portion):
                    raise UnusableAnswer(
                        f"{len(found)} vectors came back from embedding {len(portion)} texts"
                    )
                for vector in found:
                    self._check(vector)
            EMBEDDING_USAGE.embedded(len(portion))
            vectors |= dict(zip(portion, found, strict=True))
        return [vectors[text] for text in texts]

    def _check(self, vector: Vector) -> None:
        if not vector or not all(map(math.isfinite, vector)):
            raise UnusableAnswer("the embedding model returned what is no vector")
        if self._dimensions is not None and len(vector) != self._dimensions:
            raise BackendError(
                f"the embedding model's vectors have {len(vector)} dimensions, and the "
                f"collection's {self._dimensions}: set RECALLQ_EMBEDDING_DIMENSIONS, and use "
                "another collection where vectors are stored already"
            )


class CheckedLlm:
    """An LLM whose answers are looked at before mem0 reads them, in its own way, but passes over
    what it cannot read."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def generate_response(self, *args: Any, **kwargs: Any) -> Any:
        draft = current()
        with noting(draft), _counted(LLM_USAGE):
            answer = self.inner.generate_response(*args, **kwargs)
            if draft is not None and kwargs.get("response_format") is not None:
                check_extraction(answer)
        return answer


@contextmanager
def _counted(usage: ModelUsage) -> Iterator[None]:
    """One request to a model."""
    try:
        yield
    except BaseException:
        usage.ended(failed=True)
        raise
    usage.ended()


def count_tokens(client: Any) -> None:
    """Has an OpenAI client enter what its answers say of tokens, which mem0 passes over.

    Clients of other providers stay as they are: their requests are counted, their tokens are not.
    """
    if not isinstance(client, openai.OpenAI):
        return
    resources: tuple[tuple[Any, ModelUsage], ...] = (
        (client.chat.completions, LLM_USAGE),
        (client.embeddings, EMBEDDING_USAGE),
    )
    for resource, usage in resources:

        def create(
            *args: Any, ask: Any = resource.create, usage: ModelUsage = usage, **kwargs: Any
        ) -> Any:
            answer = ask(*args, **kwargs)
            usage.spent_as_told(getattr(answer, "usage", None))
            return answer

        resource.create = create


def check_extraction(answer: object) -> None:
    """Raises `UnusableAnswer` unless an LLM's answer is a list of memories, which may be empty."""
    text = remove_code_blocks(answer)
    if not text:
        raise UnusableAnswer("the LLM's answer is empty")
    try:
        found = json.loads(text, strict=False)
    except ValueError:
        try:
            found = json.loads(extract_json(text), strict=False)
        except ValueError:
            raise CutOffAnswer("the LLM's answer is not JSON, or was cut off") from None
    memories = found.get("memory") if isinstance(found, dict) else None
    if not isinstance(memories, list):
        raise UnusableAnswer("the LLM's answer has no list of memories")
    for each in memories:
        if not isinstance(each, dict) or not isinstance(each.get("text"), str) or not each["text"]:
            raise UnusableAnswer("the LLM's answer has a memory without a text")
        try:
            each["text"].encode()
        except UnicodeEncodeError:
            raise UnusableAnswer("the LLM's answer holds half a character") from None
