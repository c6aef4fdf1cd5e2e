"""The Lua scripts of the slow lane: each is one step that no crash falls into.

The keys are described in `recallq_worker.slow_ledger`, which calls them.
"""

from __future__ import annotations

from recallq_worker.ledger import REQUEUE

# ARGV 1-4: push here (1/0), prefixes of queued sets, queues and batches; 5-9: prefixes of waiting,
# pending, turns, epochs (where deletions leave their fences) and done. KEYS: delayed, held, what
# the worker takes from (slow, or indexing), tokens, prefix of adds that are coming, slow, indexing,
# prefix of deletes that are coming.
# `pushed` is what could not be pushed here.
_PRELUDE = (
    REQUEUE
    + """
local here, queued, queues, batches = unpack(ARGV, 1, 4)
local waiting, pending, turns, epochs, done = unpack(ARGV, 5, 9)
local coming, deleting = KEYS[5], KEYS[8]
local delayed, held, slow = KEYS[1], KEYS[2], KEYS[3]
local pushed = {}
local WAIT_FOR_DELETE = 10000
local WAIT_FOR_ADD = 15000
local FENCED = '{"result":{"record_ids":[],"added":0}}'

-- kind, epoch, batch, index, session
local function header(item)
  return string.match(item, '^(%a)|(%d+)|([^|]*)|(%d+)|([^|\\n]*)\\n')
end

local function answer(id, index, outcome)
  local batch = batches .. id
  if redis.call('EXISTS', batch) == 0 then return end
  redis.call('HSET', batch, 'u' .. index, outcome)
  redis.call('HDEL', batch, 'g' .. index)
  if redis.call('HGET', batch, 's') == 'queued' and redis.call('ZREM', delayed, id) == 1 then
    pushed[#pushed + 1] = requeue(batch, id, here, queued, queues)
  end
end

local function is_marked(id, field, index)
  local marks = redis.call('HGET', batches .. id, field) or ''
  return string.find(',' .. marks, ',' .. index .. ',', 1, true)
end

local function drop(tag, job)
  redis.call('HDEL', pending .. tag, job, job .. '+')
  redis.call('ZREM', waiting .. tag, job)
end

-- Something is written of the user that workers of older versions need not be able to read.
local function write_as(turn, before, version)
  if tonumber(version) > tonumber(before or '1') then redis.call('HSET', turn, 'v', version) end
end

-- It is not on its way any more.
local function come(tag, job, session)
  redis.call('ZREM', coming .. tag, job)
  redis.call('ZREM', deleting .. tag, job .. '|' .. session)
end

local function fence_of(tag, session)
  local whole = tonumber(redis.call('HGET', epochs .. tag, '*') or '0')
  return math.max(whole, tonumber(redis.call('HGET', epochs .. tag, 's:' .. session) or '0'))
end

-- What came of the same add before, unless a deletion has come since. And the epoch of one that was
-- submitted between the two and has not come yet: it may be about to remove what came of it.
local function known(tag, session, again, own_epoch)
  local before = again ~= '' and redis.call('GET', done .. tag .. ':' .. again)
  if not before then return nil end
  local epoch, outcome = string.match(before, '^(%d+) (.*)$')
  if tonumber(epoch) < fence_of(tag, session) then return nil end
  local on_their_way = redis.call(
    'ZRANGEBYSCORE', deleting .. tag, '(' .. epoch, own_epoch, 'WITHSCORES')
  for at = #on_their_way - 1, 1, -2 do
    local id, whose = string.match(on_their_way[at], '^(.-)%-%d+|(.*)$')
    if not id or redis.call('EXISTS', batches .. id) == 0 then
      redis.call('ZREM', deleting .. tag, on_their_way[at])  -- it was settled without coming here
    elseif whose == '' or whose == session then
      return outcome, tonumber(on_their_way[at + 1])
    end
  end
  return outcome
end

-- Says that a worker was here; returns for how long (ms) nobody was.
local function heard()
  local last = redis.call('GET', KEYS[4] .. ':heard')
  redis.call('SET', KEYS[4] .. ':heard', string.format('%d', now))
  return now - tonumber(last or now)
end

local function mine(tag, token)
  local last, worker = unpack(redis.call('HMGET', turns .. tag, 't', 'w'))
  return last == token and worker
end

-- No add of the user is extracted any more. While something of them may be stored, they still count
-- as running: one that could be cancelled would be cancelled, and remembered.
local function pause(tag)
  local running, storing = unpack(redis.call('HMGET', turns .. tag, 'r', 'j'))
  for job in string.gmatch(not storing and running or '', '[^,]+') do
    local item = redis.call('HGET', pending .. tag, job)
    local kind, _, id, index = header(item or '')
    if kind == 'a' then redis.call('HDEL', batches .. id, 'g' .. index) end
  end
  redis.call('HDEL', turns .. tag, 'r', 'x')
end

-- Nor does anybody work for them.
local function rest(tag)
  pause(tag)
  redis.call('HDEL', turns .. tag, 'w')
end
"""
)

