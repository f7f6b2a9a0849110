"""Which version lies in which slot, and which makes room for another."""

from collections import OrderedDict, deque
from collections.abc import Collection


class SlotTable:
    """Least recently used versions make room; one that is gone does first.

    Not for several threads at once, but for `forget`.

    Args:
        slots: how many there are.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._used: OrderedDict[int, int] = OrderedDict()
        self._free = list(reversed(range(slots)))
        # A garbage collection may come in any thread and in the middle of anything: it only leaves a note.
        self._forgotten: deque[int] = deque()

    def forget(self, key: int) -> None:
        """Note that a version will never be asked for again; its slot is free."""
        self._forgotten.append(key)

    def free(self) -> int:
        """Return how many slots hold nothing that could be asked for."""
        self._collect()
        return len(self._free)

    def assign(self, keys: Collection[int]) -> dict[int, int]:
        """Give versions slots beside each other, at the cost of others that were not used for longest.

        Args:
            keys: of the versions, at most `slots` different ones.

        Returns:
            The slots of those that had none, by key: their content must be written.
        """
        self._collect()
        wanted = dict.fromkeys(keys)
        if len(wanted) > self.slots:
            raise ValueError(f"{len(wanted)} versions do not fit {self.slots} slots")
        for key in wanted:
            if key in self._used:
                self._used.move_to_end(key)
        new = {}
        for key in wanted:
            if key not in self._used:
                # Those wanted that have slots were moved behind all others, so none of them is at the front.
                slot = self._free.pop() if self._free else self._used.popitem(last=False)[1]
                self._used[key] = new[key] = slot
        return new

    def slot(self, key: int) -> int:
        """Return the slot of a version that has one."""
        return self._used[key]

    def _collect(self) -> None:
        while self._forgotten:
            slot = self._used.pop(self._forgotten.popleft(), None)
            if slot is not None:
                self._free.append(slot)
