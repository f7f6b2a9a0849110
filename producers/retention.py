"""What a publisher keeps of a camera's last frames, until the server has surely written them to its disk.

A server with `appendfsync everysec` may come back from a power cut without the last second of what it confirmed.
The publisher notices by the next frame (see `gap` in `producers.publishing`) and sends that second again.
"""

from collections import deque

from producers.frame import Frame


class Retention:
    """The newest published frames of any cameras, bounded by age and by bytes together.

    Args:
        age_s: how long a frame is kept.
        max_bytes: of all kept frames' data.
    """

    def __init__(self, age_s: float, max_bytes: int) -> None:
        self._age_s, self._max_bytes = age_s, max_bytes
        self._kept: deque[tuple[float, Frame]] = deque()
        self._bytes = 0

    def keep(self, frame: Frame, now_s: float) -> None:
        """Add a frame that was published at `now_s` on a steady clock."""
        self._kept.append((now_s, frame))
        self._bytes += len(frame.picture.data)
        while self._kept and (now_s - self._kept[0][0] >= self._age_s or self._bytes > self._max_bytes):
            _, old = self._kept.popleft()
            self._bytes -= len(old.picture.data)

    def since(self, frame: Frame, seq: int) -> list[Frame]:
        """The kept frames of `frame`'s camera from number `seq` up to `frame`, in order."""
        same = [old for _, old in self._kept if (old.product, old.camera) == (frame.product, frame.camera)]
        return [old for old in same if seq <= old.seq < frame.seq]
