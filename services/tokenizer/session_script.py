"""Scripts by which Redis changes a tenant's sessions in one step.

KEYS: the session's hash; the tenant's index, ids by time of expiry in ms; the sizes, bytes by id and, under '', their
sum. All of one tenant's are in one slot of a cluster.
"""

# Beginning of every script that accounts for a tenant's stored bytes, in the keys 2 and 3 described above.
BOOKS = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local index, sizes = KEYS[2], KEYS[3]

local function forget(id)
  local size = redis.call('HGET', sizes, id)
  if size then
    redis.call('HDEL', sizes, id)
    redis.call('HINCRBY', sizes, '', -tonumber(size))
  end
  redis.call('ZREM', index, id)
end

local function total()
  return tonumber(redis.call('HGET', sizes, '') or '0')
end

-- What expired is forgotten, and of the next ones to expire what Redis evicted.
local function prune(prefix)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now)) do forget(id) end
  for _, id in ipairs(redis.call('ZRANGE', index, 0, 999)) do
    if redis.call('EXISTS', prefix .. id) == 0 then forget(id) end
  end
end
"""

SAVE = (
    BOOKS
    + """
-- Compare and set: stores a hash only if the session's version is the expected one ("" = there is none). The client
-- repeats it when a connection breaks before the answer: a session of the new version was stored the first time.
-- ARGV: expected version, new version, ttl in ms, id, prefix of the hashes' keys, size, limit, then the hash.
-- Returns 1: stored, 0: another version is, -1: beyond the limit.
local id, prefix, size, limit, ttl = ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[3])
local version = redis.call('HGET', KEYS[1], 'version') or ''
if version == ARGV[2] then return 1 end
if version ~= ARGV[1] then return 0 end
for _, other in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now)) do forget(other) end
local before = tonumber(redis.call('HGET', sizes, id) or '0')
if total() - before + size > limit then
  prune(prefix)
  before = tonumber(redis.call('HGET', sizes, id) or '0')
  if total() - before + size > limit then return -1 end
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 8))
redis.call('PEXPIRE', KEYS[1], ttl)
redis.call('HSET', sizes, id, size)
redis.call('HINCRBY', sizes, '', size - before)
redis.call('ZADD', index, now + ttl, id)
-- Kept longer than any session, as Redis evicts first what expires first.
for _, key in ipairs({index, sizes}) do
  if redis.call('PTTL', key) < 2 * ttl then redis.call('PEXPIRE', key, 4 * ttl) end
end
return 1
"""
)

DELETE = (
    BOOKS
    + """
-- ARGV: id. Returns how many were deleted.
local deleted = redis.call('DEL', KEYS[1])
forget(ARGV[1])
return deleted
"""
)

USED = (
    BOOKS
    + """
-- ARGV: prefix of the hashes' keys. Returns the bytes of what is there.
prune(ARGV[1])
return total()
"""
)
