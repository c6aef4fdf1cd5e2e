"""RecallQ's workers: they take jobs off Celery queues and run them against a memory backend.

``celery -A recallq_worker worker`` finds the Celery app here; it is made on first use, so that
importing a backend does not bring Celery along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery

    celery: Celery


def __getattr__(name: str) -> object:
    if name == "celery":
        from recallq_worker.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
