"""The Lua scripts of the redis backend: each is one atomic step on the keys of one user.

All keys of a user share a hash tag. A record's value is the JSON array
``[epoch, order, session, message]``; the scripts read only the epoch and the session's key suffix.

Key names, as `store` passes them:
  records   hash: record id -> value
  order     sorted set: record id by order key, all sessions
  sessions  hash: session id -> suffix of the session's own key
  fences    hash: ``*`` and ``s:<session>`` -> epoch below which nothing is stored any more
  session   sorted set: record id by order key, one session

And what searches go by (see `index`):
  index     hash: ``v`` version, ``g`` generation, which every change of the segments raises, ``c``
            messages in segments, ``d`` those of them that are gone, ``s<name>`` -> count, bits and
            last order key of a segment
  entries   hash: record id -> entry, of those that are in no segment
  gone      hash: record id -> session id, of those that were removed since segments were cleaned
  segment   hash: see `recallq_worker.search.segments`; the prefix and the segment's name
"""

_DROP = """
local function drop_index()
  for _, field in ipairs(redis.call('HKEYS', index)) do
    local name = string.match(field, '^s(.+)$')
    if name then redis.call('UNLINK', segments .. name) end
  end
  redis.call('UNLINK', index, entries, gone)
end

"""

_INDEX = (
    _DROP
    + """
local function session_of(value)
  local whole, parts = pcall(cjson.decode, value)
  return whole and type(parts) == 'table' and type(parts[3]) == 'string' and parts[3] or ''
end

-- Records of a session have been removed.
local function forget(session, ids)
  if redis.call('EXISTS', order) == 0 then return drop_index() end
  for _, id in ipairs(ids) do
    redis.call('HSET', gone, id, session)
    if redis.call('HDEL', entries, id) == 0 then redis.call('HINCRBY', index, 'd', 1) end
  end
end
"""
)

