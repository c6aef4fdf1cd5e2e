"""What the two ways to run mem0 have in common, and the choice between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Self, cast

import orjson

from recallq.contract import Health, Scope
from recallq_worker.backends.base import Extracted, Hit, Journal, Record, Submission
from recallq_worker.backends.mem0 import shapes
from recallq_worker.backends.mem0.settings import Mem0Settings
from recallq_worker.backends.submissions import tokens as tokens_of
from recallq_worker.settings import WorkerSettings


class Mem0Backend(ABC):
    """A `MemoryExtractor` on mem0. ``RECALLQ_MEM0_MODE`` tells which."""

    name: ClassVar[str] = "mem0"
    single_process: ClassVar[bool] = False

    def __init__(self, *, infer: bool) -> None:
        self._infer = infer

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> Self:
        own = Mem0Settings.load()
        backend: Mem0Backend
        if own.mode == "platform":
            from recallq_worker.backends.mem0.platform import Mem0Platform

            backend = Mem0Platform.from_both(settings, own)
        else:
            from recallq_worker.backends.mem0.library import Mem0Library

            backend = Mem0Library.from_both(settings, own)
        return cast("Self", backend)

    def infers(self, submission: Submission) -> bool:
        """Whether an LLM makes memories of it."""
        return self._infer if submission.infer is None else submission.infer

    def group(self, submission: Submission) -> Hashable:
        """mem0 keeps what it extracts under one run and one set of metadata."""
        if not self.infers(submission):
            return (submission.scope.session_id, False)
        fields = orjson.dumps(shapes.metadata_of_all(submission), option=orjson.OPT_SORT_KEYS)
        return (submission.scope.session_id, True, fields)

    def tokens(self, submission: Submission) -> int:
        return tokens_of(submission) if self.infers(submission) else 0

    @abstractmethod
    async def start(self) -> None: ...

    @abstractmethod
    async def stop(self) -> None: ...

    @abstractmethod
    async def extract(
        self, submissions: Sequence[Submission], journal: Journal
    ) -> list[Extracted]: ...

    @abstractmethod
    async def recover(
        self, submissions: Sequence[Submission], intent: dict[str, Any]
    ) -> list[Extracted] | None: ...

    @abstractmethod
    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]: ...

    @abstractmethod
    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]: ...

    @abstractmethod
    async def delete(self, scope: Scope, *, before_epoch: int) -> int: ...

    @abstractmethod
    async def health(self) -> Health: ...
