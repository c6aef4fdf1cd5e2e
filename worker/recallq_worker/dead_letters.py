"""The worker's side of dead letters: writing them, and letting a deletion take them along.

What a letter is, `recallq.dead_letters` says. A deletion first raises a fence, below which no
letter is written any more, and then removes those that are there: in whatever order a failing add
and a delete run, no letter from before the delete is left.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

from recallq.contract import Lane, Scope
from recallq.dead_letters import EPOCH, LETTER, SESSION, DeadLetter
from recallq.keys import Keys
from recallq.redis_client import RedisClient

_SCAN = 1000

# KEYS: letter, dead, the user's dead letters, the user's epochs.
# ARGV: id, time of death, letter, epoch, session ("" for the whole user).
_KEEP = """
local fence = tonumber(redis.call('HGET', KEYS[4], '*') or '0')
if ARGV[5] ~= '' then
  fence = math.max(fence, tonumber(redis.call('HGET', KEYS[4], 's:' .. ARGV[5]) or '0'))
end
if tonumber(ARGV[4]) < fence then return 0 end
redis.call('HSET', KEYS[1], 'letter', ARGV[3], 'e', ARGV[4], 's', ARGV[5])
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
return 1
"""

# KEYS: dead, the user's dead letters, the user's epochs.
# ARGV: session ("" for the whole user), epoch, prefix of letters, cursor, letters a step.
# Returns the next cursor.
_TAKE_ALONG = """
local whole, epoch = ARGV[1] == '', tonumber(ARGV[2])
if ARGV[4] == '0' then
  local field = whole and '*' or 's:' .. ARGV[1]
  if epoch > tonumber(redis.call('HGET', KEYS[3], field) or '0') then
    redis.call('HSET', KEYS[3], field, epoch)
  end
  if whole then
    local all = redis.call('HGETALL', KEYS[3])
    for i = 1, #all, 2 do
      if string.sub(all[i], 1, 2) == 's:' and tonumber(all[i + 1]) <= epoch then
        redis.call('HDEL', KEYS[3], all[i])
      end
    end
  end
end
local found = redis.call('SSCAN', KEYS[2], ARGV[4], 'COUNT', ARGV[5])
for _, id in ipairs(found[2]) do
  local old, session = unpack(redis.call('HMGET', ARGV[3] .. id, 'e', 's'))
  if not old or (tonumber(old) < epoch and (whole or session == ARGV[1])) then
    redis.call('DEL', ARGV[3] .. id)
    redis.call('ZREM', KEYS[1], id)
    redis.call('SREM', KEYS[2], id)
  end
end
return found[1]
"""


class DeadLetters:
    """Writes the dead letters of one namespace. Errors are redis-py's."""

    def __init__(self, redis: RedisClient, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._keep = redis.register_script(_KEEP)
        self._take_along = redis.register_script(_TAKE_ALONG)

    async def keep(self, letter: DeadLetter) -> bool:
        """Keeps a job's letter; False if its scope has been deleted since it was submitted."""
        scope = letter.scope
        assert scope is not None
        keys = [
            self._keys.dead_letter(letter.id),
            self._keys.dead,
            self._keys.dead_letters_of(scope.tenant, scope.user_id),
            self._keys.epochs(scope.tenant, scope.user_id),
        ]
        args: list[str | int | float] = [
            letter.id,
            letter.died_at.timestamp(),
            letter.model_dump_json(),
            letter.epochs[0] if letter.epochs else 0,
            scope.session_id or "",
        ]
        return bool(await self._keep(keys=keys, args=args))

    async def keep_message(
        self,
        payload: str,
        error: str,
        *,
        at: float,
        batch_id: str | None = None,
        lane: Lane | None = None,
        epochs: Sequence[int] = (),
        unsigned: bool = False,
    ) -> None:
        """Keeps what came on a queue and could not be read. Whose it was, nobody can tell.

        `batch_id` is that of a batch in the ledger: delivered again, it is kept once.
        """
        letter = DeadLetter(
            id=batch_id or uuid.uuid4().hex,
            kind="message",
            lane=lane,
            payload=payload,
            unsigned=unsigned,
            epochs=list(epochs),
            code="undecodable",
            error=error,
            died_at=datetime.fromtimestamp(at, UTC),
        )
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(
                self._keys.dead_letter(letter.id),
                mapping={LETTER: letter.model_dump_json(), EPOCH: 0, SESSION: ""},
            )
            pipe.zadd(self._keys.dead, {letter.id: at})
            await pipe.execute()

    async def withdraw(self, letter_id: str, scope: Scope) -> None:
        """Removes the letter of a job, if there is one."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._keys.dead_letter(letter_id))
            pipe.zrem(self._keys.dead, letter_id)
            pipe.srem(self._keys.dead_letters_of(scope.tenant, scope.user_id), letter_id)
            await pipe.execute()

    async def forget(self, scope: Scope, before_epoch: int) -> None:
        """Removes the letters of a scope that are older than a deletion, and lets none come."""
        keys = [
            self._keys.dead,
            self._keys.dead_letters_of(scope.tenant, scope.user_id),
            self._keys.epochs(scope.tenant, scope.user_id),
        ]
        prefix = self._keys.dead_letter("")
        cursor = 0
        while True:
            args: list[str | int] = [scope.session_id or "", before_epoch, prefix, cursor, _SCAN]
            cursor = int(await self._take_along(keys=keys, args=args))
            if cursor == 0:
                return