# KEYS: records, order, sessions, fences, index, entries, gone, then a session key for each session
#       touched.
# ARGV: TTL (ms, 0 for none), most messages of a session (0 for no limit), lowest live order key,
#       prefix of session keys, prefix of segments, version of the index, number of sessions,
#       (session id, key suffix) of each, then for each record: number of its session, record id,
#       order key, epoch, value, entry.
# Returns a letter for each record, as one string: new, known or fenced; then entries, gone and all
# messages of segments, and whether the index is of this version.
ADD = (
    """
local order, index, entries, gone = KEYS[2], KEYS[5], KEYS[6], KEYS[7]
local ttl, most, cutoff, prefix = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local segments, version, count = ARGV[5], ARGV[6], tonumber(ARGV[7])
"""
    + _INDEX
    + """
local fence = tonumber(redis.call('HGET', KEYS[4], '*') or '0')
local fences = {}
for i = 1, count do
  local own = tonumber(redis.call('HGET', KEYS[4], 's:' .. ARGV[6 + 2 * i]) or '0')
  fences[i] = math.max(fence, own)
end
local fits = redis.call('HGET', index, 'v') == version
if not fits and redis.call('EXISTS', order) == 0 then
  drop_index()
  redis.call('HSET', index, 'v', version)
  fits = true
end
local stored, touched = {}, {}
for at = 8 + 2 * count, #ARGV, 6 do
  local i, id, place = tonumber(ARGV[at]), ARGV[at + 1], ARGV[at + 2]
  local epoch, flag = tonumber(ARGV[at + 3]), 'f'
  local value = redis.call('HGET', KEYS[1], id)
  if epoch >= fences[i] and not value then
    -- The record last: should a command be refused, adding it again finds it missing.
    redis.call('ZADD', order, place, id)
    redis.call('ZADD', KEYS[7 + i], place, id)
    redis.call('HSET', entries, id, ARGV[at + 5])
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
  redis.call('HSET', KEYS[3], ARGV[6 + 2 * i], ARGV[7 + 2 * i])
  if most > 0 then
    local excess = redis.call('ZCARD', KEYS[7 + i]) - most
    while excess > 0 do
      local ids = redis.call('ZRANGE', KEYS[7 + i], 0, math.min(excess, 1000) - 1)
      redis.call('HDEL', KEYS[1], unpack(ids))
      redis.call('ZREM', order, unpack(ids))
      redis.call('ZREM', KEYS[7 + i], unpack(ids))
      forget(ARGV[6 + 2 * i], ids)
      excess = excess - #ids
    end
  end
end
if next(touched) then
  local all = {KEYS[1], KEYS[2], KEYS[3], index, entries, gone}
  for i in pairs(touched) do all[#all + 1] = KEYS[7 + i] end
  -- Another worker, or this one before, may have been told to let memories expire.
  if ttl > 0 or redis.call('PTTL', index) >= 0 then
    for _, field in ipairs(redis.call('HKEYS', index)) do
      local name = string.match(field, '^s(.+)$')
      if name then all[#all + 1] = segments .. name end
    end
  end
  for _, key in ipairs(all) do
    if ttl > 0 then redis.call('PEXPIRE', key, ttl) else redis.call('PERSIST', key) end
  end
end
if ttl > 0 and next(touched) then
  -- What has expired is invisible already; a little of it is swept out with each add.
  local ids = redis.call('ZRANGEBYSCORE', order, '-inf', '(' .. cutoff, 'LIMIT', 0, 200)
  for _, id in ipairs(ids) do
    local value = redis.call('HGET', KEYS[1], id)
    local session = ''
    if value then
      session = session_of(value)
      local suffix = redis.call('HGET', KEYS[3], session)
      if suffix then
        redis.call('ZREM', prefix .. suffix, id)
        if redis.call('EXISTS', prefix .. suffix) == 0 then
          redis.call('HDEL', KEYS[3], session)
        end
      end
      redis.call('HDEL', KEYS[1], id)
    end
    redis.call('ZREM', order, id)
    forget(session, {id})
  end
end
local counts = redis.call('HMGET', index, 'd', 'c')
return {table.concat(stored), redis.call('HLEN', entries), tonumber(counts[1] or '0'),
        tonumber(counts[2] or '0'), fits and 1 or 0}
"""
)

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

# KEYS: records, order, sessions, session, index, entries, gone.
# ARGV: session id, epoch, offset, limit, prefix of segments, version of the index.
# Looks at `limit` records of a session from `offset` on and removes those below the epoch.
# Returns how many it looked at and how many it removed.
DELETE = (
    """
local order, index, entries, gone, segments = KEYS[2], KEYS[5], KEYS[6], KEYS[7], ARGV[5]
"""
    + _INDEX
    + """
local first = tonumber(ARGV[3])
local ids = redis.call('ZRANGE', KEYS[4], first, first + tonumber(ARGV[4]) - 1)
local old, of_session = {}, {}
if #ids > 0 then
  local values = redis.call('HMGET', KEYS[1], unpack(ids))
  for i, value in ipairs(values) do
    local epoch = value and tonumber(string.match(value, '^%[(%d+),'))
    if not epoch or epoch < tonumber(ARGV[2]) then
      old[#old + 1] = ids[i]
      -- What is in no session's set is in one of the index all the same.
      local session = ARGV[1]
      if session == '' and value then session = session_of(value) end
      of_session[session] = of_session[session] or {}
      table.insert(of_session[session], ids[i])
    end
  end
end
if #old > 0 then
  redis.call('HDEL', KEYS[1], unpack(old))
  redis.call('ZREM', order, unpack(old))
  redis.call('ZREM', KEYS[4], unpack(old))
  -- One of another version is of no use to anybody, and knows what is to be forgotten.
  if redis.call('HGET', index, 'v') ~= ARGV[6] then drop_index() end
  for session, them in pairs(of_session) do forget(session, them) end
end
if redis.call('EXISTS', KEYS[4]) == 0 then redis.call('HDEL', KEYS[3], ARGV[1]) end
return {#ids, #old}
"""
)

# --- the index ----------------------------------------------------------------------------------

