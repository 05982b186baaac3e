"""Scripts by which Redis changes a tenant's journals in one step.

KEYS: the head, a hash; the index and the sizes as in session_script; the tail, a string. In the head:

- `execution`: the id that all attempts to run the request have in common. After Redis lost a journal, the client may
  send the request again, which begins another execution under the same id.
- `fence`: rises with each worker that takes the execution over, so that of two that think it is theirs one finds out.
- `owner`: that worker's name. `lease`: the time in ms until which no other may take it over. `writes`: the number of
  its last write.
- `edition`: another one each time that the journal is created, because positions in an earlier tail mean nothing in
  this one.
- `deadline` in ms; `cancel` once its tenant wants it to end; once the request has ended, `finished` or `error`.
- `digest`, `request`, `submit`, `started`, `session` and `asked` as in journal.Head.

The tail is what came of the request, as StepOutputs one after the other: protobuf merges what is concatenated.

All times are Redis' own. A client repeats a script when a connection breaks before its answer: a second run changes
nothing, even if it comes after the owner's next write.
"""

from scalellm.services.tokenizer.session_script import BOOKS

_STORE = (
    BOOKS
    + """
local head, tail = KEYS[1], KEYS[4]

-- Make room for `more` bytes. False if the tenant may not have so many.
local function has_room(more, limit, prefix)
  if total() + more > limit then prune(prefix) end
  return total() + more <= limit
end

local function count(id, more)
  redis.call('HINCRBY', sizes, id, more)
  redis.call('HINCRBY', sizes, '', more)
end

local function keep(id, ttl)
  redis.call('PEXPIRE', head, ttl)
  redis.call('PEXPIRE', tail, ttl)
  redis.call('ZADD', index, now + ttl, id)
  -- Kept longer than any journal, as Redis evicts first what expires first.
  for _, key in ipairs({index, sizes}) do
    if redis.call('PTTL', key) < 2 * ttl then redis.call('PEXPIRE', key, 4 * ttl) end
  end
end
"""
)

CREATE = (
    _STORE
    + """
-- ARGV: prefix of heads, id, limit, ttl ms, lease ms, fence, owner, ms until the deadline ('' = none), number of the
-- owner's last write, then fields of the head, `execution` first.
-- Returns 1: created, 0: there is one that another worker owns, -3: there is one of another execution, -1: no room.
local id, ttl, owner = ARGV[2], tonumber(ARGV[4]), ARGV[7]
local found = redis.call('HMGET', head, 'execution', 'fence')
if found[1] then
  if found[1] ~= ARGV[11] then return -3 end
  return found[2] == ARGV[6] and 1 or 0
end
forget(id)  -- an older one of this id, which expired
redis.call('DEL', tail)
local size = 512 + #id
for i = 10, #ARGV do size = size + #ARGV[i] end
if not has_room(size, tonumber(ARGV[3]), ARGV[1]) then return -1 end
redis.call('HSET', head, unpack(ARGV, 10))
redis.call('HSET', head, 'fence', ARGV[6], 'owner', owner, 'lease', now + tonumber(ARGV[5]), 'writes', ARGV[9],
           'edition', time[1] .. '.' .. time[2])
if ARGV[8] ~= '' then redis.call('HSET', head, 'deadline', now + tonumber(ARGV[8])) end
count(id, size)
keep(id, ttl)
return 1
"""
)