# ARGV 10-16: batch id, worker id, time (ms) after which the batch is looked after again; of jobs
# that are to be tried again: time (ms) until then, line of history, open jobs, all "" for none; the
# version of the protocol in which it is written. Of each job then: index, job id, tag, kind, score,
# epoch, session ("" for all), pause (ms), what is the same when it is submitted again, item, which
# may be left out if it was handed over before.
# Kinds: a, an add to extract; d, a delete; i, an add to index, which is stored. A delete need not
# let an extraction come to its end that has not begun to store anything. What it concerns is
# refused as its turn comes. Of a delete and of a stored add a part is done by now, so they count as
# running.
# Returns 1, or 0 if the batch is not ours, or 2 if items are needed after all.
PARK = (
    _PRELUDE
    + """
local id = ARGV[10]
local batch = batches .. id
local owner, state = unpack(redis.call('HMGET', batch, 'w', 's'))
if owner ~= ARGV[11] or state ~= 'running' then return {0, pushed} end
for at = 17, #ARGV, 10 do
  local index, job, tag = unpack(ARGV, at, at + 2)
  if ARGV[at + 9] == '' and redis.call('HEXISTS', batch, 'u' .. index) == 0
     and redis.call('HEXISTS', pending .. tag, job) == 0 then
    return {2, pushed}
  end
end
local answered = false
for at = 17, #ARGV, 10 do
  local index, job, tag, kind, score, epoch, session, wait, again, item = unpack(ARGV, at, at + 9)
  local outcome
  come(tag, job, session)
  if redis.call('HEXISTS', batch, 'u' .. index) == 1 then
    answered = true
  elseif redis.call('HEXISTS', pending .. tag, job) == 0 then
    if kind == 'a' then
      if tonumber(epoch) < fence_of(tag, session) then outcome = FENCED end
      local before, unsettled = known(tag, session, again, epoch)
      if not unsettled then outcome = outcome or before end
    end
    if outcome then
      redis.call('HSET', batch, 'u' .. index, outcome)
      answered = true
    else
      local turn = turns .. tag
      local leased, retry, storing, busy, version, late = unpack(
        redis.call('HMGET', turn, 'w', 'b', 'j', 'x', 'v', 'l'))
      write_as(turn, version, ARGV[16])
      if kind == 'd' and leased and not storing and not busy then
        rest(tag)
        redis.call('HSET', turn, 'd', 0)
        leased = nil
      end
      local slow = kind == 'i' and KEYS[7] or KEYS[6]
      redis.call('HSET', pending .. tag, job, item)
      redis.call('ZADD', waiting .. tag, score, job)
      if kind ~= 'a' then redis.call('HSET', batch, 'g' .. index, 1) end
      if kind == 'a' and leased and tonumber(score) < tonumber(late or math.huge) then
        redis.call('HSET', turn, 'l', score)
      end
      if kind == 'd' then
        if not leased then redis.call('ZADD', slow, now, tag) end
      elseif not leased and (kind == 'i' or not retry or tonumber(retry) <= now) then
        local due = redis.call('ZSCORE', slow, tag)
        local at_last = now + tonumber(wait)
        if not due or tonumber(due) > at_last then redis.call('ZADD', slow, at_last, tag) end
      end
    end
  end
end
redis.call('HSET', batch, 's', 'queued', 'd', 0, 'y', 1)
redis.call('HDEL', batch, 'w', 'o')
redis.call('ZREM', held, id)
local look_again = ARGV[12]
if ARGV[13] ~= '' then
  look_again = ARGV[13]
  local history = redis.call('HGET', batch, 'h') or ''
  redis.call('HSET', batch, 'h', history .. ARGV[14], 'o', ARGV[15])
  redis.call('HINCRBY', batch, 'a', 1)
end
if answered then
  pushed[#pushed + 1] = requeue(batch, id, here, queued, queues)
else
  redis.call('ZADD', delayed, now + tonumber(look_again), id)
end
return {1, pushed}
"""
)

