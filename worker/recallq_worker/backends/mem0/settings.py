"""How the mem0 backend is set up: ``RECALLQ_MEM0_*``, and ``MEM0_API_KEY`` as mem0's users know it.

The open-source library takes any mem0 configuration, as JSON or as the path of a file. What that
leaves open is filled in so that it works for a fleet: vectors in the Redis that runs already, LLM
and embedder from `recallq_worker.models`.
"""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from recallq.errors import ConfigurationError
from recallq_worker.models import Endpoint, ModelSettings

_LARGEST_BATCH = 100
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
    config: str = ""
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
        text, source = self.config.strip(), "RECALLQ_MEM0_CONFIG"
        if not text:
            return {}
        if not text.startswith("{"):
            source = text
            try:
                text = Path(text).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(
                    f"RECALLQ_MEM0_CONFIG is no JSON object, and as a file it cannot be read: "
                    f"{error}"
                ) from error
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ConfigurationError(f"{source} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigurationError(f"{source} must be a JSON object")
        return found


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
    config["history_db_path"] = ":memory:"  # not used: see `recent`
    if "llm" not in config:
        config["llm"] = {"provider": "openai", "config": _openai(models.llm(), "LLM", infer)}
    if "embedder" not in config:
        embedder = _openai(models.embedding(), "EMBEDDING", needed=True)
        if models.embedding_dimensions is not None or models.embedding().is_dashscope:
            # Asked for only then: not every server knows what dimensions are.
            embedder["embedding_dims"] = models.dimensions
        config["embedder"] = {"provider": "openai", "config": embedder}
    store = config.setdefault("vector_store", {"provider": "redis"})
    if not isinstance(store, dict):
        raise ConfigurationError("vector_store of the mem0 configuration must be an object")
    where = store.setdefault("config", {}) if store.get("config") is not None else {}
    store["config"] = where
    if store.get("provider") == "redis":
        where.setdefault("redis_url", store_url)
        where.setdefault("collection_name", f"{namespace}:mem0")
        where.setdefault("embedding_model_dims", _dimensions(config, models))
    if store.get("provider", "qdrant") == "qdrant" and not {"host", "url", "client"} & set(where):
        raise ConfigurationError(
            "qdrant inside a process loses rows as soon as two threads or processes use it: give "
            "the url of a qdrant server, or leave vector_store out to use Redis"
        )
    return config


def batch_limit(config: dict[str, Any], models: ModelSettings) -> int:
    """Most texts that one embedding request may hold."""
    if models.embedding_batch is not None:
        return models.embedding_batch
    url = (config["embedder"].get("config") or {}).get("openai_base_url") or ""
    return _DASHSCOPE_BATCH if Endpoint("", url, None).is_dashscope else _LARGEST_BATCH


def _dimensions(config: dict[str, Any], models: ModelSettings) -> int:
    dimensions = (config["embedder"].get("config") or {}).get("embedding_dims")
    return int(dimensions) if dimensions else models.dimensions


def _openai(endpoint: Endpoint, kind: str, needed: bool) -> dict[str, Any]:
    key = endpoint.api_key
    if key is None and needed:
        raise ConfigurationError(
            f"mem0 needs a model: set OPENAI_API_KEY, DASHSCOPE_API_KEY or RECALLQ_{kind}_API_KEY "
            f"(with RECALLQ_{kind}_BASE_URL for a server of your own; a key it does not check may "
            "be any text)"
        )
    return {
        "model": endpoint.model,
        "api_key": "none" if key is None else key.get_secret_value(),
        "openai_base_url": endpoint.base_url,
    }
