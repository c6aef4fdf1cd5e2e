"""The Lua scripts that search and keep the index of the redis backend; the keys are described in
`recallq_worker.backends.redis.scripts`.
"""

from __future__ import annotations

from recallq_worker.backends.redis.scripts import DROP_INDEX

# KEYS: index, entries, gone, order, records.
# ARGV: prefix of segments, version, mark of the entries that are known already, then terms
#       (unsigned 32 bits).
# Returns nothing if there is neither message nor index; 0 if the index is of another version, or
# does not have just the messages that there are; else their number, the generation, the mark of the
# entries, these unless they are known - the value of the record where there is none yet -, and of
# each segment: name, description, sessions, and the buckets of the terms, by their names.
# Between two deletes or changes of segments, entries come, and go only into what is gone: if both
# are as many as they were, they are the same.
LOOK_UP = """
local messages = redis.call('ZCARD', KEYS[4])
local index = redis.call('HGETALL', KEYS[1])
if messages == 0 then return #index > 0 and 0 end
local found, segments = {}, {}
for i = 1, #index, 2 do
  local name = string.match(index[i], '^s(.+)$')
  if name then
    segments[#segments + 1] = {name, index[i + 1]}
  else
    found[index[i]] = index[i + 1]
  end
end
local entered = redis.call('HLEN', KEYS[2])
local known = tonumber(found.c or '0') - tonumber(found.d or '0') + entered
local newest = redis.call('ZRANGE', KEYS[4], -1, -1)[1]
if found.v ~= ARGV[2] or found.n ~= newest or known ~= messages then return 0 end
local mark = table.concat({found.g or '', entered, redis.call('HLEN', KEYS[3]), newest}, ' ')
local entries = false
if mark ~= ARGV[3] then
  entries = redis.call('HGETALL', KEYS[2])
  for i = 1, #entries, 2 do
    if entries[i + 1] == '' then
      entries[i + 1] = redis.call('HGET', KEYS[5], entries[i]) or ''
    end
  end
end
for _, segment in ipairs(segments) do
  local key = ARGV[1] .. segment[1]
  local divisor = 2 ^ (32 - tonumber(string.match(segment[2], '^%d+ (%d+)')))
  local names, seen = {'s'}, {}
  for at = 4, #ARGV do
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
return {messages, found.g or '', mark, entries, segments}
"""

# KEYS: index, entries. ARGV: generation, then ids and entries of records.
# Keeps what was made of records, for others; nothing if any were deleted since they were read.
FILL = """
if redis.call('HGET', KEYS[1], 'g') ~= ARGV[1] then return end
for at = 2, #ARGV, 2 do
  if redis.call('HGET', KEYS[2], ARGV[at]) == '' then
    redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1])
  end
end
"""

# KEYS: records. ARGV: prefix of segments, whether values are wanted (1/0), number of record ids,
#       these, then for each of others: name of a segment, block, place in it.
# Returns the ids and values of all of them; nothing if a segment is not there any more, 0 if it is
# damaged.
READ = """
local ids, blocks = {}, {}
local count = tonumber(ARGV[3])
for at = 4, 3 + count do ids[#ids + 1] = ARGV[at] end
for at = 4 + count, #ARGV, 3 do
  local name = ARGV[at] .. ' ' .. ARGV[at + 1]
  if not blocks[name] then
    local block = redis.call('HGET', ARGV[1] .. ARGV[at], 'd' .. ARGV[at + 1])
    if not block then return false end
    local whole, found = pcall(cjson.decode, block)
    if not whole then return 0 end
    blocks[name] = found
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
local index, entries, gone, order, segments = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]
"""
    + DROP_INDEX
    + """
if redis.call('EXISTS', order) == 0 then
  drop_index()
  return false
end
if redis.call('HEXISTS', index, 'g') == 0 then next_generation() end
local left = redis.call('PTTL', order)
if left > 0 then redis.call('PEXPIRE', index, left) end
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
local fits = found.v == ARGV[2] and found.n == newest()
return {fits and 1 or 0, found.g, names, redis.call('HGETALL', entries),
        redis.call('HGETALL', gone)}
"""
)