# ARGV 10-17: worker id, lease (ms), most users, most jobs and bytes of each, bytes of all together
# after which nobody else is taken up, turns begun from which on jobs are worked on one by one, the
# version of the protocol that the worker speaks. A user of whom something is written in a newer one
# is left to newer workers, and looked at again after a while.
# Returns the time (ms) until the next user is due, the newest version of those who were left or 0,
# and of each of the others: tag, token, turns begun, epoch of
# the last deletion that was submitted, time (ms) that adds have yet to wait for another attempt,
# journal, jobs as id, item, earlier attempts.
TAKE = (
    _PRELUDE
    + """
local AGAIN = 2000
local MOST_LEFT = 1000
local SILENCE, SPARED = 3000, 4000
local room, limit, spoken = tonumber(ARGV[12]), tonumber(ARGV[15]), tonumber(ARGV[17])
local taken, total, left, newest = {}, 0, 0, 0

-- Each changes when the user is due, so nobody is met twice.
local function leave(tag, version)
  redis.call('ZADD', slow, now + AGAIN, tag)
  left, newest = left + 1, math.max(newest, version)
end

-- If nobody was heard for a while, it is Redis that was away: no lease has run out before those who
-- live could renew theirs.
local spare = KEYS[4] .. ':spare'
if heard() > SILENCE then
  redis.call('SET', spare, string.format('%d', now + SPARED), 'PX', SPARED)
end
local spared = tonumber(redis.call('GET', spare) or '0')

local function take(tag, turn, version)
  rest(tag)
  local jobs, bytes = {}, 0
  for _, job in ipairs(redis.call('ZRANGE', waiting .. tag, 0, ARGV[13] - 1)) do
    local item, tried = unpack(redis.call('HMGET', pending .. tag, job, job .. '+'))
    if not item then
      redis.call('ZREM', waiting .. tag, job)
    elseif bytes <= tonumber(ARGV[14]) then
      jobs[#jobs + 1] = {job, item, tried or ''}
      bytes = bytes + #item
    end
  end
  total = total + bytes
  if #jobs == 0 then
    redis.call('ZREM', slow, tag)
    redis.call('DEL', turn)
  else
    local token = redis.call('INCR', KEYS[4])
    redis.call('HSET', turn, 't', token, 'w', ARGV[10])
    redis.call('HDEL', turn, 'l')
    write_as(turn, version, ARGV[17])
    local wait = math.max(0, tonumber(redis.call('HGET', turn, 'b') or '0') - now)
    if wait == 0 then redis.call('HDEL', turn, 'b') end
    redis.call('ZADD', slow, now + tonumber(ARGV[11]), tag)
    local begun = redis.call('HINCRBY', turn, 'd', 1)
    for _, field in ipairs(redis.call('HKEYS', turn)) do
      -- Somebody has died of a single job: they go on one by one.
      if string.sub(field, 1, 1) == 'k' then begun = math.max(begun, tonumber(ARGV[16])) end
    end
    local deletion = redis.call('HGET', epochs .. tag, 'n') or '0'
    local journal = redis.call('HGET', turn, 'j') or ''
    taken[#taken + 1] = {tag, tostring(token), begun, deletion, wait, journal, jobs}
  end
end

repeat
  local due = redis.call('ZRANGEBYSCORE', slow, '-inf', now, 'LIMIT', 0, room - #taken)
  local left_before = left
  for _, tag in ipairs(due) do
    if total > limit then break end
    local version, leased = unpack(redis.call('HMGET', turns .. tag, 'v', 'w'))
    if tonumber(version or '1') > spoken then leave(tag, tonumber(version))
    elseif leased and spared > now then
      redis.call('ZADD', slow, spared, tag)
      left = left + 1
    else take(tag, turns .. tag, version) end
  end
until left == left_before or left > MOST_LEFT or #taken == room or total > limit
local next = redis.call('ZRANGE', slow, 0, 0, 'WITHSCORES')
return {next[2] and math.max(0, next[2] - now) or -1, newest, taken}
"""
)

