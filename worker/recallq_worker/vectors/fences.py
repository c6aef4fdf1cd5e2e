"""The fences of deletions, for rows that are kept where nobody knows of fences.

A delete raises one before it removes anything; what was submitted before the delete and comes
after it, from a worker that was slow, finds it there. Each is a key of its own, which expires by
itself. (`RedisVectors` looks at its own in the step that writes.)
"""

from __future__ import annotations

from typing import Any

import redis

from recallq.keys import escape
from recallq_worker.vectors.client import asking

LIVES_MS = 30 * 24 * 3600 * 1000
"""How long a fence outlives its delete: longer than any write may lie in a queue."""

# KEYS: fence. ARGV: epoch, lifetime (ms).
_RAISE = """
if tonumber(ARGV[1]) > tonumber(redis.call('GET', KEYS[1]) or '0') then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
"""


class Fences:
    """Those of any number of owners, each of whose rows are in groups. For use by any thread."""

    def __init__(self, client: redis.Redis, url: str, prefix: str) -> None:
        """`prefix` begins the keys; `url` is where `client` is connected to."""
        self._redis = client
        self._url = url
        self._prefix = prefix
        self._raise = client.register_script(_RAISE)

    def set(self, owner: str, group: str | None, before_epoch: int) -> None:
        """From now on rows with a lower epoch are fenced off: of a group, or all."""
        fence = self.keys(owner, group or "")[0 if group is None else 1]
        with asking(self._url):
            self._raise(keys=[fence], args=[before_epoch, LIVES_MS])

    def stand_before(self, owner: str, group: str, epoch: int) -> bool:
        """Whether a deletion has passed that concerns what has this epoch."""
        with asking(self._url):
            fences: Any = self._redis.mget(self.keys(owner, group))
        return any(epoch < int(fence) for fence in fences if fence is not None)

    def keys(self, owner: str, group: str) -> tuple[str, str]:
        """The fences of everything that is the owner's, and of a group."""
        base = f"{self._prefix}:{{{escape(owner)}}}:f"
        return base, f"{base}:{escape(group)}"
