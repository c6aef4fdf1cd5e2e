"""A backend from outside: an in-memory store that does what messages and queries tell it.

Registered by its own entry point, as anybody's backend would be. ``sleep 2`` in a text makes the
operation last two seconds, ``refuse``, ``unavailable`` and ``explode`` make it fail in the three
ways a backend can, and ``exit`` ends the worker process at once.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from typing import ClassVar

from recallq.contract import Scope
from recallq.errors import BackendError, BackendUnavailable
from recallq.messages import message_text
from recallq_worker.backends.base import Hit, Record
from recallq_worker.backends.in_memory import InMemoryStore


class ObedientStore(InMemoryStore):
    name: ClassVar[str] = "obedient"
    single_process: ClassVar[bool] = False

    async def add(self, records: Sequence[Record]) -> list[bool]:
        for record in records:
            await _obey(message_text(record.message))
        return await super().add(records)

    async def search(
        self, scope: Scope, query: str, *, top_k: int, score_threshold: float | None
    ) -> list[Hit]:
        await _obey(query)
        return await super().search(scope, query, top_k=top_k, score_threshold=score_threshold)


async def _obey(text: str) -> None:
    if slept := re.search(r"\bsleep ([0-9.]+)", text):
        await asyncio.sleep(float(slept[1]))
    if "refuse" in text:
        raise BackendError("refused, as told")
    if "unavailable" in text:
        raise BackendUnavailable("not now", retry_after=1.5)
    if "explode" in text:
        raise RuntimeError(f"secret of a user: {text}")
    if "exit" in text:
        os._exit(3)
