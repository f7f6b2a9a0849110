"""The scripts that put frames into a stream: one step each, so that stream, ledger and waiting set never disagree.

Replies of PUBLISH:
    added N         the frame is in the stream, now or since an earlier attempt whose reply was lost; N older ones were
                    shed for it
    first N         likewise, and the camera was unknown before
    full            the bounds of policy `block` are reached; nothing has changed
    shed            a bound is reached and the frame was given up and counted
    gap N           the ledger knows no frame from number N up to this one, though its run had them; nothing has
                    changed. The publisher sends again what it still holds, then declares the rest lost
    behind N        the camera's last number N is not below this frame's
"""

from producers.counting import COUNT, NAMED, UNKNOWN_VERDICT
from producers.keys import GROUP

# Numbers that a run had, of which the ledger knows nothing: captured and lost, with their range.
_LOSE = """
local function lose(ledger, tally, gaps, ms, camera, from, to)
  if to < from then return end
  count(ledger, tally, ms, camera, 'captured', to - from + 1)
  count(ledger, tally, ms, camera, 'lost', to - from + 1)
  redis.call('XADD', gaps, 'MAXLEN', '~', 10000, '*', 'camera', camera,
      'first', string.format('%.0f', from), 'last', string.format('%.0f', to), 'at_ms', string.format('%.0f', ms))
end
"""

# KEYS: frames ledger waiting unanswered late held tally, then verdicts gaps
PUBLISH = (
    COUNT
    + NAMED
    + UNKNOWN_VERDICT
    + _LOSE
    + f"local group_name = '{GROUP}'"
    + """
local product, camera, seq, captured_ns, first = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local declare, sent_ms, guard, policy = ARGV[6], tonumber(ARGV[7]), ARGV[8], ARGV[9]
local max_frames, max_bytes, kept = tonumber(ARGV[10]), tonumber(ARGV[11]), ARGV[12]
local v, codec, shape, data = ARGV[13], ARGV[14], ARGV[15], ARGV[16]
local captured_ms, number = math.floor(tonumber(captured_ns) / 1e6), tonumber(seq)

local last = redis.call('HGET', KEYS[2], camera .. ':last_seq')
if last and number <= tonumber(last) then
  local same = redis.call('HGET', KEYS[2], camera .. ':last_captured_at_ns') == captured_ns
  if seq == last and same then return 'added 0' end
  return 'behind ' .. last
end

local expected = math.max(last and tonumber(last) + 1 or 0, tonumber(first))
if number > expected and declare ~= '1' then return string.format('gap %.0f', expected) end

local function over()
  if guard == '1' then return 'memory' end
  if redis.call('XLEN', KEYS[1]) >= max_frames then return 'frames' end
  local held = tonumber(redis.call('GET', KEYS[6]) or '0')
  if held > 0 and held + #data > max_bytes then return 'bytes' end
end

local function shed(whose, which, ms, bound, named)
  count(KEYS[2], KEYS[7], ms, whose, 'shed', 1)
  count(KEYS[2], KEYS[7], ms, whose, 'shed.' .. policy .. ' ' .. bound, 1)
  if redis.call('SREM', KEYS[5], whose .. '/' .. which) == 1 then
    count(KEYS[2], KEYS[7], ms, whose, 'late', 1)  -- and so it has its verdict
  elseif named then
    answer_unknown(KEYS[8], kept, product, whose, which, 'shed: ' .. policy .. ', bound of ' .. bound, sent_ms - ms)
  end
end

-- the oldest entry that no replica has been given yet; 1 if it was a frame to count, 0 if not, false if there is none
local function shed_oldest(bound)
  local delivered = '-'
  if redis.call('EXISTS', KEYS[1]) == 0 then return false end
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local of = {}
    for i = 1, #group, 2 do of[group[i]] = group[i + 1] end
    if of.name == group_name then delivered = '(' .. of['last-delivered-id'] end
  end
  local entry = redis.call('XRANGE', KEYS[1], delivered, '+', 'COUNT', 1)[1]
  if not entry then return false end
  local whose, which, size = '?', '', 0
  for i = 1, #entry[2], 2 do
    local name, value = entry[2][i], entry[2][i + 1]
    if name == 'camera' then whose = value end
    if name == 'seq' then which = value end
    if name == 'data' then size = #value end
  end
  redis.call('XDEL', KEYS[1], entry[1])
  local member = whose .. '/' .. which
  local ms = redis.call('ZSCORE', KEYS[3], member)
  if ms then
    redis.call('ZREM', KEYS[3], member)
    redis.call('ZREM', KEYS[4], member)
    redis.call('DECRBY', KEYS[6], size)
    shed(whose, which, tonumber(ms), bound, true)
    return 1
  end
  local named = is_named(whose, which)
  if named and tonumber(which) <= tonumber(redis.call('HGET', KEYS[2], whose .. ':last_seq') or '-1') then
    return 0  -- a second entry of a frame that was counted: of a publisher that sent it again
  end
  ms = server_ms()  -- of a producer that keeps no ledger
  if not named then whose = '?' end
  count(KEYS[2], KEYS[7], ms, whose, 'captured', 1)
  shed(whose, which, ms, bound, named)
  return 1
end

local bound, gave_way = over(), 0
if bound and policy == 'block' then return 'full' end
while bound and policy == 'drop_oldest' do
  local given_up = shed_oldest(bound)
  if not given_up then break end
  gave_way = gave_way + given_up
  bound = guard ~= '1' and over()  -- memory is given back later than here, so one goes for one
end

lose(KEYS[2], KEYS[7], KEYS[9], captured_ms, camera, expected, number - 1)
local now_ms = server_ms()
count(KEYS[2], KEYS[7], captured_ms, camera, 'captured', 1)
-- a frame that was long on its way makes the producer's clock look late: the newest of them count little
local skew_ms, before = sent_ms - now_ms, tonumber(redis.call('HGET', KEYS[2], camera .. ':skew_ms') or '-inf')
if skew_ms < before then skew_ms = before + 0.02 * (skew_ms - before) end
redis.call('HSET', KEYS[2], camera .. ':last_seq', seq, camera .. ':last_captured_at_ns', captured_ns,
    camera .. ':skew_ms', string.format('%.0f', skew_ms))
if bound then
  shed(camera, seq, captured_ms, bound, true)
  return 'shed'
end
redis.call('XADD', KEYS[1], '*', 'v', v, 'camera', camera, 'seq', seq, 'captured_at_ns', captured_ns,
    'codec', codec, 'shape', shape, 'data', data)
redis.call('ZADD', KEYS[3], captured_ms, camera .. '/' .. seq)
redis.call('ZADD', KEYS[4], captured_ms - skew_ms, camera .. '/' .. seq)
redis.call('INCRBY', KEYS[6], #data)
return (last and 'added ' or 'first ') .. gave_way
"""
)

