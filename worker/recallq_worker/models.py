"""Which LLM and which embedding model the worker's backends use, where they let it choose.

``RECALLQ_LLM_*`` and ``RECALLQ_EMBEDDING_*`` say it; what they leave open comes from the variables
that OpenAI's and DashScope's own clients read. Both are spoken to by OpenAI's protocol, as are
vLLM, Ollama and most others: set the base URL. What embeds texts without mem0
(`recallq_worker.embedding`) also speaks DashScope's own protocol, and calls functions.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from recallq.errors import ConfigurationError

Provider: TypeAlias = Literal["dashscope", "openai", "callable"]

_OPENAI_URL = "https://api.openai.com/v1"
_COMPATIBLE, _NATIVE = "/compatible-mode/v1", "/api/v1"
_DASHSCOPE = "https://dashscope.aliyuncs.com"
_DASHSCOPE_URL = _DASHSCOPE + _COMPATIBLE
_DASHSCOPE_MODEL = re.compile(r"text-embedding-v\d")
_DASHSCOPE_DIMENSIONS = 1024
_OPENAI_DIMENSIONS = 1536
_DIMENSIONS = {
    "text-embedding-3-large": 3072,
    "text-embedding-v1": 1536,
    "text-embedding-v2": 1536,
    "text-embedding-v3": 1024,
    "text-embedding-v4": 1024,
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model and where it is served."""

    model: str
    base_url: str
    api_key: SecretStr | None

    @property
    def is_dashscope(self) -> bool:
        host = urlsplit(self.base_url).hostname or ""
        return "dashscope" in host or host.endswith(".maas.aliyuncs.com")

    @property
    def is_openai(self) -> bool:
        """Whether it is what ``OPENAI_*`` variables are about."""
        host = urlsplit(self.base_url).hostname or ""
        own = os.environ.get("OPENAI_BASE_URL")
        return host.endswith(".openai.com") or (own is not None and own == self.base_url)


