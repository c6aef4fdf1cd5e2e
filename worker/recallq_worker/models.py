"""Which LLM and which embedding model the worker's backends use, where they let it choose.

``RECALLQ_LLM_*`` and ``RECALLQ_EMBEDDING_*`` say it; what they leave open comes from the variables
that OpenAI's and DashScope's own clients read. Both are spoken to by OpenAI's protocol, as are
vLLM, Ollama and most others: set the base URL.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from recallq.errors import ConfigurationError

_OPENAI_URL = "https://api.openai.com/v1"
_DASHSCOPE_URL = "https://dashscope.aliyuncs.com/compatible-mode/v1"
_DASHSCOPE_DIMENSIONS = 1024
_OPENAI_DIMENSIONS = 1536
_LARGE = {"text-embedding-3-large": 3072}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model and where it is served."""

    model: str
    base_url: str
    api_key: SecretStr | None

    @property
    def is_dashscope(self) -> bool:
        return "dashscope" in (urlsplit(self.base_url).hostname or "")


class ModelSettings(BaseSettings):
    """``RECALLQ_LLM_*``, ``RECALLQ_EMBEDDING_*``."""

    model_config = SettingsConfigDict(
        env_prefix="RECALLQ_", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    llm_model: str | None = None
    llm_base_url: str | None = None
    llm_api_key: SecretStr | None = None
    embedding_model: str | None = None
    embedding_base_url: str | None = None
    embedding_api_key: SecretStr | None = None
    embedding_dimensions: int | None = Field(None, ge=1, le=65_536)
    """Asked of the model, where it is set; what the collection's vectors have, in any case."""
    embedding_batch: int | None = Field(None, ge=1, le=2048)
    """Most texts that one request may embed. None means 10 with DashScope, else 100."""

    @classmethod
    def load(cls, **arguments: Any) -> Self:
        """Settings from arguments and the environment. Raises `ConfigurationError`."""
        try:
            return cls(**arguments)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            name = str(problem["loc"][0]).upper()
            raise ConfigurationError(f"RECALLQ_{name}: {problem['msg']}") from error

    def llm(self) -> Endpoint:
        """The LLM."""
        return _endpoint(
            self.llm_model, self.llm_base_url, self.llm_api_key, "gpt-5-mini", "qwen-plus"
        )

    def embedding(self) -> Endpoint:
        """The embedding model."""
        return _endpoint(
            self.embedding_model,
            self.embedding_base_url,
            self.embedding_api_key,
            "text-embedding-3-small",
            "text-embedding-v4",
        )

    @property
    def dimensions(self) -> int:
        """What vectors have, by what is known of the model."""
        if self.embedding_dimensions is not None:
            return self.embedding_dimensions
        endpoint = self.embedding()
        usual = _DASHSCOPE_DIMENSIONS if endpoint.is_dashscope else _OPENAI_DIMENSIONS
        return _LARGE.get(endpoint.model, usual)


def _endpoint(
    model: str | None,
    base_url: str | None,
    api_key: SecretStr | None,
    openai_model: str,
    dashscope_model: str,
) -> Endpoint:
    openai_key, dashscope_key = (
        os.environ.get(name) or None for name in ("OPENAI_API_KEY", "DASHSCOPE_API_KEY")
    )
    if base_url is None and openai_key is None and api_key is None and dashscope_key is not None:
        base_url = _DASHSCOPE_URL
    openai_server = base_url is None
    if base_url is None:
        base_url = os.environ.get("OPENAI_BASE_URL") or _OPENAI_URL
    endpoint = Endpoint(model or openai_model, base_url, api_key)
    dashscope = endpoint.is_dashscope
    key = api_key
    if key is None:
        # Where OPENAI_BASE_URL says DashScope, OPENAI_API_KEY is DashScope's.
        found = openai_key
        if dashscope:
            found = dashscope_key or (openai_key if openai_server else None)
        key = None if found is None else SecretStr(found)
    return Endpoint(model or (dashscope_model if dashscope else openai_model), base_url, key)
