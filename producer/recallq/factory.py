"""MemoryServiceFactory: the way in for programs written for agentscope-runtime 1.0."""

from __future__ import annotations

import os
from typing import Any

from recallq.client import MemoryClient
from recallq.errors import ConfigurationError
from recallq.reference import ReferenceSettings
from recallq.settings import ENV_PREFIX

_WORKER_SETTINGS = {
    "ttl_seconds": "RECALLQ_STORE_TTL",
    "max_messages_per_session": "RECALLQ_MAX_MESSAGES_PER_SESSION",
}
_CONNECTION_ARGUMENTS = frozenset(
    {
        "redis_url",
        "socket_timeout",
        "socket_connect_timeout",
        "max_connections",
        "retry_on_timeout",
        "health_check_interval",
        "socket_keepalive",
    }
)


class MemoryServiceFactory:
    """Makes clients under the reference's names.

    The backend lives in the workers, so naming one here is a demand on them: a job that meets a
    worker with another backend fails with `WrongBackend` instead of landing in the wrong store.
    """

    @classmethod
    async def create(cls, backend_type: str | None = None, **kwargs: Any) -> MemoryClient:
        """A started client for workers that run `backend_type`.

        `backend_type` None takes ``MEMORY_BACKEND``, and without that whatever the workers run.
        `kwargs` are the reference's arguments or any of `ClientSettings`; they win over
        ``MEMORY_<BACKEND>_*`` variables. Raises `ConfigurationError`, also when workers run and
        none of them has that backend, and `ServiceUnavailable`.
        """
        for name, variable in _WORKER_SETTINGS.items():
            if kwargs.get(name) is not None:
                raise ConfigurationError(
                    f"{name} belongs to the workers, which keep the memories: set {variable} "
                    f"(or MEMORY_REDIS_{name.upper()}) where they run"
                )
            kwargs.pop(name, None)
        message_type = kwargs.pop("message_type", None)
        given = {name: kwargs.pop(name) for name in _CONNECTION_ARGUMENTS & kwargs.keys()}
        reference = ReferenceSettings.load(
            **{f"redis_{name}": value for name, value in given.items()}
        )

        def choose(own: str, argument: Any, inherited: Any) -> Any:
            """Arguments first, then RecallQ's own variable, then the reference's."""
            if argument is not None:
                return argument
            return None if os.environ.get(ENV_PREFIX + own) else inherited

        backend = choose("BACKEND", backend_type, reference.backend)
        kwargs.setdefault("backend", backend.lower() if backend is not None else None)
        url = choose("REDIS_URL", given.get("redis_url"), reference.redis_redis_url)
        timeout = given.get("socket_connect_timeout")
        kwargs.setdefault(
            "connect_timeout",
            choose("CONNECT_TIMEOUT", timeout, reference.redis_socket_connect_timeout),
        )
        if message_type is not None:
            kwargs["message_type"] = message_type
        client = MemoryClient(url, **kwargs)
        await client.start()
        try:
            await cls._check_workers(client)
        except BaseException:
            await client.stop()
            raise
        return client

    @staticmethod
    async def _check_workers(client: MemoryClient) -> None:
        wanted = client.settings.backend
        running = {worker.backend for worker in await client.workers()}
        if wanted is not None and running and wanted not in running:
            raise ConfigurationError(
                f"the workers run {', '.join(sorted(running))}, not {wanted}; start a worker with "
                f"RECALLQ_BACKEND={wanted} under a RECALLQ_NAMESPACE of its own, or ask for "
                f"{' or '.join(sorted(running))}"
            )
