"""The Lua scripts of the redis backend: each is one atomic step on the keys of one user.

All keys of a user share a hash tag. A record's value is the JSON array
``[epoch, order, session, message]``; the scripts read only the epoch and the session's key suffix.

Key names, as `store` passes them:
  records   hash: record id -> value
  order     sorted set: record id by order key, all sessions
  sessions  hash: session id -> suffix of the session's own key
  fences    hash: ``*`` and ``s:<session>`` -> epoch below which nothing is stored any more
  session   sorted set: record id by order key, one session
"""

# KEYS: records, order, sessions, fences, then a session key for each session touched.
# ARGV: TTL (ms, 0 for none), most messages of a session (0 for no limit), lowest live order key,
#       prefix of session keys, number of sessions, (session id, key suffix) of each,
#       then for each record: number of its session, record id, order key, epoch, value.
# Returns a letter for each record, as one string: new, known or fenced.
ADD = """
local ttl, most, cutoff, prefix = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local count = tonumber(ARGV[5])
local fence = tonumber(redis.call('HGET', KEYS[4], '*') or '0')
local fences = {}
for i = 1, count do
  local own = tonumber(redis.call('HGET', KEYS[4], 's:' .. ARGV[4 + 2 * i]) or '0')
  fences[i] = math.max(fence, own)
end
local stored, touched = {}, {}
for at = 6 + 2 * count, #ARGV, 5 do
  local i, id, order = tonumber(ARGV[at]), ARGV[at + 1], ARGV[at + 2]
  local epoch, flag = tonumber(ARGV[at + 3]), 'f'
  local value = redis.call('HGET', KEYS[1], id)
  if epoch >= fences[i] and not value then
    -- The record last: should a command be refused, adding it again finds it missing.
    redis.call('ZADD', KEYS[2], order, id)
    redis.call('ZADD', KEYS[4 + i], order, id)
    redis.call('HSET', KEYS[1], id, ARGV[at + 4])
    touched[i] = true
    flag = 'n'
  elseif value then
    flag = 'k'
    -- Submitted once more, under the same key, after a delete that is yet to come: it stays.
    local before, rest = string.match(value, '^%[(%d+)(.*)$')
    if before and tonumber(before) < epoch then
      redis.call('HSET', KEYS[1], id, '[' .. ARGV[at + 3] .. rest)
    end
  end
  stored[#stored + 1] = flag
end
for i in pairs(touched) do
  redis.call('HSET', KEYS[3], ARGV[4 + 2 * i], ARGV[5 + 2 * i])
  if most > 0 then
    local excess = redis.call('ZCARD', KEYS[4 + i]) - most
    while excess > 0 do
      local ids = redis.call('ZRANGE', KEYS[4 + i], 0, math.min(excess, 1000) - 1)
      redis.call('HDEL', KEYS[1], unpack(ids))
      redis.call('ZREM', KEYS[2], unpack(ids))
      redis.call('ZREM', KEYS[4 + i], unpack(ids))
      excess = excess - #ids
    end
  end
end
if ttl == 0 and next(touched) then
  -- Another worker, or this one before, may have been told to let memories expire.
  for i = 1, 3 do redis.call('PERSIST', KEYS[i]) end
  for i in pairs(touched) do redis.call('PERSIST', KEYS[4 + i]) end
end
if ttl > 0 and next(touched) then
  for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], ttl) end
  for i in pairs(touched) do redis.call('PEXPIRE', KEYS[4 + i], ttl) end
  -- What has expired is invisible already; a little of it is swept out with each add.
  local ids = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', '(' .. cutoff, 'LIMIT', 0, 200)
  for _, id in ipairs(ids) do
    local value = redis.call('HGET', KEYS[1], id)
    if value then
      local session = cjson.decode(value)[3]
      local suffix = redis.call('HGET', KEYS[3], session)
      if suffix then
        redis.call('ZREM', prefix .. suffix, id)
        if redis.call('EXISTS', prefix .. suffix) == 0 then
          redis.call('HDEL', KEYS[3], session)
        end
      end
      redis.call('HDEL', KEYS[1], id)
    end
    redis.call('ZREM', KEYS[2], id)
  end
end
return table.concat(stored)
"""

# KEYS: records, order or session. ARGV: lowest live order key, offset, limit.
# Returns the record ids and their values, as two lists.
PAGE = """
local expired = 0
if ARGV[1] ~= '-inf' then expired = redis.call('ZCOUNT', KEYS[2], '-inf', '(' .. ARGV[1]) end
local first = expired + tonumber(ARGV[2])
local ids = redis.call('ZRANGE', KEYS[2], first, first + tonumber(ARGV[3]) - 1)
local values = {}
for start = 1, #ids, 1000 do
  local portion = redis.call('HMGET', KEYS[1], unpack(ids, start, math.min(start + 999, #ids)))
  for _, value in ipairs(portion) do values[#values + 1] = value end
end
return {ids, values}
"""

# KEYS: fences. ARGV: session id or "" for the whole user, epoch, lifetime of the fences (ms).
FENCE = """
local field = '*'
if ARGV[1] ~= '' then field = 's:' .. ARGV[1] end
local epoch = tonumber(ARGV[2])
if epoch > tonumber(redis.call('HGET', KEYS[1], field) or '0') then
  redis.call('HSET', KEYS[1], field, epoch)
end
if field == '*' then
  local all = redis.call('HGETALL', KEYS[1])
  for i = 1, #all, 2 do
    if all[i] ~= '*' and tonumber(all[i + 1]) <= epoch then
      redis.call('HDEL', KEYS[1], all[i])
    end
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""

# KEYS: records, order, sessions, session. ARGV: session id, epoch, offset, limit.
# Looks at `limit` records of a session from `offset` on and removes those below the epoch.
# Returns how many it looked at and how many it removed.
DELETE = """
local first = tonumber(ARGV[3])
local ids = redis.call('ZRANGE', KEYS[4], first, first + tonumber(ARGV[4]) - 1)
local gone = {}
if #ids > 0 then
  local values = redis.call('HMGET', KEYS[1], unpack(ids))
  for i, value in ipairs(values) do
    local epoch = value and tonumber(string.match(value, '^%[(%d+),'))
    if not epoch or epoch < tonumber(ARGV[2]) then gone[#gone + 1] = ids[i] end
  end
end
if #gone > 0 then
  redis.call('HDEL', KEYS[1], unpack(gone))
  redis.call('ZREM', KEYS[2], unpack(gone))
  redis.call('ZREM', KEYS[4], unpack(gone))
end
if redis.call('EXISTS', KEYS[4]) == 0 then redis.call('HDEL', KEYS[3], ARGV[1]) end
return {#ids, #gone}
"""