# KEYS: index, entries, gone, order.
# ARGV: prefix of segments, version, generation, whether these segments are all (1/0), messages that
#       were taken out of segments, number of new segments, name and description of each, number and
#       names of those that they replace, number and ids of the entries that are in them, ids that
#       are gone from segments.
# Puts new segments, which are written, in the place of others. Returns 1, or 0 if others did so.
COMMIT = (
    """
local index, entries, gone, order, segments = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]
"""
    + DROP_INDEX
    + """
local all = ARGV[4] == '1'
local known = redis.call('HMGET', index, 'g', 'v', 'c', 'd', 'n')
if known[1] ~= ARGV[3] then return 0 end
if not all and (known[2] ~= ARGV[2] or known[5] ~= newest()) then return 0 end
local at = 7
local function list(count, size)
  local found = {}
  for i = 1, count * size do found[i] = ARGV[at + i - 1] end
  at = at + count * size
  return found
end
local made = list(tonumber(ARGV[6]), 2)
at = at + 1
local replaced = list(tonumber(ARGV[at - 1]), 1)
at = at + 1
local absorbed = list(tonumber(ARGV[at - 1]), 1)
local cleaned = list(#ARGV - at + 1, 1)
local own = {}
for i = 1, #made, 2 do
  if redis.call('EXISTS', segments .. made[i]) == 0 then return 0 end
  own[made[i]] = true
end
local count = 0
if all then
  replaced = {}
  for _, field in ipairs(redis.call('HKEYS', index)) do
    local name = string.match(field, '^s(.+)$')
    if name then replaced[#replaced + 1] = name end
  end
else
  count = tonumber(known[3] or '0')
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
  removed = tonumber(known[4] or '0') - tonumber(ARGV[5])
end
for _, id in ipairs(absorbed) do
  if redis.call('HDEL', entries, id) == 0 and not all then removed = removed + 1 end
end
if #cleaned > 0 and #cleaned == redis.call('HLEN', gone) then
  redis.call('UNLINK', gone)
else
  for _, id in ipairs(cleaned) do redis.call('HDEL', gone, id) end
end
for _, name in ipairs(replaced) do
  redis.call('HDEL', index, 's' .. name)
  redis.call('UNLINK', segments .. name)
end
-- What others are writing can have no place any more, and may hold what is gone by now.
for _, field in ipairs(redis.call('HKEYS', index)) do
  local name = string.match(field, '^p(.+)$')
  if name then
    redis.call('HDEL', index, field)
    if not own[name] then redis.call('UNLINK', segments .. name) end
  end
end
local left = redis.call('PTTL', order)
for i = 1, #made, 2 do
  redis.call('HSET', index, 's' .. made[i], made[i + 1])
  local key = segments .. made[i]
  if left > 0 then redis.call('PEXPIRE', key, left) else redis.call('PERSIST', key) end
end
next_generation()
redis.call('HSET', index, 'v', ARGV[2], 'n', newest(), 'c', count, 'd', removed)
redis.call('HDEL', index, 'w')
if left > 0 then redis.call('PEXPIRE', index, left) else redis.call('PERSIST', index) end
return 1
"""
)

# KEYS: index, segment. ARGV: generation, name, lifetime (ms), fields and values.
# Writes a part of a segment that is to be put in place. Returns 0 if the index has changed: then it
# never will be, and what it holds may have been deleted.
WRITE = """
if redis.call('HGET', KEYS[1], 'g') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'p' .. ARGV[2], 1)
for at = 4, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1]) end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""

# KEYS: index, entries, gone, order. ARGV: prefix of segments, version, whether also one of this
#       version is of no use (1/0).
# Prepares for an index to be made anew: what nobody can use is dropped. What others are making
# already is of use.
RENEW = (
    """
local index, entries, gone, order, segments = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]
"""
    + DROP_INDEX
    + """
local known = redis.call('HMGET', index, 'v', 'w', 'n')
local of_use = known[1] == ARGV[2] and known[3] == newest()
if ARGV[3] == '1' or not (of_use or known[2] == ARGV[2]) then drop_index() end
if not of_use then redis.call('HSET', index, 'w', ARGV[2]) end
local left = redis.call('PTTL', order)
if left > 0 then redis.call('PEXPIRE', index, left) end
"""
)

# KEYS: index. ARGV: prefix of segments, names.
# Removes segments that were written and not put in place; who asks may not know that they were.
ABANDON = """
for at = 2, #ARGV do
  if redis.call('HDEL', KEYS[1], 'p' .. ARGV[at]) == 1 then
    redis.call('UNLINK', ARGV[1] .. ARGV[at])
  end
end
"""

# KEYS: lock. ARGV: token, lifetime (ms).
PROLONG = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
"""

# KEYS: lock. ARGV: token.
UNLOCK = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
