"""The last messages of each session, which mem0 puts into its next prompt.

mem0 keeps them in a SQLite file, or in each process's memory: then workers know different ones, and
a deleted user's words live on in prompts. Here they are in Redis, a key per session, fenced by
deletions like everything else, and gone a month after the session was last heard. mem0's log of
changes to each memory, which is in the same place there, is not kept: nothing here reads it.

The fences stand for the vector stores as well that know none.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from recallq.keys import escape
from recallq.redis_client import connect_threads
from recallq_worker.backends.mem0.drafts import current
from recallq_worker.vectors.client import asking
from recallq_worker.vectors.fences import LIVES_MS, Fences

_MOST = 10
"""What mem0 keeps."""
_LONGEST = 4000
"""Characters of a message that are enough to know what it was about."""
_CHUNK = 500

# KEYS: the session's messages, the user's sessions, the user's fence, the session's.
# ARGV: lowest epoch of the messages, the messages, the session's key, lifetime (ms).
_SAVE = """
local fence = math.max(tonumber(redis.call('GET', KEYS[3]) or '0'),
                       tonumber(redis.call('GET', KEYS[4]) or '0'))
if tonumber(ARGV[1]) < fence then return 0 end
redis.call('HSET', KEYS[1], 'e', ARGV[1], 'm', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], redis.call('TIME')[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
-- Of sessions that were not heard for that long, nothing is left but their names here.
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', redis.call('TIME')[1] - ARGV[4] / 1000)
return 1
"""

# KEYS: the user's sessions, then messages of sessions. ARGV: epoch.
_FORGET = """
for i = 2, #KEYS do
  local epoch = redis.call('HGET', KEYS[i], 'e')
  if not epoch or tonumber(epoch) < tonumber(ARGV[1]) then
    redis.call('DEL', KEYS[i])
    redis.call('ZREM', KEYS[1], KEYS[i])
  end
end
"""


class RecentMessages:
    """In place of mem0's ``SQLiteManager``; what mem0 writes goes into the open draft."""

    def __init__(self, url: str, collection: str, *, connect_timeout: float) -> None:
        self._url = url
        self._collection = collection
        self._redis = connect_threads(url, connect_timeout=connect_timeout)
        self.fences = Fences(self._redis, url, f"{collection}:recent")
        self._save = self._redis.register_script(_SAVE)
        self._forget = self._redis.register_script(_FORGET)

    # --- what mem0 calls ------------------------------------------------------------------------

    def get_last_messages(self, session_scope: str, limit: int = _MOST) -> list[dict[str, Any]]:
        draft = current()
        if draft is None:
            return []
        with asking(self._url):
            stored: Any = self._redis.hget(self._messages(draft.owner, draft.run), "m")
        return orjson.loads(stored)[-limit:] if stored else []

    def save_messages(self, messages: Sequence[dict[str, Any]], session_scope: str) -> None:
        draft = current()
        if draft is not None:
            draft.said += messages

    def add_history(self, *args: Any, **kwargs: Any) -> None:
        """Not kept."""

    def batch_add_history(self, records: Any) -> None:
        """Not kept."""

    def get_history(self, memory_id: str) -> list[dict[str, Any]]:
        return []

    def reset(self) -> None:
        """Nothing that is not some user's."""

    def close(self) -> None:
        self._redis.close()

    # --- what the backend calls -----------------------------------------------------------------

    def save(self, owner: str, run: str, said: Sequence[dict[str, Any]], epoch: int) -> None:
        """Adds messages to those of a session, and lets go of the oldest.

        The lowest epoch of all counts for them, so a deletion takes rather too many than too few.
        """
        key = self._messages(owner, run)
        with asking(self._url):
            found: Any = self._redis.hmget(key, ["m", "e"])
            stored, lowest = found
            now = datetime.now(UTC).isoformat()
            messages = orjson.loads(stored) if stored else []
            messages += [
                {
                    "role": each.get("role"),
                    "content": str(each.get("content") or "")[:_LONGEST],
                    "name": each.get("name"),
                    "created_at": now,
                }
                for each in said
            ]
            epoch = min(epoch, int(lowest)) if lowest else epoch
            self._save(
                keys=[key, self._sessions(owner), *self.fences.keys(owner, run)],
                args=[epoch, orjson.dumps(messages[-_MOST:]), key, LIVES_MS],
            )

    def forget(self, owner: str, run: str | None, before_epoch: int) -> None:
        """Removes what is older than a deletion, and lets nothing older come."""
        sessions = self._sessions(owner)
        self.fences.set(owner, run, before_epoch)
        with asking(self._url):
            if run is not None:
                self._forget(keys=[sessions, self._messages(owner, run)], args=[before_epoch])
                return
            names: Any = self._redis.zrange(sessions, 0, -1)
            for start in range(0, len(names), _CHUNK):
                keys = [sessions, *(name.decode() for name in names[start : start + _CHUNK])]
                self._forget(keys=keys, args=[before_epoch])

    def _base(self, owner: str) -> str:
        return f"{self._collection}:recent:{{{escape(owner)}}}"

    def _messages(self, owner: str, run: str) -> str:
        return f"{self._base(owner)}:m:{escape(run)}"

    def _sessions(self, owner: str) -> str:
        return f"{self._base(owner)}:s"
