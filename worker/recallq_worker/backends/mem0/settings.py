"""How the mem0 backend is set up: ``RECALLQ_MEM0_*``, and ``MEM0_API_KEY`` as mem0's users know it.

The open-source library takes any mem0 configuration, as JSON or as the path of a file. What that
leaves open is filled in so that it works for a fleet: vectors in the Redis that runs already, LLM
and embedder from `recallq_worker.models`.
"""

from __future__ import annotations

import json
import os
from copy import deepcopy
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from recallq.errors import ConfigurationError
from recallq_worker.backends.given import read_object
from recallq_worker.models import Endpoint, ModelSettings

_LARGEST_BATCH = 100
_ANSWER_TOKENS = 8000
"""What the LLM may answer at once: mem0's 2,000 are too few for many adds together."""
_DASHSCOPE_BATCH = 10
"""Texts that DashScope's embedding models take at once."""


class Mem0Settings(BaseSettings):
    """``RECALLQ_MEM0_*``."""

    model_config = SettingsConfigDict(
        env_prefix="RECALLQ_MEM0_", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    mode: Literal["oss", "platform"] = "oss"
    """mem0's open-source library in the worker, or its hosted platform."""
    infer: bool = True
    """Whether an LLM makes memories of messages; else they are stored as they are. A call's own
    ``infer`` goes before it."""
    config: str = Field("", repr=False)
    """Of the library: a mem0 configuration, as JSON or the path of a JSON file."""
    api_key: SecretStr | None = None
    """Of the platform; ``MEM0_API_KEY`` does as well."""
    host: str = "https://api.mem0.ai"
    """Of the platform."""

    @field_validator("host")
    @classmethod
    def _host_is_a_url(cls, host: str) -> str:
        if not host.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return host.rstrip("/")

    @classmethod
    def load(cls, **arguments: Any) -> Self:
        """Settings from arguments and the environment. Raises `ConfigurationError`."""
        try:
            settings = cls(**arguments)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            reason = problem["msg"].removeprefix("Value error, ")
            name = str(problem["loc"][0]).upper()
            raise ConfigurationError(f"RECALLQ_MEM0_{name}: {reason}") from error
        if settings.api_key is None and (key := os.environ.get("MEM0_API_KEY")):
            settings.api_key = SecretStr(key)
        if settings.mode == "platform" and settings.api_key is None:
            raise ConfigurationError("mem0's platform needs a key: set MEM0_API_KEY")
        return settings

    def given(self) -> dict[str, Any]:
        """The configuration that the user wrote. Raises `ConfigurationError`."""
        return read_object(self.config, "RECALLQ_MEM0_CONFIG", form="JSON", parse=json.loads)


def complete(
    given: dict[str, Any],
    models: ModelSettings,
    *,
    store_url: str,
    namespace: str,
    infer: bool,
) -> dict[str, Any]:
    """A mem0 configuration with what `given` leaves open. Raises `ConfigurationError`."""
    config = deepcopy(given)
    for name in ("llm", "embedder", "vector_store"):
        section = config.setdefault(name, {})
        if not isinstance(section, dict) or not isinstance(section.get("config") or {}, dict):
            raise ConfigurationError(f"{name} of the mem0 configuration must be an object")
        section.setdefault("provider", "redis" if name == "vector_store" and not section else None)
        section["config"] = section.get("config") or {}
    config["history_db_path"] = ":memory:"  # not used: see `recent`
    llm, embedder, store = config["llm"], config["embedder"], config["vector_store"]
    if _fill_in(llm, models.llm(), "LLM", infer):
        llm["config"].setdefault("max_tokens", _ANSWER_TOKENS)
    meant = llm["provider"] != "openai" or "openrouter_base_url" in llm["config"]
    if os.environ.get("OPENROUTER_API_KEY") and not meant:
        raise ConfigurationError(
            "mem0 sends every prompt to OpenRouter while OPENROUTER_API_KEY is set, whatever else "
            "is: unset it, or say openrouter_base_url in the llm section of the mem0 configuration "
            "if that is meant"
        )
    asks_for_dimensions = models.embedding_dimensions is not None or models.embedding().is_dashscope
    if _fill_in(embedder, models.embedding(), "EMBEDDING", needed=True) and asks_for_dimensions:
        # Asked for only then: not every server knows what dimensions are.
        embedder["config"].setdefault("embedding_dims", models.dimensions)
    where = store["config"]
    if store["provider"] == "redis":
        where.setdefault("redis_url", store_url)
        where.setdefault("collection_name", f"{namespace}:mem0")
        where.setdefault("embedding_model_dims", dimensions_of(config, models))
    served = where.get("url") or (where.get("host") and where.get("port")) or where.get("client")
    if store["provider"] in (None, "qdrant") and not served:
        raise ConfigurationError(
            "qdrant inside a process loses rows as soon as two threads or processes use it: give "
            "the url of a qdrant server (or its host and port), or leave vector_store out to use "
            "Redis"
        )
    return {
        name: {key: value for key, value in section.items() if value is not None}
        if isinstance(section, dict) and "provider" in section
        else section
        for name, section in config.items()
    }


def batch_limit(config: dict[str, Any], models: ModelSettings) -> int:
    """Most texts that one embedding request may hold."""
    if models.embedding_batch is not None:
        return models.embedding_batch
    url = (config["embedder"].get("config") or {}).get("openai_base_url") or ""
    return _DASHSCOPE_BATCH if Endpoint("", url, None).is_dashscope else _LARGEST_BATCH


def dimensions_of(config: dict[str, Any], models: ModelSettings) -> int:
    """What the embedder's vectors have, by what the configuration says."""
    said = config["embedder"]["config"].get("embedding_dims")
    if said is None:
        return models.dimensions
    if not isinstance(said, int) or said < 1:
        raise ConfigurationError("embedding_dims of the mem0 configuration must be a whole number")
    return said


def _fill_in(section: dict[str, Any], endpoint: Endpoint, kind: str, needed: bool) -> bool:
    """Says in a section for an OpenAI-compatible server what it leaves open; whether it is one."""
    if section["provider"] not in (None, "openai"):
        return False
    section["provider"] = "openai"
    config = section["config"]
    own_server = "openai_base_url" in config
    if not own_server:
        config.setdefault("model", endpoint.model)
        config["openai_base_url"] = endpoint.base_url
    if "api_key" not in config:
        key = endpoint.api_key
        if key is None and needed:
            raise ConfigurationError(
                f"mem0 needs a model: set OPENAI_API_KEY, DASHSCOPE_API_KEY or "
                f"RECALLQ_{kind}_API_KEY (with RECALLQ_{kind}_BASE_URL for a server of your own; a "
                "key it does not check may be any text)"
            )
        config["api_key"] = "none" if key is None else key.get_secret_value()
    return True
