"""The Lua scripts of the redis backend: each is one atomic step on the keys of a user, or of each
of several users.

All keys of a user share a hash tag. A record's value is the JSON array
``[epoch, order, session, message]``; the scripts read only the epoch and the session's key suffix.

Key names, as `store` passes them:
  records   hash: record id -> value
  order     sorted set: record id by order key, all sessions
  sessions  hash: session id -> suffix of the session's own key
  fences    hash: ``*`` and ``s:<session>`` -> epoch below which nothing is stored any more
  session   sorted set: record id by order key, one session

And what searches go by (see `index`):
  index     hash: ``v`` version, ``w`` version that is being made, ``g`` generation, which every
            delete and every change of the segments raises, ``n`` the newest record, ``c`` messages
            in segments, ``d`` those of them that are gone, ``s<name>`` -> a segment's description,
            ``p<name>``: one that is being written, ``t`` how long (ms) all this was to live last
  entries   hash: record id -> entry, of those that are in no segment; empty until somebody searches
  gone      hash: record id -> session id, of those that were removed since segments were cleaned
  segment   hash: see `recallq_worker.search.segments`; the prefix and the segment's name
"""

DROP_INDEX = """
local function drop_index()
  for _, field in ipairs(redis.call('HKEYS', index)) do
    local name = string.match(field, '^[sp](.+)$')
    if name then redis.call('UNLINK', segments .. name) end
  end
  redis.call('UNLINK', index, entries, gone)
end

local function newest()
  return redis.call('ZRANGE', order, -1, -1)[1] or ''
end

local function next_generation()
  local now = redis.call('TIME')
  local before = tonumber(redis.call('HGET', index, 'g') or '0')
  local generation = math.max(before + 1, tonumber(now[1]) * 1000000 + tonumber(now[2]))
  redis.call('HSET', index, 'g', string.format('%.0f', generation))
end
"""