class ModelSettings(BaseSettings):
    """``RECALLQ_LLM_*``, ``RECALLQ_EMBEDDING_*``. Times are in seconds."""

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
    """Most texts that one request may embed. None means 10 with DashScope (25 with its models v1
    and v2), else 100."""

    # What follows is not for mem0, which embeds by itself.
    embedding_provider: Provider | None = None
    """How embeddings are made: by DashScope's own protocol, by OpenAI's, or by a function. None
    goes by what else is set; see `provider`."""
    embedding_callable: str | None = None
    """The function, as ``package.module:name``."""
    embedding_concurrency: int | None = Field(None, ge=1, le=1024)
    """Most requests of a process at once. None means 8, and 1 for a function that is not async."""
    embedding_linger: float = Field(0.005, ge=0, le=10)
    """How long a text waits for others, to be embedded with them in one request."""
    embedding_timeout: float = Field(15.0, gt=0)
    """Longest request."""
    embedding_patience: float = Field(30.0, gt=0)
    """How long a text waits for its turn, or for a rate limit; after it the job is tried again."""
    embedding_rpm: float | None = Field(None, gt=0)
    """Most requests a minute of a process. None sets no limit."""
    embedding_tpm: float | None = Field(None, gt=0)
    """Most tokens a minute of a process. None sets no limit."""
    embedding_cache_mb: float = Field(64.0, ge=0)
    """Memory for vectors of texts that may come again, of each process; 0 for none."""
    embedding_cache_ttl: int | None = Field(None, ge=1)
    """How long Redis keeps vectors for all workers. None keeps none there."""

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
        """The embedding model, for what speaks OpenAI's protocol."""
        return _endpoint(
            self.embedding_model,
            self.embedding_base_url,
            self.embedding_api_key,
            "text-embedding-3-small",
            "text-embedding-v4",
        )

    def provider(self) -> Provider:
        """How embeddings are made, by what is set: by a function if there is one; by DashScope's
        own protocol if it is DashScope, or one of its models without a server; else by OpenAI's.
        """
        if self.embedding_provider is not None:
            return self.embedding_provider
        if self.embedding_callable is not None:
            return "callable"
        if self.embedding().is_dashscope:
            return "dashscope"
        if self.embedding_base_url is None and not os.environ.get("OPENAI_BASE_URL"):
            named = _DASHSCOPE_MODEL.match(self.embedding_model or "")
            return "dashscope" if named else "openai"
        return "openai"

    def native_embedding(self) -> Endpoint:
        """The embedding model, for what speaks DashScope's own protocol.

        A base URL that is known from elsewhere does, too: the OpenAI-compatible one, the one of the
        host alone, or that of the very endpoint.
        """
        endpoint = self.embedding()
        given = self.embedding_base_url
        if given is None and endpoint.is_dashscope and os.environ.get("OPENAI_BASE_URL"):
            given = os.environ["OPENAI_BASE_URL"]
        for name in ("DASHSCOPE_BASE_URL", "DASHSCOPE_HTTP_BASE_URL"):
            given = given or os.environ.get(name)
        key = self.embedding_api_key or _secret("DASHSCOPE_API_KEY")
        if key is None and endpoint.is_dashscope:
            key = endpoint.api_key
        return Endpoint(
            self.embedding_model or "text-embedding-v4", _native(given or _DASHSCOPE), key
        )

    @property
    def dimensions(self) -> int:
        """What vectors have, by what is known of the model. Raises `ConfigurationError`."""
        if self.embedding_dimensions is not None:
            return self.embedding_dimensions
        match self.provider():
            case "callable":
                raise ConfigurationError(
                    "RECALLQ_EMBEDDING_DIMENSIONS must say what the vectors of "
                    "RECALLQ_EMBEDDING_CALLABLE have"
                )
            case "dashscope":
                return _DIMENSIONS.get(self.native_embedding().model, _DASHSCOPE_DIMENSIONS)
            case "openai":
                endpoint = self.embedding()
                usual = _DASHSCOPE_DIMENSIONS if endpoint.is_dashscope else _OPENAI_DIMENSIONS
                return _DIMENSIONS.get(endpoint.model, usual)


def _endpoint(
    model: str | None,
    base_url: str | None,
    api_key: SecretStr | None,
    openai_model: str,
    dashscope_model: str,
) -> Endpoint:
    openai_key, dashscope_key = (_secret(name) for name in ("OPENAI_API_KEY", "DASHSCOPE_API_KEY"))
    if base_url is None and openai_key is None and api_key is None and dashscope_key is not None:
        base_url = _DASHSCOPE_URL
    openai_server = base_url is None
    if base_url is None:
        base_url = os.environ.get("OPENAI_BASE_URL") or _OPENAI_URL
    endpoint = Endpoint(model or openai_model, base_url, api_key)
    dashscope = endpoint.is_dashscope
    if dashscope and base_url.rstrip("/").endswith(_NATIVE):
        compatible = base_url.rstrip("/").removesuffix(_NATIVE) + _COMPATIBLE
        endpoint = replace(endpoint, base_url=compatible)
    key = api_key
    if key is None:
        # Where OPENAI_BASE_URL says DashScope, OPENAI_API_KEY is DashScope's.
        key = openai_key
        if dashscope:
            key = dashscope_key or (openai_key if openai_server else None)
    named = model or (dashscope_model if dashscope else openai_model)
    return replace(endpoint, model=named, api_key=key)


def _secret(name: str) -> SecretStr | None:
    value = os.environ.get(name)
    return SecretStr(value) if value else None


def _native(url: str) -> str:
    """DashScope's own base URL, by one that is perhaps another of its."""
    url = url.rstrip("/").removesuffix("/services/embeddings/text-embedding/text-embedding")
    if url.endswith(_COMPATIBLE):
        return url.removesuffix(_COMPATIBLE) + _NATIVE
    return url if urlsplit(url).path.strip("/") else url + _NATIVE