WRITE = (
    _STORE
    + """
-- Adds to the tail and renews the lease. ARGV: prefix of heads, id, limit, ttl ms, lease ms (0 = give it up), fence,
-- bytes that the tail has, what is added, name ('' = none) and value of the field with the end, execution, number of
-- the write. The tail has more bytes where the answer to an earlier write did not come, as its worker was being
-- stopped, say: what is added then repeats some of it, which readers skip.
-- Returns two numbers. 1: done, 2: done, and the request is to be cancelled, 0: it is another worker's now, -1: no
-- room, the journal is gone, -2: there is none, or Redis evicted its tail, -3: the journal is another execution's; and
-- the bytes that the tail has now.
local id, ttl, lease = ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5])
local found = redis.call('HMGET', head, 'fence', 'execution', 'writes')
if not found[1] then return {-2, 0} end
if found[2] ~= ARGV[11] then return {-3, 0} end
if found[1] ~= ARGV[6] then return {0, 0} end
-- A write that was done before is not done again. Version N-1 wrote no numbers.
if tonumber(ARGV[12]) > tonumber(found[3] or '0') then
  if redis.call('STRLEN', tail) < tonumber(ARGV[7]) then
    redis.call('DEL', head, tail)
    forget(id)
    return {-2, 0}
  end
  local data = ARGV[8]
  local more = #data + #ARGV[10]
  if more > 0 then
    if not has_room(more, tonumber(ARGV[3]), ARGV[1]) then
      redis.call('DEL', head, tail)
      forget(id)
      return {-1, 0}
    end
    if #data > 0 then redis.call('APPEND', tail, data) end
    if ARGV[9] ~= '' then redis.call('HSET', head, ARGV[9], ARGV[10]) end
    count(id, more)
  end
  redis.call('HSET', head, 'lease', lease > 0 and now + lease or 0, 'writes', ARGV[12])
  keep(id, ttl)
end
local is_cancelled = ARGV[9] == '' and redis.call('HEXISTS', head, 'cancel') == 1
return {is_cancelled and 2 or 1, redis.call('STRLEN', tail)}
"""
)

FORGET = (
    _STORE
    + """
-- ARGV: id, fence, execution. Removes a journal, if it is still this worker's.
local found = redis.call('HMGET', head, 'fence', 'execution')
if found[1] == ARGV[2] and found[2] == ARGV[3] then
  redis.call('DEL', head, tail)
  forget(ARGV[1])
end
return 1
"""
)

# KEYS: head, tail. ARGV: bytes of the tail that are known, the edition that they are of, and how many bytes to read.
# Returns nothing where there is no journal; else the execution, the fence, ms that are left of the lease and, or '',
# until the deadline, the end if there is one (finished, error), 1 if the request is to be cancelled, the edition, the
# position of what was read (0 if the edition is another one), the bytes of the tail, and what was read.
READ = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = redis.call('HMGET', KEYS[1], 'fence', 'lease', 'deadline', 'finished', 'error', 'cancel', 'execution',
                         'edition')
if not found[1] then return {} end
local left = found[3] and tostring(tonumber(found[3]) - now) or ''
local edition = found[8] or ''  -- version N-1 wrote none
local from = edition == ARGV[2] and tonumber(ARGV[1]) or 0
return {found[7], tonumber(found[1]), tonumber(found[2]) - now, left, found[4] or '', found[5] or '',
        found[6] and 1 or 0, edition, from, redis.call('STRLEN', KEYS[2]),
        redis.call('GETRANGE', KEYS[2], from, from + tonumber(ARGV[3]) - 1)}
"""

# KEYS: head. Marks the request, so that its worker, or the next one that takes it over, cancels it. Returns 0 if there
# is no journal.
CANCEL = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'cancel', 1)
return 1
"""

# KEYS: head. ARGV: fence as it was read, owner, lease ms, execution. Returns the new fence; 0: another worker has the
# request, it ended, or the journal is another execution's.
TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = redis.call('HMGET', KEYS[1], 'fence', 'owner', 'lease', 'finished', 'error', 'execution')
local new = tonumber(ARGV[1]) + 1
if not found[1] or found[4] or found[5] or found[6] ~= ARGV[4] then return 0 end
if found[1] == tostring(new) and found[2] == ARGV[2] then return new end
if found[1] ~= ARGV[1] or tonumber(found[3]) > now then return 0 end
redis.call('HSET', KEYS[1], 'fence', new, 'owner', ARGV[2], 'lease', now + tonumber(ARGV[3]), 'writes', 0)
return new
"""