# KEYS: index, entries, order. ARGV: prefix of segments, version, then terms (unsigned 32 bits).
# Returns nothing if there is no message; 0 if the index is of another version, or does not have
# just the messages that there are; else their number, the entries, and of each segment: name,
# description, sessions, and the buckets of the terms, by their names.
LOOK_UP = """
local messages = redis.call('ZCARD', KEYS[3])
if messages == 0 then return false end
local index = redis.call('HGETALL', KEYS[1])
local found, segments = {}, {}
for i = 1, #index, 2 do
  local name = string.match(index[i], '^s(.+)$')
  if name then
    segments[#segments + 1] = {name, index[i + 1]}
  else
    found[index[i]] = index[i + 1]
  end
end
local entries = redis.call('HGETALL', KEYS[2])
local known = tonumber(found.c or '0') - tonumber(found.d or '0') + #entries / 2
if found.v ~= ARGV[2] or known ~= messages then return 0 end
for _, segment in ipairs(segments) do
  local key = ARGV[1] .. segment[1]
  local divisor = 2 ^ (32 - tonumber(string.match(segment[2], '^%d+ (%d+)')))
  local names, seen = {'s'}, {}
  for at = 3, #ARGV do
    local bucket = string.format('b%d', math.floor(tonumber(ARGV[at]) / divisor))
    if not seen[bucket] then
      seen[bucket] = true
      names[#names + 1] = bucket
    end
  end
  local values = redis.call('HMGET', key, unpack(names))
  segment[3] = values[1]
  local buckets = {}
  for i = 2, #names do
    if values[i] then
      buckets[#buckets + 1] = names[i]
      buckets[#buckets + 1] = values[i]
    end
  end
  segment[4] = buckets
end
return {messages, entries, segments}
"""

# KEYS: records. ARGV: prefix of segments, whether values are wanted (1/0), number of record ids,
#       these, then for each of others: name of a segment, block, place in it.
# Returns the ids and values of all of them; nothing if a segment is not there any more.
READ = """
local ids, blocks = {}, {}
local count = tonumber(ARGV[3])
for at = 4, 3 + count do ids[#ids + 1] = ARGV[at] end
for at = 4 + count, #ARGV, 3 do
  local name = ARGV[at] .. ' ' .. ARGV[at + 1]
  if not blocks[name] then
    local block = redis.call('HGET', ARGV[1] .. ARGV[at], 'd' .. ARGV[at + 1])
    if not block then return false end
    blocks[name] = cjson.decode(block)
  end
  ids[#ids + 1] = blocks[name][tonumber(ARGV[at + 2]) + 1]
end
local values = {}
if ARGV[2] == '0' then return {ids, values} end
for start = 1, #ids, 1000 do
  local portion = redis.call('HMGET', KEYS[1], unpack(ids, start, math.min(start + 999, #ids)))
  for _, value in ipairs(portion) do values[#values + 1] = value end
end
return {ids, values}
"""

# KEYS: index, entries, gone, order. ARGV: prefix of segments, version.
# What whoever changes the segments goes by. Returns nothing if there are no records; else whether
# the index is of this version, the generation, names and descriptions of the segments, entries,
# gone.
STATE = (
    """
local index, entries, gone, segments = KEYS[1], KEYS[2], KEYS[3], ARGV[1]
"""
    + _DROP
    + """
if redis.call('EXISTS', KEYS[4]) == 0 then
  drop_index()
  return false
end
local now = redis.call('TIME')
redis.call('HSETNX', index, 'g', now[1] .. string.format('%06d', now[2]))
local found, names = {}, {}
local fields = redis.call('HGETALL', index)
for i = 1, #fields, 2 do
  local name = string.match(fields[i], '^s(.+)$')
  if name then
    names[#names + 1] = name
    names[#names + 1] = fields[i + 1]
  else
    found[fields[i]] = fields[i + 1]
  end
end
return {found.v == ARGV[2] and 1 or 0, found.g, names, redis.call('HGETALL', entries),
        redis.call('HGETALL', gone)}
"""
)

