"""The client's settings: arguments first, then ``RECALLQ_*`` variables, then defaults.

The worker's settings (`recallq_worker.settings`) extend these, so that one environment configures
a whole fleet.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from recallq.contract import DEFAULT_NAMESPACE, DEFAULT_TENANT, Wait
from recallq.errors import ConfigurationError
from recallq.redis_client import check_url
from recallq.signing import keys_in

ENV_PREFIX = "RECALLQ_"
LONGEST = 366 * 24 * 3600
"""Seconds. What is beyond a year is a mistake, and too much for some of those who get it."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


def _share(value: object) -> object:
    """A part of a whole that may also be all or nothing."""
    words = {"true": 1.0, "yes": 1.0, "on": 1.0, "false": 0.0, "no": 0.0, "off": 0.0}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else value


class ClientSettings(BaseSettings):
    """Connection, limits and batching of a `MemoryClient`. Times are in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    redis_url: str = Field("redis://localhost:6379/0", repr=False)
    """The Redis that serves as broker, coordination and result backend unless these are split."""
    broker_url: str = Field("", repr=False)
    coordination_url: str = Field("", repr=False)
    result_url: str = Field("", repr=False)
    namespace: Name = DEFAULT_NAMESPACE
    """Prefix of every key and queue: fleets with different namespaces share a Redis unseen."""

    tenant: str = DEFAULT_TENANT
    backend: str | None = None
    """The backend that workers must run; None takes whatever they run."""

    timeout: float = Field(30.0, gt=0, le=LONGEST)
    """How long an awaited call waits for its answer."""
    wait: Wait = "searchable"
    """What an awaited add waits for, where the backend tells the two apart: that its messages are
    stored, or that searches find them as well."""
    connect_timeout: float = Field(5.0, gt=0, le=LONGEST)
    default_top_k: int = Field(10, ge=1)
    default_page_size: int = Field(10, ge=1)

    max_in_flight: int = Field(1000, ge=1)
    """Calls beyond this many wait for their turn."""
    high_water_mark: int = Field(100_000, ge=1)
    """Outstanding jobs of a lane beyond which calls raise QueueFull. A batch that finds fewer comes
    in whole, so a lane may hold some batches more."""
    max_message_bytes: int = Field(1024 * 1024, ge=1024)
    max_job_bytes: int = Field(8 * 1024 * 1024, ge=1024)
    max_id_bytes: int = Field(64 * 1024, ge=1)
    """Longest user, session or tenant id and idempotency key."""
    max_page_size: int = Field(10_000, ge=1)
    """Most records one list or search may ask for."""

    signing_keys: str = Field("", repr=False)
    """Shared secrets, by comma: the first signs messages, and a worker that has any runs only what
    one of them has signed; see `recallq.signing`."""

    traces: Annotated[float, Field(ge=0, le=1), BeforeValidator(_share)] = 0.0
    """The share of calls, and of the jobs that come of them, traced with OpenTelemetry: from
    0 to 1, or true for all. Those within a span of their caller's go by that, and workers go by
    calls. Needs the extra ``traces``; see `recallq.tracing`."""

    batch_max_jobs: int = Field(64, ge=1, le=10_000)
    batch_max_bytes: int = Field(512 * 1024, ge=1024)
    batch_max_records: int = Field(2_000, ge=1)
    """Most records the results of one batch may hold together."""
    batch_window: int = Field(4, ge=1)
    """Unanswered batches per lane and operation up to which a new job leaves at once."""
    batch_linger: float = Field(0.005, ge=0, le=LONGEST)
    """Longest wait of a job for company once the window is used up."""

    @field_validator("redis_url", "broker_url", "coordination_url", "result_url")
    @classmethod
    def _redis_scheme(cls, url: str) -> str:
        return check_url(url) if url else url

    @field_validator("signing_keys")
    @classmethod
    def _keys_are_long(cls, keys: str) -> str:
        keys_in(keys)
        return keys

    @field_validator("redis_url")
    @classmethod
    def _redis_is_needed(cls, url: str) -> str:
        if not url:
            raise ValueError("is empty")
        return url

    @model_validator(mode="after")
    def _defaults_keep_the_limit(self) -> Self:
        if max(self.default_top_k, self.default_page_size) > self.max_page_size:
            raise ValueError("default_top_k and default_page_size must not exceed max_page_size")
        return self

    @model_validator(mode="after")
    def _split_urls_default_to_one(self) -> Self:
        for name in ("broker_url", "coordination_url", "result_url"):
            if not getattr(self, name):
                object.__setattr__(self, name, self.redis_url)
        return self

    def changed(self, **arguments: Any) -> Self:
        """A copy with some settings replaced. Raises `ConfigurationError`."""
        given = {key: value for key, value in arguments.items() if value is not None}
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).load(**(kept | given))

    @classmethod
    def load(cls, **arguments: Any) -> Self:
        """Settings from arguments (None counts as not given) and the environment.

        Raises `ConfigurationError`, naming the variable and the problem but never the value, which
        may be a credential.
        """
        unknown = sorted(set(arguments) - set(cls.model_fields))
        if unknown:
            known = ", ".join(sorted(cls.model_fields))
            raise ConfigurationError(f"unknown setting {unknown[0]!r}; the settings are: {known}")
        try:
            return cls(**{key: value for key, value in arguments.items() if value is not None})
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            reason = problem["msg"].removeprefix("Value error, ")
            if not problem["loc"]:  # about several settings, which it names itself
                raise ConfigurationError(reason) from error
            name = str(problem["loc"][0])
            raise ConfigurationError(f"{name} ({ENV_PREFIX}{name.upper()}): {reason}") from error
