"""The scripts by which frames are answered and leave their stream: each is one step together with the ledger.

A frame of the waiting set is counted when it leaves that set, so a second settlement counts nothing, and neither does
a second entry of the same frame, as a publisher makes for a server that forgot its last second. An entry of a camera
that has no account, or with a number that its account does not know yet, came from a producer that keeps no ledger; it
is counted as captured here, so the ledger balances for foreign producers too.
"""

from producers.counting import COUNT, NAMED, UNKNOWN_VERDICT

LATE = 2  # what ANSWER says of a verdict that came too late; 1 of one that was sent, 0 of a repeated one

# Each frame has one verdict: a second one, after a redelivery or a passed deadline, is not sent. One that comes after
# the deadline, whether a watch has seen that or not, becomes `unknown`, late.
# An entry that is not in the stream any more was forgotten by the server: the frame's next entry brings its verdict.
# KEYS: verdicts latest waiting unanswered late ledger frames; ARGV: product kept takt_ms (0: none), then 9 a verdict,
# its entry's id last
ANSWER = (
    COUNT
    + UNKNOWN_VERDICT
    + """
local product, kept, takt_ms, answers, now = ARGV[1], ARGV[2], tonumber(ARGV[3]), {}, server_ms()
for i = 4, #ARGV, 9 do
  local camera, seq, version = ARGV[i], ARGV[i + 1], ARGV[i + 5]
  local member = camera .. '/' .. seq
  local answer, total_ms = 1, tonumber(ARGV[i + 7])
  local captured_ms = redis.call('ZSCORE', KEYS[4], member)
  if captured_ms then
    redis.call('ZREM', KEYS[4], member)
    total_ms = now - tonumber(captured_ms)
  else
    if redis.call('SISMEMBER', KEYS[5], member) == 1 then
      answer = 2
    elseif redis.call('ZSCORE', KEYS[3], member)
        or tonumber(seq) <= tonumber(redis.call('HGET', KEYS[6], camera .. ':last_seq') or '-1')
        or (ARGV[i + 8] ~= '' and #redis.call('XRANGE', KEYS[7], ARGV[i + 8], ARGV[i + 8]) == 0) then
      answer = 0
    end
  end
  if answer == 1 and takt_ms > 0 and total_ms > takt_ms then
    answer = 2
    if captured_ms then redis.call('SADD', KEYS[5], member) end
    local reason = string.format('late: no verdict within %g ms', takt_ms)
    answer_unknown(KEYS[1], kept, product, camera, seq, reason, total_ms)
    redis.call('HSET', KEYS[2], camera, version .. ' unknown')
  elseif answer == 1 then
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', kept, '*', 'frame_id', product .. '/' .. member, 'camera', camera,
        'seq', seq, 'verdict', ARGV[i + 2], 'score', ARGV[i + 3], 'threshold', ARGV[i + 4],
        'model_version', version, 'reason', ARGV[i + 6], 'total_ms', ARGV[i + 7])
    redis.call('HSET', KEYS[2], camera, version .. ' ' .. ARGV[i + 2])
  end
  answers[#answers + 1] = answer
end
return answers
"""
)

# KEYS: frames ledger waiting unanswered late held tally; ARGV: group, then id camera seq verdict bytes captured_ms
SETTLE = (
    COUNT
    + """
local settled = 0
for i = 2, #ARGV, 6 do
  local camera, verdict, size = ARGV[i + 1], ARGV[i + 3], ARGV[i + 4]
  local member = camera .. '/' .. ARGV[i + 2]
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
  local found = redis.call('XDEL', KEYS[1], ARGV[i])
  local ms = redis.call('ZSCORE', KEYS[3], member)
  if ms then
    redis.call('ZREM', KEYS[3], member)
    redis.call('ZREM', KEYS[4], member)
    redis.call('DECRBY', KEYS[6], size)
  end
  local last = not ms and tonumber(redis.call('HGET', KEYS[2], camera .. ':last_seq') or '-1')
  if ms or found == 1 and tonumber(ARGV[i + 2]) > last then
    local when = tonumber(ms or ARGV[i + 5])
    if not ms then count(KEYS[2], KEYS[7], when, camera, 'captured', 1) end
    redis.call('HINCRBY', KEYS[2], camera .. ':judged', 1)
    count(KEYS[2], KEYS[7], when, camera, verdict, 1)
    if redis.call('SREM', KEYS[5], member) == 1 then count(KEYS[2], KEYS[7], when, camera, 'late', 1) end
    settled = settled + 1
  end
end
return settled
"""
)