# ARGV 10-13: tag, token, run alone (1/0), not to be disturbed (1/0); of each job then: id, session,
# what is the same when it is submitted again.
# Returns of each job: what to do with it, and what came of it before or how often it died alone.
# 0 if the turn is over; 1 if a delete has come that goes first.
BEGIN = (
    _PRELUDE
    + """
local MOST_LOOKED_AT = 1000

-- The first adds that were submitted, and will be here as soon as a worker has taken them from
-- their queue: `any`, whom everybody waits for who comes later in the order, and by lane those whom
-- only others of the lane wait for; the place of each, and its batch if it is not new.
-- Of the lane, because what is here has overtaken them, so they cannot be far. Another lane may be
-- behind by hours: who is queued there is waited for only while they are new. Of those who are not,
-- nobody is waited for whose batch is settled, or who did not come while they were waited for.
local function first_coming(tag, turn)
  local first, batch = {}, {}
  local new = (now - WAIT_FOR_ADD) * 1000
  local awaited, since = string.match(redis.call('HGET', turn, 'o') or '', '^(%S+) (%d+)$')
  local old = redis.call(
    'ZRANGEBYSCORE', coming .. tag, '-inf', '(' .. new, 'WITHSCORES', 'LIMIT', 0, MOST_LOOKED_AT)
  for at = 1, #old, 2 do
    local id = string.match(old[at], '^(.*)%-')
    batch[id] = batch[id] or redis.call('HMGET', batches .. id, 's', 'l')
    local state, lane = unpack(batch[id])
    local given_up = id == awaited and state == 'queued' and now - since > WAIT_FOR_ADD
    if not state or given_up then
      redis.call('ZREM', coming .. tag, old[at])
    else
      local who = state == 'running' and 'any' or lane
      first[who] = first[who] or {tonumber(old[at + 1]), id}
    end
  end
  local next = redis.call(
    'ZRANGEBYSCORE', coming .. tag, new, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
  first.any = first.any or (next and {tonumber(next), ''})
  return first, awaited
end

local tag, token, said, running = ARGV[10], ARGV[11], {}, {}
local turn = turns .. tag
if not mine(tag, token) then return 0 end
if ARGV[13] == '0' then
  local first = redis.call('ZRANGE', waiting .. tag, 0, 0)[1]
  local kind = first and header(redis.call('HGET', pending .. tag, first) or '')
  if kind == 'd' then return 1 end
end
pause(tag)
local first, awaited = first_coming(tag, turn)
local late = tonumber(redis.call('HGET', turn, 'l') or math.huge)
local waits_for = nil

-- Whether an add is not the next of its user, because of one that is on its way, or has come since
-- the turn began.
local function comes_later(order, lane)
  if order > late then return true end
  for _, who in ipairs({'any', lane}) do
    if first[who] and order > first[who][1] then
      waits_for = waits_for or first[who][2]
      return true
    end
  end
  return false
end

for at = 14, #ARGV, 3 do
  local job, session, again = unpack(ARGV, at, at + 2)
  local item = redis.call('HGET', pending .. tag, job)
  local order = tonumber(redis.call('ZSCORE', waiting .. tag, job) or '0')
  local kind, epoch, id, index = header(item or '')
  local jobs, lane = unpack(redis.call('HMGET', batches .. (id or ''), 'n', 'l'))
  local before, unsettled
  if item then before, unsettled = known(tag, session, again, epoch) end
  if not item or not jobs then
    drop(tag, job)
    said[#said + 1] = {'gone', ''}
  elseif kind == 'a' and is_marked(id, 'c', index) then
    said[#said + 1] = {'cancelled', ''}
  elseif kind == 'a' and is_marked(id, 'p', index) then
    said[#said + 1] = {'stopped', ''}
  elseif kind == 'a' and tonumber(epoch) < fence_of(tag, session) then
    said[#said + 1] = {'known', FENCED}
  elseif unsettled and now - unsettled < WAIT_FOR_DELETE then
    said[#said + 1] = {'wait', ''}
  elseif before and not unsettled then
    said[#said + 1] = {'known', before}
  elseif kind == 'a' and comes_later(order, lane) then
    said[#said + 1] = {'wait', ''}
  else
    local deaths = 0
    if ARGV[12] == '1' then
      -- Once in a turn, however often this is repeated.
      local times, by = string.match(redis.call('HGET', turn, 'k' .. job) or '', '^(%d+):(.*)$')
      deaths = tonumber(times or '0')
      if by == token then deaths = deaths - 1
      else redis.call('HSET', turn, 'k' .. job, (deaths + 1) .. ':' .. token) end
    end
    redis.call('HSET', batches .. id, 'g' .. index, 1)
    running[#running + 1] = job
    said[#said + 1] = {'go', tostring(deaths)}
  end
end
redis.call('HSET', turn, 'r', table.concat(running, ','))
if waits_for and waits_for ~= '' and waits_for ~= awaited then
  redis.call('HSET', turn, 'o', waits_for .. ' ' .. now)
end
if ARGV[13] == '1' then redis.call('HSET', turn, 'x', 1) end
return said
"""
)

