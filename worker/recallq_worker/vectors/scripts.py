"""The Lua scripts of `RedisVectors`: each is one atomic step on the keys of one owner.

All keys of an owner share a hash tag. A row's value is three lines: ``epoch order suffix``, then
its group and its payload, both JSON (whose line breaks are escaped). The scripts read only the
first line; the suffix is how the group is written in key names, and holds no white space.

Key names, as `store` passes them:
  rows     hash: row id -> value
  vectors  hash: row id -> the vector, little-endian float32
  order    sorted set: row id by order key, all groups
  changes  sorted set: row id by the version that last wrote it
  version  string: goes up with every write, and is gone with the last row
  group    sorted set: row id by order key, one group; the prefix and the group's suffix
  banned   set: ids that are not stored, whoever comes with them
  fence    string: epoch below which nothing is stored any more, of the owner or of one group

A version is the time in microseconds, or one more than the version before where that is higher.
So it never comes back: not after all rows were deleted, and not after a server lost its last
second. What a process remembers of a version is therefore right, or known to be old.
"""

_NEXT_VERSION = """
local function next_version()
  local now = redis.call('TIME')
  local before = tonumber(redis.call('GET', version_key) or '0')
  return math.max(before + 1, tonumber(now[1]) * 1000000 + tonumber(now[2]))
end
"""

_LEAVE = """
-- Takes rows out of everything but the sorted set that they were found in. `values` may hold
-- false for a row that is gone, or that another hand has damaged.
local function leave(prefix, ids, values)
  local groups = {}
  for i, id in ipairs(ids) do
    local suffix = values[i] and string.match(values[i], '^%d+ %-?%d+ (%S*)\\n')
    if suffix then
      groups[suffix] = groups[suffix] or {}
      table.insert(groups[suffix], id)
    end
  end
  for suffix, members in pairs(groups) do
    redis.call('ZREM', prefix .. suffix, unpack(members))
  end
  redis.call('HDEL', rows_key, unpack(ids))
  redis.call('HDEL', vectors_key, unpack(ids))
  redis.call('ZREM', order_key, unpack(ids))
  redis.call('ZREM', changes_key, unpack(ids))
  if redis.call('EXISTS', order_key) == 0 then
    redis.call('DEL', version_key)
  else
    redis.call('SET', version_key, next_version(), 'KEEPTTL')
  end
end
"""

# KEYS: rows, vectors, order, changes, version, the owner's fence, then for each group touched its
#       sorted set and its fence.
# ARGV: prefix of group keys, TTL (ms, 0 for none), number of groups, the suffix of each, then for
#       each row: number of its group, row id, order key, epoch, group and payload as two lines,
#       vector.
# A row that exists is overwritten, and keeps the later of both epochs: a delete between them spares
# it. Doing it again changes nothing.
# Returns a letter for each row, as one string: new, known or fenced.
UPSERT = (
    """
local version_key = KEYS[5]
"""
    + _NEXT_VERSION
    + """
local prefix, ttl, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local fence = tonumber(redis.call('GET', KEYS[6]) or '0')
local fences = {}
for i = 1, count do
  fences[i] = math.max(fence, tonumber(redis.call('GET', KEYS[6 + 2 * i]) or '0'))
end
local stored, version = {}, nil
for at = 4 + count, #ARGV, 6 do
  local i, id, order, epoch = tonumber(ARGV[at]), ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local flag = 'f'
  if tonumber(epoch) >= fences[i] and redis.call('SISMEMBER', KEYS[#KEYS], id) == 0 then
    if not version then
      -- Each row has a version of its own, so that changes can be read in portions. The last of
      -- them first: should a command be refused, nothing has changed behind a version's back.
      version = next_version()
      redis.call('SET', version_key, version + (#ARGV - at + 1) / 6 - 1, 'KEEPTTL')
    end
    local suffix = ARGV[3 + i]
    local known = redis.call('HGET', KEYS[1], id)
    flag = 'n'
    if known then
      flag = 'k'
      local earlier, place = string.match(known, '^(%d+) %-?%d+ (%S*)\\n')
      if earlier and tonumber(earlier) > tonumber(epoch) then epoch = earlier end
      if place and place ~= suffix then redis.call('ZREM', prefix .. place, id) end
    end
    redis.call('ZADD', KEYS[3], order, id)
    redis.call('ZADD', KEYS[5 + 2 * i], order, id)
    redis.call('ZADD', KEYS[4], version, id)
    redis.call('HSET', KEYS[2], id, ARGV[at + 5])
    local head = epoch .. ' ' .. order .. ' ' .. suffix .. '\\n'
    redis.call('HSET', KEYS[1], id, head .. ARGV[at + 4])
    version = version + 1
  end
  stored[#stored + 1] = flag
end
if version and ttl > 0 then
  for i = 1, 5 do redis.call('PEXPIRE', KEYS[i], ttl) end
  for i = 1, count do redis.call('PEXPIRE', KEYS[5 + 2 * i], ttl) end
elseif version and redis.call('PTTL', KEYS[3]) >= 0 then
  -- They were to expire, and shall no more.
  for i = 1, 5 do redis.call('PERSIST', KEYS[i]) end
  for _, value in ipairs(redis.call('HVALS', KEYS[1])) do
    local suffix = string.match(value, '^%d+ %-?%d+ (%S*)\\n')
    if suffix then redis.call('PERSIST', prefix .. suffix) end
  end
end
return table.concat(stored)
"""
)

