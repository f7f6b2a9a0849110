"""Lua that every script of the ledger shares, so that a step, its count and its share of the tally are one.

Numbers become text by `%.0f`: Lua's own conversion keeps 14 digits, sequence numbers have 16.
"""

TALLY_DAYS = 35

COUNT = f"""
local function count(ledger, tally, ms, camera, what, n)
  redis.call('HINCRBY', ledger, camera .. ':' .. what, n)
  local minute = math.floor(ms / 60000)
  local hour = string.format('%s%.0f', tally, math.floor(minute / 60))
  if redis.call('HINCRBY', hour, string.format('%d:%s:%s', minute % 60, camera, what), n) == n then
    redis.call('EXPIRE', hour, {TALLY_DAYS * 86400})
  end
end
local function server_ms()
  local now = redis.call('TIME')
  return tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
end
"""

# Whether an entry names its frame as a camera of ours does; any bytes may stand in a stream.
NAMED = """
local function is_named(camera, seq)
  return #camera < 64 and #seq < 20 and string.match(camera, '^%w[%w_.-]*$') and string.match(seq, '^%d+$')
end
"""

# A verdict that no replica gave: the frame was shed, is late or went to the dead letters. `camera/seq` names it.
UNKNOWN_VERDICT = """
local function answer_unknown(verdicts, kept, product, camera, seq, reason, total_ms)
  redis.call('XADD', verdicts, 'MAXLEN', '~', kept, '*', 'frame_id', product .. '/' .. camera .. '/' .. seq,
      'camera', camera, 'seq', seq, 'verdict', 'unknown', 'score', 'nan', 'threshold', 'nan',
      'model_version', '', 'reason', reason, 'total_ms', string.format('%.3f', total_ms))
end
"""