# A frame that never reaches the stream. Allowed on a server without memory: that is when frames are shed. Replies as of
# PUBLISH: shed, or gap N.
# KEYS: ledger verdicts gaps tally
SHED = (
    "#!lua flags=allow-oom\n"
    + COUNT
    + UNKNOWN_VERDICT
    + _LOSE
    + """
local product, camera, seq, captured_ns, first = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local reason, kept, declare = ARGV[6], ARGV[7], ARGV[8]
local last = redis.call('HGET', KEYS[1], camera .. ':last_seq')
if last and tonumber(seq) <= tonumber(last) then return 'shed' end
local ms = math.floor(tonumber(captured_ns) / 1e6)
local expected = math.max(last and tonumber(last) + 1 or 0, tonumber(first))
if tonumber(seq) > expected and declare ~= '1' then return string.format('gap %.0f', expected) end
lose(KEYS[1], KEYS[4], KEYS[3], ms, camera, expected, tonumber(seq) - 1)
count(KEYS[1], KEYS[4], ms, camera, 'captured', 1)
count(KEYS[1], KEYS[4], ms, camera, 'shed', 1)
count(KEYS[1], KEYS[4], ms, camera, 'shed.' .. reason, 1)
redis.call('HSET', KEYS[1], camera .. ':last_seq', seq, camera .. ':last_captured_at_ns', captured_ns)
answer_unknown(KEYS[2], kept, product, camera, seq, 'shed: ' .. reason, server_ms() - ms)
return 'shed'
"""
)

# Numbers that a run had and whose frames are known to be gone, as in a spool with a damaged record. Allowed like
# SHED. Replies: lost, or gap N for numbers before these.
# KEYS: ledger gaps tally; ARGV: camera from to captured_at_ns first declare
LOST = (
    "#!lua flags=allow-oom\n"
    + COUNT
    + _LOSE
    + """
local camera, captured_ns = ARGV[1], ARGV[4]
local last = redis.call('HGET', KEYS[1], camera .. ':last_seq')
local from = math.max(last and tonumber(last) + 1 or 0, math.min(tonumber(ARGV[2]), tonumber(ARGV[5])))
if tonumber(ARGV[3]) < from then return 'lost' end
local expected = math.max(last and tonumber(last) + 1 or 0, tonumber(ARGV[5]))
if tonumber(ARGV[2]) > expected and ARGV[6] ~= '1' then return string.format('gap %.0f', expected) end
lose(KEYS[1], KEYS[3], KEYS[2], math.floor(tonumber(captured_ns) / 1e6), camera, from, tonumber(ARGV[3]))
redis.call('HSET', KEYS[1], camera .. ':last_seq', ARGV[3], camera .. ':last_captured_at_ns', captured_ns)
return 'lost'
"""
)
