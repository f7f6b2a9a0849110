"""Redis keys of a product. The braces are literal: all keys of a product share one Redis Cluster slot.

Contract of the keys:
    frames:{product}        stream of captured frames, one consumer group `inspectors`
    verdicts:{product}      stream of verdicts, bounded, newest kept: one for each frame that is judged or shed
    dead:{product}          stream of entries that were given up, with `reason`
    dead_counts:{product}   hash `retried`, `dropped`, `trimmed` -> what became of entries of that stream
    ledger:{product}        hash `camera:what` -> count, where what is captured, judged, shed, dead, lost, or a part of
                            one of them: pass, fail, unknown, late, `shed.reason`; and of the camera's newest frame
                            `camera:last_seq`, `camera:last_captured_at_ns`, `camera:skew_ms`
    tally:{product}:hour    hash `minute:camera:what` -> count, by the hour and minute of capture (hours and minutes
                            since the epoch), kept for 35 days: what a shift's report adds up
    gaps:{product}          stream of lost ranges of sequence numbers: `camera`, `first`, `last`
    waiting:{product}       sorted set `camera/seq` scored by capture time (ms, the producer's clock): frames in flight
    unanswered:{product}    likewise, scored by capture time in the server's clock: frames in flight without a verdict
    late:{product}          set `camera/seq`: frames in flight whose verdict was `unknown`, late
    held:{product}          bytes of the frames in flight
    model:{product}         hash `current`, `previous` -> version of the student in service
    latest:{product}        hash camera -> `version verdict` of its newest verdict
"""

PRODUCTS = "proctor:products"
GROUP = "inspectors"
VERDICTS_KEPT = 10_000


def frames(product: str) -> str:
    """Stream of captured frames."""
    return f"frames:{{{product}}}"


def verdicts(product: str) -> str:
    """Stream of verdicts."""
    return f"verdicts:{{{product}}}"


def dead(product: str) -> str:
    """Dead-letter stream."""
    return f"dead:{{{product}}}"


def dead_counts(product: str) -> str:
    """Hash of what became of dead letters."""
    return f"dead_counts:{{{product}}}"


def ledger(product: str) -> str:
    """Hash of the counts per camera."""
    return f"ledger:{{{product}}}"


def tally(product: str, hour: int | None = None) -> str:
    """Hash of the counts of one hour since the epoch; without it, what such keys begin with."""
    return f"tally:{{{product}}}:{'' if hour is None else hour}"


def gaps(product: str) -> str:
    """Stream of lost ranges of sequence numbers."""
    return f"gaps:{{{product}}}"


def waiting(product: str) -> str:
    """Sorted set of the frames in flight."""
    return f"waiting:{{{product}}}"


def unanswered(product: str) -> str:
    """Sorted set of the frames in flight that have no verdict yet."""
    return f"unanswered:{{{product}}}"


def late(product: str) -> str:
    """Set of the frames in flight whose verdict came from their deadline."""
    return f"late:{{{product}}}"


def held(product: str) -> str:
    """Bytes of the frames in flight."""
    return f"held:{{{product}}}"


def account(product: str) -> list[str]:
    """The stream and the account of its frames, in the order in which the scripts of the ledger take them."""
    return [key(product) for key in (frames, ledger, waiting, unanswered, late, held, tally)]


def model(product: str) -> str:
    """Hash of the pointers to the product's versions."""
    return f"model:{{{product}}}"


def latest(product: str) -> str:
    """Hash of each camera's newest verdict."""
    return f"latest:{{{product}}}"
