"""Redis keys of a product. The braces are literal: all keys of a product share one Redis Cluster slot.

Contract of the keys:
    frames:{product}    stream of captured frames, one consumer group `inspectors`
    verdicts:{product}  stream of verdicts, bounded, newest kept
    dead:{product}      stream of entries that were given up, with `reason`
    dead_counts:{product}  hash `retried`, `dropped`, `trimmed` -> what became of entries of that stream
    ledger:{product}    hash `camera:captured|judged|shed|dead` -> count, `camera:last_seq` -> seq and
                        `camera:last_captured_at_ns` -> capture time of the camera's newest frame
    model:{product}     hash `current`, `previous` -> version of the student in service
    latest:{product}    hash camera -> `version verdict` of its newest verdict
    waiting:{product}   sorted set `camera/seq` scored by capture time (ms): the frames in flight
"""

PRODUCTS = "proctor:products"
GROUP = "inspectors"


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


def model(product: str) -> str:
    """Hash of the pointers to the product's versions."""
    return f"model:{{{product}}}"


def latest(product: str) -> str:
    """Hash of each camera's newest verdict."""
    return f"latest:{{{product}}}"


def waiting(product: str) -> str:
    """Sorted set of the frames in flight."""
    return f"waiting:{{{product}}}"
