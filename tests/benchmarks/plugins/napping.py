"""A store that waits for a service, which takes a hundred requests at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar, Self

from recallq.contract import Health, Scope
from recallq_worker.backends.base import Added, Hit, Record
from recallq_worker.settings import WorkerSettings
from tests.benchmarks.speed.works import AT_ONCE, NAP


class NappingStore:
    name: ClassVar[str] = "napping"
    single_process: ClassVar[bool] = False

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> Self:
        return cls()

    async def start(self) -> None:
        self._connections = asyncio.Semaphore(AT_ONCE)

    async def stop(self) -> None: ...

    async def add(self, records: Sequence[Record]) -> list[Added]:
        return [Added.NEW] * len(records)

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        async with self._connections:
            await asyncio.sleep(NAP)
        return []

    async def list(self, scope: Scope, *, offset: int, limit: int) -> list[Record]:
        return []

    async def delete(self, scope: Scope, *, before_epoch: int) -> int:
        return 0

    async def health(self) -> Health:
        return Health(ok=True, backend=self.name)
