"""What one of ReMe's flows wants to store, and what went wrong in it.

ReMe's flows write as they go, and pass over whatever fails in them. Here the models and the vector
store that a flow is given are our own: while a draft is open, what the flow writes is collected in
it, to be stored afterwards in one step that can be journaled, fenced and repeated; and the first
failure is kept, to be raised when the flow returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from recallq.errors import BackendError
from recallq_worker.backends.failures import noting


@dataclass(slots=True)
class Draft:
    """What one flow came to. Tasks that the flow starts share it."""

    nodes: dict[str, Any] = field(default_factory=dict)
    """New ``VectorNode``s by their ids."""
    deleted: list[str] = field(default_factory=list)
    """Nodes that were there before, and shall go."""
    known: set[str] = field(default_factory=set)
    """Nodes that were there before, as far as the flow has seen them."""
    vectors: dict[str, list[float]] = field(default_factory=dict)
    """Embeddings that are known already, by their texts."""
    failure: BaseException | None = None


_draft: ContextVar[Draft | None] = ContextVar("recallq_reme_draft", default=None)


def current() -> Draft | None:
    """The draft that is open here."""
    return _draft.get()


@contextmanager
def drafting() -> Iterator[Draft]:
    """Opens a draft. Raises the failure that was passed over meanwhile."""
    draft = Draft()
    token = _draft.set(draft)
    try:
        yield draft
    except Exception:
        # Whatever the flow made of it: the first failure says best what went wrong.
        if draft.failure is not None:
            raise draft.failure  # noqa: B904  # with the cause that it has
        raise
    finally:
        _draft.reset(token)
    if draft.failure is not None:
        raise draft.failure


class DraftedStore:
    """The vector store that a flow is given: it reads from `inner`, and writes into the draft."""

    def __init__(self, inner: Any) -> None:
        """`inner` is one of flowllm's vector stores."""
        self.inner = inner
        self.embedding_model = inner.embedding_model

    async def async_search(self, *args: Any, **kwargs: Any) -> list[Any]:
        return await self._read(self.inner.async_search(*args, **kwargs))

    async def async_list_workspace_nodes(self, *args: Any, **kwargs: Any) -> list[Any]:
        return await self._read(self.inner.async_list_workspace_nodes(*args, **kwargs))

    async def async_exist_workspace(self, *args: Any, **kwargs: Any) -> bool:
        with noting(current()):
            return bool(await self.inner.async_exist_workspace(*args, **kwargs))

    async def async_insert(self, nodes: Any, workspace_id: str, **kwargs: Any) -> None:
        draft = _open()
        for node in nodes if isinstance(nodes, list) else [nodes]:
            # Some flows hand back, unchanged, what they have read.
            if node.unique_id not in draft.known:
                draft.nodes[node.unique_id] = node

    async def async_delete(
        self, node_ids: str | Sequence[str], workspace_id: str, **kwargs: Any
    ) -> None:
        draft = _open()
        for node_id in [node_ids] if isinstance(node_ids, str) else node_ids:
            if draft.nodes.pop(node_id, None) is None and node_id in draft.known:
                draft.deleted.append(node_id)

    def __getattr__(self, name: str) -> Any:
        error = BackendError(
            f"ReMe's flow asks its vector store for {name}, which RecallQ does not offer to flows: "
            "they may search, list, insert and delete, and not synchronously"
        )
        with noting(current()):
            raise error

    async def _read(self, reading: Any) -> list[Any]:
        draft = _open()
        with noting(draft):
            nodes: list[Any] = list(await reading)
        draft.known.update(node.unique_id for node in nodes)
        return nodes


def _open() -> Draft:
    draft = current()
    if draft is None:
        raise BackendError("a ReMe flow reads or writes outside of a draft")
    return draft
