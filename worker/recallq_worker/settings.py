"""The worker's settings: everything the client has, and what only workers need."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator

from recallq.redis_client import check_url
from recallq.reference import ReferenceSettings
from recallq.settings import ENV_PREFIX, LONGEST, ClientSettings
from recallq_worker.models import ModelSettings

DEFAULT_BACKEND = "redis"
_NEARLY = 0.92
"""How alike two names are of which one is likely meant to be the other: a letter or two."""


def _upper(name: object) -> object:
    return name.upper() if isinstance(name, str) else name


LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)
]


class WorkerSettings(ClientSettings):
    """``RECALLQ_*`` variables; below them the reference's ``MEMORY_*``. Times are in seconds."""

    backend: str = DEFAULT_BACKEND
    """Name of the memory backend that this worker runs."""
    concurrency: int = Field(8, ge=1, le=1000)
    """Batches that one worker process runs at once."""
    nice: int | None = Field(None, ge=0, le=19)
    """How far the process steps back for others on its machine. None means 10 for a worker that
    does not take the live lane, so that bulk work does not delay live work beside it."""
    parallel_jobs: int = Field(100, ge=1)
    """Jobs of one batch that run at once, where the backend takes them one by one."""
    job_timeout: float = Field(30.0, gt=0, le=LONGEST)
    """Longest run of one job; after it the job fails as BackendUnavailable."""
    straggler_grace: float = Field(0.05, gt=0, le=LONGEST)
    """How long a batch's settled jobs wait for its slow ones before they are answered."""
    result_expires: int = Field(3600, ge=1, le=LONGEST)
    """How long results are kept, and handles know their jobs."""
    visibility_timeout: int = Field(60, ge=5, le=LONGEST)
    """Age at which a message that a worker has not acknowledged goes back to its queue. Recovery
    does not wait for it, and a worker that is merely slow keeps its batch: what comes back is then
    found to be done or in hand, and dropped."""
    retry_attempts: int = Field(10, ge=1)
    """Most runs of a job whose backend is unavailable; after the last the job is a dead letter."""
    retry_base: float = Field(0.5, gt=0, le=LONGEST)
    """Longest wait after the first failed run; it doubles with each further one."""
    retry_cap: float = Field(60.0, gt=0, le=LONGEST)
    """Longest wait between two runs, unless the backend asks for more."""

    slow_users: int = Field(64, ge=1)
    """Users for whom a worker extracts memories at once, in its slow lane."""
    index_batches: int = Field(500, ge=1)
    """Batches whose stored messages a worker makes searchable at once, in its slow lane. Most of
    that is waiting, and their texts share requests to the embedding service."""
    slow_pause: float = Field(0.1, ge=0, le=LONGEST)
    """How long the first add of a user waits for others, to be extracted with them in one call."""
    slow_attempts: int = Field(30, ge=1)
    """Most tries of what takes the slow lane, in place of `retry_attempts`: with the usual waits
    they take six minutes or more, since models and search indexes may be away for some."""
    slow_tokens: int = Field(8000, ge=1)
    """Most tokens of messages in one extraction, about; a single add may have more."""
    slow_timeout: float = Field(120.0, gt=0, le=LONGEST)
    """Longest extraction; after it the adds are tried again."""
    slow_patience: float = Field(10.0, ge=0, le=LONGEST)
    """How long a worker that is to stop lets its extractions come to their end, before it leaves
    them to others."""

    search_strategy: Literal["keyword", "vector", "hybrid"] = "keyword"
    """How the redis and in_memory backends search: by words, by meaning, or by both. The last two
    embed every message in a second step, with the model that `ModelSettings` names."""

    vector_cache_mb: float = Field(128.0, gt=0)
    """Memory for copies of users' vectors in each worker that searches Redis by meaning: those of
    a user who has more are read again for every search."""

    log_level: LogLevel = "WARNING"
    """From which level on the worker logs: INFO has a line for each job."""
    log_format: Literal["text", "json"] = "text"
    """How the worker logs: lines for people, or a JSON object a line."""

    http_port: int | None = Field(None, ge=0, le=65535)
    """Where each worker process answers /healthz, /readyz and /metrics; 0 takes a free port, which
    `recallq status` tells. None opens none, and nothing is measured."""
    http_host: str = "127.0.0.1"
    """The address at which it does."""
    events: bool = False
    """Whether workers tell of each batch, and that they live, in Celery's events: Flower lives on
    these. They say nothing of what is in a batch."""

    store_url: str = Field("", repr=False)
    """The Redis in which the redis backend keeps memories; redis_url by default."""
    store_ttl: int | None = Field(None, ge=1)
    """Age at which memories expire. None keeps them for ever."""
    max_messages_per_session: int | None = Field(None, ge=1)
    """Only the newest this many of a session are kept. None keeps all."""

    @field_validator("store_url")
    @classmethod
    def _store_scheme(cls, url: str) -> str:
        return check_url(url) if url else url

    @classmethod
    def load(cls, **arguments: Any) -> Self:
        """As `ClientSettings.load`, with the reference's variables as defaults."""
        own = super().load(**arguments)
        reference = ReferenceSettings.load()
        inherited = {
            "backend": reference.backend,
            "redis_url": reference.redis_redis_url,
            "store_ttl": reference.redis_ttl_seconds,
            "max_messages_per_session": reference.redis_max_messages_per_session,
            "connect_timeout": reference.redis_socket_connect_timeout,
        }
        missing = {
            name: value
            for name, value in inherited.items()
            if value is not None and name not in own.model_fields_set
        }
        settings = super().load(**(arguments | missing)) if missing else own
        if not settings.store_url:
            settings.store_url = settings.redis_url
        return settings


def misspelt(names: Iterable[str]) -> dict[str, str]:
    """Of names of variables those that are none of a worker's settings, but nearly, and which one.

    Backends have settings of their own, so that others may mean something.
    """
    known = {
        f"{ENV_PREFIX}{name.upper()}"
        for settings in (WorkerSettings, ModelSettings)
        for name in settings.model_fields
    }
    found = {}
    for name in names:
        if name.startswith(ENV_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=_NEARLY)
            if near:
                found[name] = near[0]
    return found


@lru_cache(maxsize=1)
def current() -> WorkerSettings:
    """The settings of this process, read from its environment once."""
    return WorkerSettings.load()
