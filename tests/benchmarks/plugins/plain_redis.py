"""The redis backend without its search index: what an add costs that nobody has to find again."""

from __future__ import annotations

from typing import Any, ClassVar

from recallq_worker.backends.redis import RedisStore, scripts

_ENTER = "redis.call('HSET', entries, id, '')"
assert _ENTER in scripts.ADD


class PlainRedisStore(RedisStore):
    """Stores records, and no entries of them; its searches find nothing."""

    name: ClassVar[str] = "plain_redis"

    async def start(self) -> None:
        await super().start()
        self._add = self._redis.register_script(scripts.ADD.replace(_ENTER, ""))
        self._index.notice = _nothing  # type: ignore[method-assign]  # nothing is to be tended


def _nothing(base: str, **_: Any) -> None:
    pass
