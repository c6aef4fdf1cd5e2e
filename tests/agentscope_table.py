"""Tables of agentscope-runtime 1.0's Tablestore memory, written as it wrote them.

The layout is that of its version 1.0.5; the rows go through the library that it used, and the real
SDK, to a server that speaks the real protocol.
"""

from __future__ import annotations

import json
from typing import Any

import tablestore
from tablestore_for_agent_memory.base.base_knowledge_store import Document
from tablestore_for_agent_memory.knowledge.knowledge_store import KnowledgeStore

from tests.loopback.tablestore_api import TablestoreServer

TABLE = "agentscope_runtime_memory"
DIMENSION = 4


def text_part(text: str | None, **more: Any) -> dict[str, Any]:
    """A text part with every field that agentscope gives it."""
    return _part("text", text=text, **more)


def data_part(data: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A part that is a tool call, or what came of one."""
    return _part("data", data=data, **more)


def _part(kind: str, **more: Any) -> dict[str, Any]:
    bare = {
        "sequence_number": None,
        "object": "content",
        "status": None,
        "error": None,
        "type": kind,
        "index": None,
        "delta": False,
        "msg_id": None,
    }
    return bare | more


def message(
    own_id: str, *parts: dict[str, Any], role: str | None = "user", **more: Any
) -> dict[str, Any]:
    """A message with every field that agentscope gives it."""
    bare = {
        "sequence_number": None,
        "object": "message",
        "status": "created",
        "error": None,
        "id": own_id,
        "type": "message",
        "role": role,
        "content": list(parts),
        "code": None,
        "message": None,
        "usage": None,
        "metadata": None,
    }
    return bare | more


class AgentscopeTable:
    """One table of a server."""

    def __init__(
        self, server: TablestoreServer, name: str = TABLE, *, text_field: str = "text"
    ) -> None:
        self.name = name
        self._client = tablestore.OTSClient(
            server.url, server.access_key_id, server.access_key_secret, server.instance_name
        )
        self._store = KnowledgeStore(
            self._client,
            vector_dimension=DIMENSION,
            enable_multi_tenant=False,
            table_name=name,
            search_index_name="agentscope_runtime_knowledge_search_index_name",
            search_index_schema=[
                tablestore.FieldSchema("user_id", tablestore.FieldType.KEYWORD),
                tablestore.FieldSchema("session_id", tablestore.FieldType.KEYWORD),
            ],
            text_field=text_field,
        )
        # Its init_table() does these two, and then sleeps for a second.
        self._store._create_table()
        self._store._create_search_index()

    def add(self, user: str, message: dict[str, Any], session: str | None = None) -> None:
        """As ``add_memory`` of one message."""
        self._store.put_document(document_of(message, user, session or "default"))

    def put(self, document_id: str, columns: dict[str, Any], tenant: str = "__default") -> None:
        """A row as nobody's memory service wrote it."""
        key = [("document_id", document_id), ("tenant_id", tenant)]
        self._client.put_row(self.name, tablestore.Row(key, list(columns.items())))

    def close(self) -> None:
        self._client.connection.pool.clear()


def document_of(message: dict[str, Any], user: str, session: str) -> Document:
    content: list[dict[str, Any]] | None = None
    text: str | None = None
    if message["content"] is not None:
        content = [dict(part) for part in message["content"]]
        if message["type"] == "message":
            texts = [part for part in content if part["type"] == "text"]
            text = texts[0].pop("text") if texts else None
    metadata = {name: each for name, each in message.items() if name not in ("id", "content")}
    metadata |= {
        "user_id": user,
        "session_id": session,
        "content_list": json.dumps(content, ensure_ascii=False),
    }
    return Document(
        document_id=message["id"],
        text=text,
        embedding=[0.1] * DIMENSION if text is not None else None,
        metadata={name: each for name, each in metadata.items() if each is not None},
    )