# KEYS: frames ledger waiting unanswered late held tally dead verdicts; ARGV: group id camera reason product kept
DEAD_LETTER = (
    COUNT
    + NAMED
    + UNKNOWN_VERDICT
    + """
local entry = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1]
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
if not entry then return 0 end
local fields, camera, own, seq, size = entry[2], ARGV[3], '', '', 0
for i = 1, #fields, 2 do
  if fields[i] == 'camera' then own = fields[i + 1] end
  if fields[i] == 'seq' then seq = fields[i + 1] end
  if fields[i] == 'data' then size = #fields[i + 1] end
end
local member = own .. '/' .. seq
local ms = redis.call('ZSCORE', KEYS[3], member)
local last = tonumber(redis.call('HGET', KEYS[2], own .. ':last_seq') or '-1')
local named = is_named(own, seq)
if not ms and named and camera == own and tonumber(seq) <= last then
  redis.call('XDEL', KEYS[1], ARGV[2])  -- a second entry of a frame that was counted
  return 0
end
if ms then camera = own else ms = server_ms() end
-- who was charged for it, and for which minute: a retry gives it back there
local account = string.format('%s %.0f', camera, tonumber(ms))
if #fields <= 64 then
  redis.call('XADD', KEYS[8], '*', 'reason', ARGV[4], 'account', account, unpack(fields))
else
  redis.call('XADD', KEYS[8], '*', 'reason', ARGV[4], 'account', account, 'fields', #fields / 2)
end
redis.call('XDEL', KEYS[1], ARGV[2])
if redis.call('ZSCORE', KEYS[3], member) then
  redis.call('ZREM', KEYS[3], member)
  redis.call('DECRBY', KEYS[6], size)
  local when = tonumber(ms)
  if redis.call('ZREM', KEYS[4], member) == 1 then
    answer_unknown(KEYS[9], ARGV[6], ARGV[5], own, seq, ARGV[4], server_ms() - when)
  end
  if redis.call('SREM', KEYS[5], member) == 1 then count(KEYS[2], KEYS[7], when, camera, 'late', 1) end
else
  count(KEYS[2], KEYS[7], tonumber(ms), camera, 'captured', 1)
  if named and tonumber(seq) > last then
    answer_unknown(KEYS[9], ARGV[6], ARGV[5], own, seq, ARGV[4], 0)
  end
end
count(KEYS[2], KEYS[7], tonumber(ms), camera, 'dead', 1)
return 1
"""
)

# Frames whose deadline comes within the margin and that have no verdict get one now: unknown, late. Returns how many,
# and the milliseconds until the next frame's deadline, -1 if no frame is without a verdict.
# KEYS: verdicts unanswered late; ARGV: product kept takt_ms margin_ms
EXPIRE = (
    COUNT
    + UNKNOWN_VERDICT
    + """
local product, kept, takt_ms, margin_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local now = server_ms()
local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - takt_ms + margin_ms, 'WITHSCORES', 'LIMIT', 0, 500)
for i = 1, #due, 2 do
  local camera, seq = string.match(due[i], '^(.*)/(%d+)$')
  redis.call('ZREM', KEYS[2], due[i])
  redis.call('SADD', KEYS[3], due[i])
  answer_unknown(KEYS[1], kept, product, camera, seq,
      string.format('late: no verdict within %g ms', takt_ms), now - tonumber(due[i + 1]))
end
local following = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if #following == 0 then return {#due / 2, -1} end
return {#due / 2, math.max(0, math.floor(tonumber(following[2]) + takt_ms - margin_ms - now))}
"""
)
