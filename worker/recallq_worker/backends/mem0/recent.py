"""The last messages of each session, which mem0 puts into its next prompt.

mem0 keeps them in a SQLite file, or in each process's memory: then workers know different ones, and
a deleted user's words live on in prompts. Here they are in Redis, in one hash per user, fenced by
deletions like everything else, and gone a month after the user was last heard. mem0's log of
changes to each memory, which is in the same place there, is not kept: nothing here reads it.
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

_MOST = 10
"""What mem0 keeps."""
_LONGEST = 4000
"""Characters of a message that are enough to know what it was about."""
_LIVES_MS = 30 * 24 * 3600 * 1000

# KEYS: the user's hash. ARGV: run, epoch, its messages, lifetime (ms).
# Fields: "r:<run>" messages, "e:<run>" their lowest epoch, "f:<run>" and "*" fences.
_SAVE = """
local fences = redis.call('HMGET', KEYS[1], '*', 'f:' .. ARGV[1])
local fence = math.max(tonumber(fences[1] or '0'), tonumber(fences[2] or '0'))
if tonumber(ARGV[2]) < fence then return 0 end
redis.call('HSET', KEYS[1], 'r:' .. ARGV[1], ARGV[3], 'e:' .. ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""

# KEYS: the user's hash. ARGV: run or "" for all, epoch, lifetime (ms).
_FORGET = """
local field = ARGV[1] == '' and '*' or 'f:' .. ARGV[1]
if tonumber(ARGV[2]) > tonumber(redis.call('HGET', KEYS[1], field) or '0') then
  redis.call('HSET', KEYS[1], field, ARGV[2])
end
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
  local run = string.match(name, '^e:(.*)$')
  if run and (ARGV[1] == '' or run == ARGV[1])
     and tonumber(redis.call('HGET', KEYS[1], name)) < tonumber(ARGV[2]) then
    redis.call('HDEL', KEYS[1], name, 'r:' .. run)
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""


class RecentMessages:
    """In place of mem0's ``SQLiteManager``; what mem0 writes goes into the open draft."""

    def __init__(self, url: str, collection: str, *, connect_timeout: float) -> None:
        self._url = url
        self._collection = collection
        self._redis = connect_threads(url, connect_timeout=connect_timeout)
        self._save = self._redis.register_script(_SAVE)
        self._forget = self._redis.register_script(_FORGET)

    # --- what mem0 calls ------------------------------------------------------------------------

    def get_last_messages(self, session_scope: str, limit: int = _MOST) -> list[dict[str, Any]]:
        draft = current()
        if draft is None:
            return []
        with asking(self._url):
            stored: Any = self._redis.hget(self._key(draft.owner), f"r:{draft.run}")
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
        with asking(self._url):
            stored, lowest = self._redis.hmget(self._key(owner), [f"r:{run}", f"e:{run}"])
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
            args: list[str | int | bytes] = [run, epoch, orjson.dumps(messages[-_MOST:]), _LIVES_MS]
            self._save(keys=[self._key(owner)], args=args)

    def forget(self, owner: str, run: str | None, before_epoch: int) -> None:
        """Removes what is older than a deletion, and lets nothing older come."""
        with asking(self._url):
            self._forget(keys=[self._key(owner)], args=[run or "", before_epoch, _LIVES_MS])

    def _key(self, owner: str) -> str:
        return f"{self._collection}:recent:{{{escape(owner)}}}"