# ARGV 10-12: tag, token, journal.
JOURNAL = (
    _PRELUDE
    + """
if not mine(ARGV[10], ARGV[11]) then return 0 end
redis.call('HSET', turns .. ARGV[10], 'j', ARGV[11] .. ' ' .. ARGV[12])
return 1
"""
)

# ARGV 10-16: tag, token, which of the turn's answers this is, token of the journal that was looked
# into or "", what became of it, seconds to remember, whether nothing in the journal is open any
# more (1/0); of each job then: id, outcome, what is the same when it is submitted again, epoch,
# what comes of it then.
# Returns 1 if that is written, now or when it was asked before; else 0 and what another turn has
# made of our journal, as far as it is known.
FINISH = (
    _PRELUDE
    + """
local tag, token = ARGV[10], ARGV[11]
local turn = turns .. tag
local memo = turn .. ':f' .. token
if tonumber(redis.call('GET', memo) or '0') >= tonumber(ARGV[12]) then return {1, '', pushed} end
if not mine(tag, token) then return {0, redis.call('GET', turn .. ':v' .. token) or '', pushed} end
redis.call('SET', memo, ARGV[12], 'EX', 600)
for at = 17, #ARGV, 5 do
  local job, outcome, again, epoch, repeated = unpack(ARGV, at, at + 4)
  local item = redis.call('HGET', pending .. tag, job)
  if item then
    local _, _, id, index = header(item)
    answer(id, index, outcome)
    drop(tag, job)
    if again ~= '' then
      redis.call('SET', done .. tag .. ':' .. again, epoch .. ' ' .. repeated, 'EX', ARGV[15])
    end
  end
  redis.call('HDEL', turn, 'k' .. job)
end
if ARGV[16] == '1' then redis.call('HDEL', turn, 'j') end
pause(tag)
redis.call('HSET', turn, 'd', 0)
if ARGV[13] ~= '' then redis.call('SET', turn .. ':v' .. ARGV[13], ARGV[14], 'EX', 3600) end
return {1, '', pushed}
"""
)

