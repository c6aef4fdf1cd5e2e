"""The tablestore backend: messages in Alibaba Cloud Tablestore, found by words or by vectors."""

from __future__ import annotations

from recallq_worker.backends.tablestore.client import create_tablestore_client
from recallq_worker.backends.tablestore.store import TablestoreStore

__all__ = ["TablestoreStore", "create_tablestore_client"]
