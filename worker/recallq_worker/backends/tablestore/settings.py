"""How the tablestore backend is set up: ``RECALLQ_TABLESTORE_*``, by the names that users of
agentscope-runtime know."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, SecretStr, StringConstraints, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from recallq.errors import ConfigurationError

SearchStrategy: TypeAlias = Literal["full_text", "vector"]
MetricType: TypeAlias = Literal["cosine", "euclidean", "dot_product"]

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$")]
"""What Tablestore takes for the name of a table, an index or a column."""

_NEEDED = ("end_point", "instance_name", "access_key_id", "access_key_secret")


class TablestoreSettings(BaseSettings):
    """``RECALLQ_TABLESTORE_*``."""

    model_config = SettingsConfigDict(
        env_prefix="RECALLQ_TABLESTORE_",
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,
    )

    end_point: str = ""
    """``https://<instance>.<region>.ots.aliyuncs.com``."""
    instance_name: str = ""
    access_key_id: SecretStr = SecretStr("")
    access_key_secret: SecretStr = SecretStr("")
    sts_token: SecretStr | None = None
    region: str | None = None
    """Signs requests by version 4 of Tablestore's signature, which depends on the region."""

    search_strategy: SearchStrategy = "full_text"
    table_name: _Name = "recallq_memory"
    search_index_name: _Name | None = None
    """None means ``<table name>_<search strategy>``: each strategy has an index of its own."""
    text_field: _Name = "text"
    embedding_field: _Name = "embedding"
    vector_dimension: int | None = Field(None, ge=1, le=4096)
    """None means what the embedding model is known to give."""
    vector_metric_type: MetricType = "cosine"

    @field_validator("end_point")
    @classmethod
    def _end_point_is_a_url(cls, end_point: str) -> str:
        if end_point and not end_point.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return end_point.rstrip("/")

    @classmethod
    def load(cls, **arguments: Any) -> Self:
        """Settings from arguments and the environment. Raises `ConfigurationError`."""
        try:
            settings = cls(**arguments)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            reason = problem["msg"].removeprefix("Value error, ")
            raise ConfigurationError(f"{_variable(str(problem['loc'][0]))}: {reason}") from error
        missing = [name for name in _NEEDED if not _said(getattr(settings, name))]
        if missing:
            raise ConfigurationError(
                f"the tablestore backend needs {', '.join(map(_variable, missing))}"
            )
        names = {settings.text_field, settings.embedding_field}
        if len(names) < 2 or names & RESERVED:
            raise ConfigurationError(
                f"{_variable('text_field')} and {_variable('embedding_field')} must differ from "
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


def _variable(name: str) -> str:
    return f"RECALLQ_TABLESTORE_{name.upper()}"


def _said(value: str | SecretStr) -> bool:
    return bool(value.get_secret_value() if isinstance(value, SecretStr) else value)
