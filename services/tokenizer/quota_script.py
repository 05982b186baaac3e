"""The Redis script, executed atomically, by which all workers count the usage of tenants."""

QUOTA_SCRIPT = """
-- KEYS: the tenant's hash. ARGV: worker, sequence, running, lease ms, admit, tokens, then three limits (0: none), and
-- tokens to reserve. Tokens may be negative: what was reserved and not used is given back.
-- In the hash: running:WORKER = 'count expiry sequence'; requests, tokens = when, in ms, their buckets will be dry.
-- Returns the limit that refuses the request ('' : none) and the milliseconds until it may be tried again.
local key, worker = KEYS[1], 'running:' .. ARGV[1]
local sequence, running, lease = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local admit, used = ARGV[5] == '1', tonumber(ARGV[6])
local max_running, max_requests, max_tokens = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local minute = 60000

local total, known, requests, tokens = running, -1, now, now
local fields = redis.call('HGETALL', key)
for i = 1, #fields, 2 do
  local name, value = fields[i], fields[i + 1]
  if name == 'requests' then requests = math.max(now, tonumber(value))
  elseif name == 'tokens' then tokens = math.max(now, tonumber(value))
  else
    local count, expiry, last = string.match(value, '^(%d+) (%d+) (%d+)$')
    if name == worker then known = tonumber(last)
    elseif tonumber(expiry) > now then total = total + tonumber(count)
    else redis.call('HDEL', key, name) end
  end
end

local reserve = tonumber(ARGV[10])
if max_tokens > 0 and used ~= 0 then tokens = math.max(now, tokens + used * minute / max_tokens) end
local limit, wait = '', 0
if reserve > 0 and max_tokens > 0 then
  if tokens - now >= minute then limit, wait = 'tokens_per_minute', tokens - now - minute
  else tokens = tokens + reserve * minute / max_tokens end
end
if admit then
  if max_running > 0 and total > max_running then limit = 'concurrent_requests'
  elseif max_tokens > 0 and tokens - now >= minute then limit, wait = 'tokens_per_minute', tokens - now - minute
  elseif max_requests > 0 then
    local after = requests + minute / max_requests
    if after - now > minute then limit, wait = 'requests_per_minute', after - now - minute
    else requests = after end
  end
end

redis.call('HSET', key, 'requests', string.format('%.3f', requests), 'tokens', string.format('%.3f', tokens))
-- Messages of one worker may overtake one another; the refused request is not running.
if limit == '' and sequence > known then
  if running > 0 then
    redis.call('HSET', key, worker, string.format('%d %d %d', running, now + lease, sequence))
  else
    redis.call('HDEL', key, worker)
  end
end
-- For ever: a full Redis evicts what expires, and limits have to outlive sessions. Two small hashes per tenant.
redis.call('PERSIST', key)
return {limit, math.ceil(wait)}
"""
