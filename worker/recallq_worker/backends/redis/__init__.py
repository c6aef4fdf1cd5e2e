"""The redis backend."""

from recallq_worker.backends.redis.store import RedisStore

__all__ = ["RedisStore"]
