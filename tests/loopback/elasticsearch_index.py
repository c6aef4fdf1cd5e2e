"""An index of Elasticsearch's loopback server: its documents, and what searches see of them."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from typing import Any

from tests.loopback.elasticsearch_mapping import Mapping, index_document, read_mapping
from tests.loopback.elasticsearch_queries import Document, refused, score
from tests.loopback.faults import HttpFailure

_RESULT_WINDOW = 10_000

Hit = tuple[float, Document]


class Index:
    def __init__(self, name: str, body: dict[str, Any], *, refresh_interval: float) -> None:
        self.name = name
        self.uuid = uuid.uuid4().hex[:22]
        self.mapping: Mapping = read_mapping(body.get("mappings", {}))
        self.documents: dict[str, Document] = {}
        """As they were written, by id; searches see those of the last refresh."""
        self._refresh_interval = refresh_interval
        self._searchable: list[Document] = []
        self._unseen_since: float | None = None

    # --- writes ---------------------------------------------------------------------------------

    def put(self, document_id: str, source: dict[str, Any]) -> dict[str, Any]:
        """Writes a document over what has its id, if any; the outcome as bulk requests tell it."""
        if not 1 <= len(document_id.encode()) <= 512:
            words = f"id [{document_id}] is too long, must be no longer than 512 bytes"
            raise HttpFailure(400, words, code="illegal_argument_exception")
        mapping = self.mapping.copy()  # what is refused leaves no fields behind
        terms = index_document(mapping, source)
        self.mapping = mapping
        # What is replaced moves to the end, where it stands among equal scores.
        old = self.documents.pop(document_id, None)
        version = 1 if old is None else old.version + 1
        self.documents[document_id] = Document(document_id, source, version, terms)
        self._written()
        return self._outcome(document_id, version, "updated" if old else "created")

    def remove(self, document_id: str) -> dict[str, Any]:
        old = self.documents.pop(document_id, None)
        if old is None:
            return self._outcome(document_id, 1, "not_found")
        self._written()
        return self._outcome(document_id, old.version + 1, "deleted")

    def _outcome(self, document_id: str, version: int, result: str) -> dict[str, Any]:
        return {
            "_index": self.name,
            "_id": document_id,
            "_version": version,
            "result": result,
            "_shards": {"total": 2, "successful": 1, "failed": 0},
            "_seq_no": 0,
            "_primary_term": 1,
            "status": {"created": 201, "not_found": 404}.get(result, 200),
        }

    def _written(self) -> None:
        if self._unseen_since is None:
            self._unseen_since = time.monotonic()

    def refresh(self) -> None:
        self._searchable = [replace(document) for document in self.documents.values()]
        self._unseen_since = None

    # --- searches -------------------------------------------------------------------------------

    def search(self, body: dict[str, Any]) -> list[Hit]:
        """All that match, the best first; of equals, the older write."""
        unseen = self._unseen_since
        if unseen is not None and time.monotonic() - unseen >= self._refresh_interval:
            self.refresh()
        query = body.get("query") or {"match_all": {}}
        found = [
            (value, document)
            for document in self._searchable
            if (value := score(query, document, self.mapping)) is not None
        ]
        if body.get("sort") in (None, "_score", ["_score"]):
            return sorted(found, key=lambda hit: -hit[0])
        if body["sort"] not in ("_doc", ["_doc"]):
            raise refused("this server sorts by _score and _doc only")
        return found


def window(body: dict[str, Any], query: dict[str, str]) -> tuple[int, int]:
    """Which hits are wanted, from and to; no more than a search may show."""
    start = int(query.get("from", body.get("from", 0)))
    size = int(query.get("size", body.get("size", 10)))
    if size < 0 or start < 0:
        words = f"[size] parameter cannot be negative, found [{size}]"
        raise refused(words, "illegal_argument_exception")
    if start + size > _RESULT_WINDOW:
        raise refused(
            "Result window is too large, from + size must be less than or equal to: "
            f"[{_RESULT_WINDOW}] but was [{start + size}]. See the scroll api for a more efficient "
            "way to request large data sets.",
            "illegal_argument_exception",
        )
    return start, start + size