# KEYS: rows, vectors, changes, version. ARGV: row id, payload or "", vector or "".
# Neither may really be empty: a payload is a JSON object. Returns whether there is such a row.
UPDATE = (
    """
local version_key = KEYS[4]
"""
    + _NEXT_VERSION
    + """
local id, payload, vector = ARGV[1], ARGV[2], ARGV[3]
local value = redis.call('HGET', KEYS[1], id)
if not value then return 0 end
local version = next_version()
redis.call('SET', version_key, version, 'KEEPTTL')
redis.call('ZADD', KEYS[3], version, id)
if vector ~= '' then redis.call('HSET', KEYS[2], id, vector) end
if payload ~= '' then
  local head = string.match(value, '^[^\\n]*\\n[^\\n]*\\n')
  if head then redis.call('HSET', KEYS[1], id, head .. payload) end
end
return 1
"""
)

_KEYS_OF_A_REMOVAL = """
local rows_key, vectors_key, order_key, changes_key, version_key = unpack(KEYS, 1, 5)
"""

# KEYS: rows, vectors, order, changes, version. ARGV: prefix of group keys, number of rows, their
#       ids, then, unless they all go, of each the highest epoch with which it does.
# Returns how many there were.
REMOVE = (
    _KEYS_OF_A_REMOVAL
    + _NEXT_VERSION
    + _LEAVE
    + """
local count, found = tonumber(ARGV[2]), {}
local ids = {unpack(ARGV, 3, 2 + count)}
local values, there = redis.call('HMGET', KEYS[1], unpack(ids)), {}
for i, value in ipairs(values) do
  local most = tonumber(ARGV[2 + count + i] or math.huge)
  if value and tonumber(string.match(value, '^%d+') or '0') <= most then
    found[#found + 1] = ids[i]
    there[#there + 1] = value
  end
end
if #found > 0 then leave(ARGV[1], found, there) end
return #found
"""
)

# KEYS: rows, vectors, order, changes, version, then order or a group. ARGV: prefix of group keys,
#       epoch, offset, limit.
# Looks at `limit` rows from `offset` on and removes those below the epoch.
# Returns how many it looked at and how many it removed.
DELETE = (
    _KEYS_OF_A_REMOVAL
    + _NEXT_VERSION
    + _LEAVE
    + """
local first = tonumber(ARGV[3])
local ids = redis.call('ZRANGE', KEYS[6], first, first + tonumber(ARGV[4]) - 1)
local gone, values = {}, {}
if #ids > 0 then
  for i, value in ipairs(redis.call('HMGET', KEYS[1], unpack(ids))) do
    local epoch = value and tonumber(string.match(value, '^%d+'))
    if not epoch or epoch < tonumber(ARGV[2]) then
      gone[#gone + 1] = ids[i]
      values[#values + 1] = value
    end
  end
end
if #gone > 0 then
  redis.call('ZREM', KEYS[6], unpack(gone))
  leave(ARGV[1], gone, values)
end
return {#ids, #gone}
"""
)

# KEYS: fence. ARGV: epoch, lifetime (ms).
FENCE = """
if tonumber(ARGV[1]) > tonumber(redis.call('GET', KEYS[1]) or '0') then
  redis.call('SET', KEYS[1], ARGV[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# KEYS: rows, order or a group. ARGV: first, last. Returns row ids and values, as two lists.
PAGE = """
local ids = redis.call('ZRANGE', KEYS[2], ARGV[1], ARGV[2])
if #ids == 0 then return {ids, ids} end
return {ids, redis.call('HMGET', KEYS[1], unpack(ids))}
"""

# KEYS: version, changes, rows, rows or vectors. ARGV: version that is known, limit.
# Returns the version, and where it is another: number of rows, the version that the portion ends
# with, then of each row written since: id, first line, and what the last key holds.
CHANGES = """
local version = tonumber(redis.call('GET', KEYS[1]) or '0')
if version == tonumber(ARGV[1]) then return {version} end
local found = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. ARGV[1], '+inf',
                         'WITHSCORES', 'LIMIT', 0, ARGV[2])
local ids, heads, last = {}, {}, ARGV[1]
for i = 1, #found, 2 do
  ids[#ids + 1] = found[i]
  last = found[i + 1]
end
if #ids == 0 then return {version, redis.call('ZCARD', KEYS[2]), last, {}, {}, {}} end
for i, value in ipairs(redis.call('HMGET', KEYS[3], unpack(ids))) do
  heads[i] = value and string.match(value, '^[^\\n]*') or false
end
local values = redis.call('HMGET', KEYS[4], unpack(ids))
return {version, redis.call('ZCARD', KEYS[2]), last, ids, heads, values}
"""

# KEYS: changes. ARGV: version, limit. Returns the ids of a portion of all rows, and the version it
# ends with. A row that is written meanwhile moves behind the reader, never before it.
IDS = """
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. ARGV[1], '+inf',
                         'WITHSCORES', 'LIMIT', 0, ARGV[2])
local ids, last = {}, ARGV[1]
for i = 1, #found, 2 do
  ids[#ids + 1] = found[i]
  last = found[i + 1]
end
return {ids, last}
"""

# KEYS: what the collection's vectors are. ARGV: dimensions, model.
# Returns what somebody said first, and whether that is new (1/0).
CLAIM = """
local new = redis.call('EXISTS', KEYS[1]) == 0
if new then redis.call('HSET', KEYS[1], 'dimensions', ARGV[1], 'model', ARGV[2]) end
local dimensions, model = unpack(redis.call('HMGET', KEYS[1], 'dimensions', 'model'))
return {dimensions, model, new and 1 or 0}
"""