_FORGET = (
    DROP_INDEX
    + """
-- Whether the index is of this version, and nobody who knows none has changed the records since.
local function fits()
  local known = redis.call('HMGET', index, 'v', 'n')
  return known[1] == version and known[2] == newest()
end

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

# KEYS: of each user: records, order, sessions, fences, index, entries, gone, then a session key for
#       each session touched.
# ARGV: TTL (ms, 0 for none), most messages of a session (0 for no limit), lowest live order key,
#       version of the index, then of each user: prefix of session keys, prefix of segments, number
#       of sessions, number of records, (session id, key suffix) of each session, then for each
#       record: number of its session, record id, order key, epoch, value.
# Returns of each user a letter for each record, as one string: new, known or fenced; then entries,
# gone and all messages of segments, and whether the index is of this version.
# What it asks of Redis is what an add costs, so it asks for nothing twice.
ADD = (
    """
local order, index, entries, gone, segments
local ttl, most, cutoff, version = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
"""
    + _FORGET
    + """
local told = {}
local key, at = 0, 4

local function add_all_of_a_user()
  local records, sessions = KEYS[key + 1], KEYS[key + 3]
  order, index, entries, gone = KEYS[key + 2], KEYS[key + 5], KEYS[key + 6], KEYS[key + 7]
  local prefix, count, adds = ARGV[at + 1], tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
  segments = ARGV[at + 2]
  local names, places = at + 4, key + 7
  at, key = at + 4 + 2 * count, key + 7 + count

  local fences = {}
  for first = 1, count, 1000 do
    local fields = {'*'}
    for i = first, math.min(first + 999, count) do
      fields[#fields + 1] = 's:' .. ARGV[names - 1 + 2 * i]
    end
    local found = redis.call('HMGET', KEYS[places - 3], unpack(fields))
    local fence = tonumber(found[1] or '0')
    for i = 2, #found do
      fences[#fences + 1] = found[i] and math.max(fence, tonumber(found[i])) or fence
    end
  end

  local newest_id, newest_place = unpack(redis.call('ZRANGE', order, -1, -1, 'WITHSCORES'))
  local known = redis.call('HMGET', index, 'v', 'n', 'c', 't')
  local of_use, indexed = known[1] == version and known[2] == newest_id, known[3]
  local removed = 0
  if not newest_id then
    drop_index()
    redis.call('HSET', index, 'v', version)
    next_generation()  -- what was known of an earlier life does not hold for this one
    of_use, indexed, newest_place = true, false, -math.huge
  else
    newest_place = tonumber(newest_place)
    removed = redis.call('HLEN', gone)
    if not of_use then redis.call('HDEL', index, 'v') end
  end

  local stored, touched, moved = {}, {}, false
  for n = 1, adds do
    local i, id, place = tonumber(ARGV[at + 1]), ARGV[at + 2], ARGV[at + 3]
    local epoch, flag = tonumber(ARGV[at + 4]), 'f'
    local live, value = epoch >= fences[i], false
    if not live or redis.call('ZADD', order, 'NX', place, id) == 0 then
      value = redis.call('HGET', records, id)
    end
    if not value and live then
      -- The record last: should a command be refused, adding it again finds it missing.
      redis.call('ZADD', KEYS[places + i], place, id)
      if removed > 0 and redis.call('HEXISTS', gone, id) == 1 then
        -- It was there before, with another text perhaps, and segments may still know that.
        redis.call('HDEL', index, 'v', 'w', 'g')
        of_use = false
      end
      redis.call('HSET', entries, id, '')
      redis.call('HSET', records, id, ARGV[at + 5])
      touched[i] = true
      if tonumber(place) == newest_place then
        moved = true  -- the later of equals is the one with the higher id, byte by byte
      elseif tonumber(place) > newest_place then
        newest_id, newest_place = id, tonumber(place)
      end
      flag = 'n'
    elseif value then
      flag = 'k'
      local before, since, rest = string.match(value, '^%[(%d+),(-?%d+)(,.*)$')
      -- Submitted once more, under the same key, after a delete that is yet to come: it stays.
      local later = before and tonumber(before) < epoch
      -- Or before it, and overtaken since by what was submitted after it: its place is the first.
      local moves = before and live and tonumber(place) < tonumber(since)
      if later or moves then
        redis.call('HSET', records, id, '[' .. (later and ARGV[at + 4] or before) .. ','
                                            .. (moves and place or since) .. rest)
      end
      if moves then
        redis.call('ZADD', order, place, id)
        redis.call('ZADD', KEYS[places + i], place, id)
        redis.call('HDEL', index, 'w')  -- who makes one may have passed that place
        if redis.call('HEXISTS', entries, id) == 1 then
          redis.call('HSET', entries, id, '')
          next_generation()
        else
          redis.call('HDEL', index, 'v', 'g')
          of_use = false
        end
        moved = true
      end
    end
    stored[n] = flag
    at = at + 5
  end

  for i in pairs(touched) do
    redis.call('HSETNX', sessions, ARGV[names - 1 + 2 * i], ARGV[names + 2 * i])
    if most > 0 then
      local excess = redis.call('ZCARD', KEYS[places + i]) - most
      while excess > 0 do
        local ids = redis.call('ZRANGE', KEYS[places + i], 0, math.min(excess, 1000) - 1)
        redis.call('HDEL', records, unpack(ids))
        redis.call('ZREM', order, unpack(ids))
        redis.call('ZREM', KEYS[places + i], unpack(ids))
        forget(ARGV[names - 1 + 2 * i], ids)
        excess = excess - #ids
        moved = true
      end
    end
  end
  if ttl > 0 and next(touched) then
    -- What has expired is invisible already; a little of it is swept out with each add.
    local ids = redis.call('ZRANGEBYSCORE', order, '-inf', '(' .. cutoff, 'LIMIT', 0, 200)
    for _, id in ipairs(ids) do
      local value = redis.call('HGET', records, id)
      local session = ''
      if value then
        session = session_of(value)
        local suffix = redis.call('HGET', sessions, session)
        if suffix then
          redis.call('ZREM', prefix .. suffix, id)
          if redis.call('EXISTS', prefix .. suffix) == 0 then
            redis.call('HDEL', sessions, session)
          end
        end
        redis.call('HDEL', records, id)
      end
      redis.call('ZREM', order, id)
      forget(session, {id})
      moved = true
    end
  end
  if moved then
    newest_id, removed = newest(), redis.call('HLEN', gone)
  end
  if of_use and (moved or next(touched)) then redis.call('HSET', index, 'n', newest_id) end
  if next(touched) then
    local all = {}
    if ttl > 0 or redis.call('PTTL', order) >= 0 then
      for _, each in ipairs({records, order, sessions, index, entries, gone}) do
        all[#all + 1] = each
      end
      if ttl > 0 and known[4] == ARGV[1] then
        for i in pairs(touched) do all[#all + 1] = KEYS[places + i] end
      else
        -- Another worker, or this one before, was told of another time, or of none: the sets of the
        -- other sessions live as long as what is in them, too.
        for _, suffix in ipairs(redis.call('HVALS', sessions)) do
          all[#all + 1] = prefix .. suffix
        end
        if ttl == 0 then redis.call('HDEL', index, 't')
        elseif redis.call('EXISTS', index) == 1 then redis.call('HSET', index, 't', ARGV[1]) end
      end
      for _, field in ipairs(redis.call('HKEYS', index)) do
        local name = string.match(field, '^s(.+)$')
        if name then all[#all + 1] = segments .. name end
      end
    end
    for _, each in ipairs(all) do
      if ttl > 0 then redis.call('PEXPIRE', each, ttl) else redis.call('PERSIST', each) end
    end
  end
  if not next(touched) and not newest_id then drop_index() end
  told[#told + 1] = {table.concat(stored), redis.call('HLEN', entries), removed,
                     tonumber(indexed or '0'), of_use and 1 or 0}
end

while key < #KEYS do add_all_of_a_user() end
return told
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
local order, index, entries, gone = KEYS[2], KEYS[5], KEYS[6], KEYS[7]
local segments, version = ARGV[5], ARGV[6]
"""
    + _FORGET
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
  local of_use = fits()
  redis.call('HDEL', KEYS[1], unpack(old))
  redis.call('ZREM', order, unpack(old))
  redis.call('ZREM', KEYS[4], unpack(old))
  if of_use then
    for session, them in pairs(of_session) do forget(session, them) end
  end
  if of_use and redis.call('EXISTS', order) == 1 then
    -- Whoever has read what is removed now shall not put it into the index any more.
    next_generation()
    redis.call('HSET', index, 'n', newest())
  else
    drop_index()
  end
end
if redis.call('EXISTS', KEYS[4]) == 0 then redis.call('HDEL', KEYS[3], ARGV[1]) end
return {#ids, #old}
"""
)