# ARGV 10-12: tag, token, delay (ms); of each job then: id, its attempts.
POSTPONE = (
    _PRELUDE
    + """
local tag = ARGV[10]
if not mine(tag, ARGV[11]) then return 0 end
rest(tag)
redis.call('DEL', turns .. tag .. ':f' .. ARGV[11])
local due = now + tonumber(ARGV[12])
redis.call('HSET', turns .. tag, 'd', 0, 'b', due)
redis.call('ZADD', slow, due, tag)
for at = 13, #ARGV, 2 do
  if redis.call('HEXISTS', pending .. tag, ARGV[at]) == 1 then
    redis.call('HSET', pending .. tag, ARGV[at] .. '+', ARGV[at + 1])
    redis.call('HDEL', turns .. tag, 'k' .. ARGV[at])
  end
end
return 1
"""
)

# ARGV 10-12: tag, token, pause (ms) for others to join what is left.
RELEASE = (
    _PRELUDE
    + """
local tag, turn = ARGV[10], turns .. ARGV[10]
if not mine(tag, ARGV[11]) then return end
for job in string.gmatch(redis.call('HGET', turn, 'r') or '', '[^,]+') do
  local times, by = string.match(redis.call('HGET', turn, 'k' .. job) or '', '^(%d+):(.*)$')
  if by == ARGV[11] then redis.call('HSET', turn, 'k' .. job, (times - 1) .. ':') end
end
rest(tag)
redis.call('DEL', turn .. ':f' .. ARGV[11])
redis.call('HSET', turn, 'd', 0)
local next = redis.call('ZRANGE', waiting .. tag, 0, 0)[1]
if next then
  local kind = header(redis.call('HGET', pending .. tag, next) or '')
  local retry = tonumber(redis.call('HGET', turn, 'b') or '0')
  local due = kind == 'a' and math.max(retry, now + tonumber(ARGV[12])) or now
  redis.call('ZADD', slow, due, tag)
else
  redis.call('ZREM', slow, tag)
  redis.call('DEL', turn)
end
"""
)

# ARGV 10: lease (ms); of each user then: tag, token.
# Returns of each the jobs worked on that are asked to stop; "-" if somebody else's turn it is.
RENEW = (
    _PRELUDE
    + """
heard()
local told = {}
for at = 11, #ARGV, 2 do
  local tag, token = ARGV[at], ARGV[at + 1]
  if not mine(tag, token) then
    told[#told + 1] = '-'
  else
    redis.call('ZADD', slow, now + tonumber(ARGV[10]), tag)
    local stop = {}
    for job in string.gmatch(redis.call('HGET', turns .. tag, 'r') or '', '[^,]+') do
      local item = redis.call('HGET', pending .. tag, job)
      local kind, _, id, index = header(item or '')
      if not item or (kind == 'a' and is_marked(id, 'p', index)) then
        stop[#stop + 1] = job
      end
    end
    told[#told + 1] = table.concat(stop, ',')
  end
end
return told
"""
)

# ARGV 10-12: tag, job id, session ("" for all). It does not come to the slow lane after all.
REFUSED = (
    _PRELUDE
    + """
come(ARGV[10], ARGV[11], ARGV[12])
"""
)
