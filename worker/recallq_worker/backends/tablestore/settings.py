"""How the tablestore backend is set up: ``RECALLQ_TABLESTORE_*``, by the names that users of
agentscope-runtime know."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, StringConstraints

from recallq.errors import ConfigurationError
from recallq.tablestore_access import NAME, TablestoreAccess, variable

SearchStrategy: TypeAlias = Literal["full_text", "vector"]
MetricType: TypeAlias = Literal["cosine", "euclidean", "dot_product"]

_Name = Annotated[str, StringConstraints(pattern=NAME)]


class TablestoreSettings(TablestoreAccess):
    """``RECALLQ_TABLESTORE_*``."""

    asked_by: ClassVar[str] = "the tablestore backend"

    search_strategy: SearchStrategy = "full_text"
    table_name: _Name = "recallq_memory"
    search_index_name: _Name | None = None
    """None means ``<table name>_<search strategy>``: each strategy has an index of its own."""
    text_field: _Name = "text"
    embedding_field: _Name = "embedding"
    vector_dimension: int | None = Field(None, ge=1, le=4096)
    """None means what the embedding model is known to give."""
    vector_metric_type: MetricType = "cosine"

    @classmethod
    def load(cls, **arguments: Any) -> Self:
        """Settings from arguments and the environment. Raises `ConfigurationError`."""
        settings = super().load(**arguments)
        names = {settings.text_field, settings.embedding_field}
        if len(names) < 2 or names & RESERVED:
            raise ConfigurationError(
                f"{variable('text_field')} and {variable('embedding_field')} must differ from "
                f"each other, and from {', '.join(sorted(RESERVED))}"
            )
        return settings

    @property
    def index_name(self) -> str:
        return self.search_index_name or f"{self.table_name}_{self.search_strategy}"


RESERVED = frozenset(
    {"owner", "place", "order", "epoch", "session", "session_id", "message", "digest", "embedded"}
)
"""Columns whose names are given."""