# KEYS: index, entries, gone, order.
# ARGV: prefix of segments, version, generation, TTL (ms, 0 for none), whether these segments are
#       all (1/0), messages that were taken out of segments, number of new segments, name and
#       description of each, number and names of those that they replace, number and ids of the
#       entries that are in them, ids that are gone from segments.
# Puts new segments, which are written, in the place of others. Returns 1, or 0 if others did so.
COMMIT = """
local index, entries, gone, order, segments = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]
local all = ARGV[5] == '1'
if redis.call('HGET', index, 'g') ~= ARGV[3] then return 0 end
if not all and redis.call('HGET', index, 'v') ~= ARGV[2] then return 0 end
local at = 8
local function list(count, size)
  local found = {}
  for i = 1, count * size do found[i] = ARGV[at + i - 1] end
  at = at + count * size
  return found
end
local made = list(tonumber(ARGV[7]), 2)
at = at + 1
local replaced = list(tonumber(ARGV[at - 1]), 1)
at = at + 1
local absorbed = list(tonumber(ARGV[at - 1]), 1)
local cleaned = list(#ARGV - at + 1, 1)
for i = 1, #made, 2 do
  if redis.call('EXISTS', segments .. made[i]) == 0 then return 0 end
end
if all then
  replaced = {}
  for _, field in ipairs(redis.call('HKEYS', index)) do
    local name = string.match(field, '^s(.+)$')
    if name then replaced[#replaced + 1] = name end
  end
end
local count = 0
if not all then
  count = tonumber(redis.call('HGET', index, 'c') or '0')
  for _, name in ipairs(replaced) do
    local before = redis.call('HGET', index, 's' .. name)
    if not before then return 0 end
    count = count - tonumber(string.match(before, '^%d+'))
  end
end
for i = 2, #made, 2 do count = count + tonumber(string.match(made[i], '^%d+')) end
local entered = redis.call('HLEN', entries)
for _, id in ipairs(absorbed) do entered = entered - redis.call('HEXISTS', entries, id) end
-- Those that were removed meanwhile are in a new segment.
local removed
if all then
  removed = count + entered - redis.call('ZCARD', order)
  if removed < 0 then return 0 end
else
  removed = tonumber(redis.call('HGET', index, 'd') or '0') - tonumber(ARGV[6])
end
for _, id in ipairs(absorbed) do
  if redis.call('HDEL', entries, id) == 0 and not all then removed = removed + 1 end
end
for _, id in ipairs(cleaned) do redis.call('HDEL', gone, id) end
for _, name in ipairs(replaced) do
  redis.call('HDEL', index, 's' .. name)
  redis.call('UNLINK', segments .. name)
end
local ttl = tonumber(ARGV[4])
for i = 1, #made, 2 do
  redis.call('HSET', index, 's' .. made[i], made[i + 1])
  local key = segments .. made[i]
  if ttl > 0 then redis.call('PEXPIRE', key, ttl) else redis.call('PERSIST', key) end
end
local now = redis.call('TIME')
local generation = math.max(tonumber(now[1]) * 1000000 + tonumber(now[2]), tonumber(ARGV[3]) + 1)
redis.call('HSET', index, 'v', ARGV[2], 'g', string.format('%.0f', generation), 'c', count,
           'd', removed)
if ttl > 0 then redis.call('PEXPIRE', index, ttl) else redis.call('PERSIST', index) end
return 1
"""

# KEYS: index, entries, gone. ARGV: prefix of segments, version, whether also one of this version is
#       of no use (1/0).
# Prepares for an index to be made anew: what nobody can use is dropped.
RENEW = (
    """
local index, entries, gone, segments = KEYS[1], KEYS[2], KEYS[3], ARGV[1]
"""
    + _DROP
    + """
if ARGV[3] == '1' or redis.call('HGET', index, 'v') ~= ARGV[2] then drop_index() end
"""
)

# KEYS: lock. ARGV: token.
UNLOCK = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
