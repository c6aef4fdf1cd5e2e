"""How the ReMe backends are set up.

``FLOW_LLM_*`` and ``FLOW_EMBEDDING_*`` say where the models are served, as ReMe's users know it;
``RECALLQ_LLM_*`` and ``RECALLQ_EMBEDDING_*`` (`recallq_worker.models`) go before them, and say
which models. ``RECALLQ_REME_CONFIG`` takes what else ReMe's own configuration files say.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from recallq.errors import ConfigurationError
from recallq_worker.backends.given import read_object
from recallq_worker.models import Endpoint, ModelSettings

SHARED_STORES = ("redis", "qdrant", "elasticsearch", "pgvector")
"""Vector stores in which all workers see the same; ReMe's others are a process's own."""


_OPENAI = "openai_compatible"
_SECTIONS = frozenset(
    {"llm", "embedding_model", "vector_store", "flow", "language"}
    # What is for ReMe's own servers does no harm.
    | {"backend", "cmd", "enable_logo", "external_mcp", "http", "init_logger", "mcp", "metadata"}
    | {"disabled_flows", "enabled_flows", "ray_max_workers", "thread_pool_max_workers"}
)


class RemeSettings(BaseSettings):
    """``RECALLQ_REME_*``."""

    model_config = SettingsConfigDict(
        env_prefix="RECALLQ_REME_", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    infer: bool = True
    """Whether an LLM makes memories of messages; else they are stored as they are. A call's own
    ``infer`` goes before it."""
    language: Literal["en", "zh"] = "en"
    """Of ReMe's prompts."""
    config: str = Field("", repr=False)
    """A ReMe configuration, as the path of a YAML file or as JSON: what it leaves open is as in
    ReMe's own default."""

    @classmethod
    def load(cls, **arguments: Any) -> Self:
        """Settings from arguments and the environment. Raises `ConfigurationError`."""
        try:
            return cls(**arguments)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            name = str(problem["loc"][0]).upper()
            raise ConfigurationError(f"RECALLQ_REME_{name}: {problem['msg']}") from error

    def given(self) -> dict[str, Any]:
        """The configuration that the user wrote. Raises `ConfigurationError`."""
        found = read_object(self.config, "RECALLQ_REME_CONFIG", form="YAML", parse=_parse)
        for name in ("llm", "embedding_model", "vector_store", "flow"):
            section = found.get(name) or {}
            if not isinstance(section, dict) or not all(
                isinstance(each, dict) for each in section.values()
            ):
                raise ConfigurationError(
                    f"{name} of the ReMe configuration must be an object of objects by their names"
                )
        if unknown := found.keys() - _SECTIONS:
            raise ConfigurationError(
                f"the ReMe configuration has no section {min(map(str, unknown))!r}; there "
                f"are {', '.join(sorted(_SECTIONS))}"
            )
        for name in ("llm", "embedding_model"):
            for model, section in (found.get(name) or {}).items():
                if section.get("backend", _OPENAI) != _OPENAI:
                    raise ConfigurationError(
                        f"{name}.{model}.backend of the ReMe configuration must be {_OPENAI}"
                    )
        store = (found.get("vector_store") or {}).get("default") or {}
        if store.get("backend", "redis") not in SHARED_STORES:
            raise ConfigurationError(
                f"vector_store.default.backend of the ReMe configuration is {store['backend']!r}, "
                f"which workers cannot share; use {', '.join(SHARED_STORES)}"
            )
        return found


def _parse(text: str) -> Any:
    # It comes with ReMe, whose configurations are the only YAML here.
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}"
        raise ValueError(f"it cannot be read{place}") from None  # it may hold keys


@dataclass(frozen=True, slots=True)
class Models:
    """Where the models are served. What names them may yet be missing: ReMe's defaults do."""

    llm: Endpoint | None
    """None where no LLM is needed. Its model may be empty."""
    embedding: ModelSettings

    @classmethod
    def load(cls, given: dict[str, Any], *, infer: bool) -> Self:
        """By the environment and a ReMe configuration. Raises `ConfigurationError`, which names
        all that is missing."""
        own = ModelSettings.load()
        llm = _params(given, "llm")
        vectors = _params(given, "embedding_model")
        missing: list[str] = []
        endpoint = None
        if infer:
            url = own.llm_base_url or _found(llm, "base_url", "FLOW_LLM_BASE_URL", missing)
            key = own.llm_api_key or SecretStr(_found(llm, "api_key", "FLOW_LLM_API_KEY", missing))
            endpoint = Endpoint(own.llm_model or "", _checked(url, "LLM"), key)
        embedding: dict[str, Any] = {}
        if own.embedding_provider in (None, "openai") and own.embedding_callable is None:
            embedding["embedding_provider"] = "openai"
            url = own.embedding_base_url or _found(
                vectors, "base_url", "FLOW_EMBEDDING_BASE_URL", missing
            )
            embedding["embedding_base_url"] = _checked(url, "EMBEDDING")
            if own.embedding_api_key is None:
                embedding["embedding_api_key"] = SecretStr(
                    _found(vectors, "api_key", "FLOW_EMBEDDING_API_KEY", missing)
                )
        if missing:
            raise ConfigurationError(
                f"ReMe needs {', '.join(missing)}: set what is missing (for a server that checks "
                "no key, the key may be any text)"
            )
        return cls(endpoint, own.model_copy(update=embedding))

    def embedding_as(self, section: Any) -> ModelSettings:
        """The embedding model, with what only ReMe's configuration, in an
        ``EmbeddingModelConfig``, says of it. Raises `ConfigurationError`."""
        own, params = self.embedding, section.params
        more: dict[str, Any] = {}
        if own.provider() == "openai":
            if own.embedding_model is None:
                more["embedding_model"] = section.model_name
            if own.embedding_dimensions is None and own.embedding_model is None:
                more["embedding_dimensions"] = params.get("dimensions")
            if own.embedding_batch is None:
                more["embedding_batch"] = params.get("max_batch_size")
        return ModelSettings.load(**own.model_dump(exclude_none=True), **_without_none(more))


def _params(given: dict[str, Any], name: str) -> dict[str, Any]:
    section = (given.get(name) or {}).get("default") or {}
    params = section.get("params") or {}
    return params if isinstance(params, dict) else {}


def _found(params: dict[str, Any], name: str, variable: str, missing: list[str]) -> str:
    value = params.get(name) or os.environ.get(variable)
    if not value:
        missing.append(variable)
        return "http://missing"
    return str(value)


def _checked(url: str, kind: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(
            f"FLOW_{kind}_BASE_URL, or where else the base URL is from (RECALLQ_{kind}_BASE_URL, "
            "the ReMe configuration), must begin with http:// or https://"
        )
    return url


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
