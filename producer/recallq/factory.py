"""MemoryServiceFactory: the way in for programs written for agentscope-runtime 1.0."""

from __future__ import annotations

from typing import Any

from recallq.client import MemoryClient
from recallq.errors import ConfigurationError
from recallq.reference import ReferenceSettings

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
        reference = ReferenceSettings.load(
            **{
                f"redis_{name}": kwargs.pop(name)
                for name in sorted(_CONNECTION_ARGUMENTS & kwargs.keys())
            }
        )
        backend = backend_type.lower() if backend_type is not None else reference.backend
        if backend is not None:
            kwargs["backend"] = backend
        if reference.redis_redis_url is not None:
            kwargs.setdefault("redis_url", reference.redis_redis_url)
        if reference.redis_socket_connect_timeout is not None:
            kwargs.setdefault("connect_timeout", reference.redis_socket_connect_timeout)
        url = kwargs.pop("redis_url", None)
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
