"""Sequence numbers that no restart of a camera ever reuses."""

import threading
import time

_COUNTER_BITS = 20


class Sequence:
    """Counts up from the boot's epoch: `seconds since 1970 << 20`, then + 1 a frame.

    A gap inside a run is a lost frame; a jump of whole seconds is a restart. A camera would have to take more
    than 2**20 frames a second for a restart to meet a number that is in use. Numbers stay below 2**53, so that
    Lua and JSON hold them exactly.

    Args:
        after: the last number known to be used (a server's ledger knows it); the next one is larger, also when
            the clock went back meanwhile.
    """

    def __init__(self, after: int = 0) -> None:
        self._next = max(int(time.time()) << _COUNTER_BITS, after + 1)
        self._lock = threading.Lock()

    def next(self) -> int:
        """The next number."""
        with self._lock:
            number = self._next
            self._next += 1
            return number
