"""The settings that agentscope-runtime 1.0's memory services were configured with.

Its factory read ``MEMORY_BACKEND`` and ``MEMORY_<BACKEND>_<ARGUMENT>`` and passed the strings on.
Here they have types, and both `MemoryServiceFactory` and the worker honour them, below RecallQ's
own ``RECALLQ_*``. Only what still has a meaning is taken up; what a reader would expect to matter
and does not is refused rather than ignored.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from recallq.errors import ConfigurationError
from recallq.redis_client import check_url

BACKEND_VARIABLE = "MEMORY_BACKEND"


class ReferenceSettings(BaseSettings):
    """``MEMORY_BACKEND`` and the arguments of the reference's `RedisMemoryService`."""

    model_config = SettingsConfigDict(
        env_prefix="MEMORY_", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    backend: str | None = None
    redis_redis_url: str | None = Field(None, repr=False)
    redis_ttl_seconds: int | None = Field(None, ge=1)
    redis_max_messages_per_session: int | None = Field(None, ge=1)
    redis_socket_timeout: float | None = Field(None, gt=0)
    redis_socket_connect_timeout: float | None = Field(None, gt=0)
    redis_max_connections: int | None = Field(None, ge=1)
    redis_retry_on_timeout: bool | None = None
    redis_health_check_interval: float | None = Field(None, ge=0)
    redis_socket_keepalive: bool | None = None

    @field_validator("redis_redis_url")
    @classmethod
    def _redis_scheme(cls, url: str | None) -> str | None:
        return check_url(url) if url else url

    @classmethod
    def load(cls, **arguments: Any) -> Self:
        """Settings from arguments and the environment. Raises `ConfigurationError`."""
        try:
            settings = cls(**{key: each for key, each in arguments.items() if each is not None})
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            name = str(problem["loc"][0])
            reason = problem["msg"].removeprefix("Value error, ")
            raise ConfigurationError(f"MEMORY_{name.upper()}: {reason}") from error
        if settings.backend is not None:
            settings.backend = settings.backend.lower()
        return settings
