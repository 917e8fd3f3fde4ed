"""The books of a bank of slots: the ledger, which also says where each copy lies."""

from __future__ import annotations

from collections import Counter

from moesim.ledger import Ledger
from moesim.protocol import World


class SlotLedger(Ledger):
    """Equal slots for all copies that take the same room; staged copies have slots of their own.

    A staged copy that stays keeps its slot, and the slot of whoever went becomes free, so nothing
    is copied within the device.

    spare : staged copies at a time, beside the capacity.
    """

    def __init__(self, world: World, spare: int) -> None:
        super().__init__(world.expert_bytes, world.experts, world.capacity_bytes, allocator="slots")
        self.slots = self._count(spare)
        """Bytes of a slot -> how many there are."""
        self.slot_of: dict[int, int] = {}
        """Key -> its slot, among those of its size."""
        # Popped from the end: the lowest number first.
        self._free = {size: list(range(n))[::-1] for size, n in self.slots.items()}

    def reserve(self, key: int) -> None:
        """As the ledger does, and give a slot."""
        super().reserve(key)
        if key not in self.slot_of:
            self._give(key)

    def stage(self, key: int) -> None:
        """As the ledger does, and give a slot."""
        super().stage(key)
        self._give(key)

    def abandon(self, key: int) -> None:
        """As the ledger does, and take the slot back."""
        super().abandon(key)
        self._take(key)

    def evict(self, key: int) -> None:
        """As the ledger does, and take the slot back."""
        super().evict(key)
        self._take(key)

    def unstage(self, key: int, *, adopt: bool) -> None:
        """As the ledger does; a copy that stays keeps its slot."""
        super().unstage(key, adopt=adopt)
        if not adopt:
            self._take(key)

    def _give(self, key: int) -> None:
        self.slot_of[key] = self._free[self.bytes_of[key]].pop()

    def _take(self, key: int) -> None:
        self._free[self.bytes_of[key]].append(self.slot_of.pop(key))

    def _count(self, spare: int) -> dict[int, int]:
        keys = Counter(zip(self.cache_of, self.bytes_of, strict=True))
        slots: Counter[int] = Counter()
        for (cache, size), copies in keys.items():
            slots[size] += min(copies, self.capacity[cache] // size)
        return {size: count + spare for size, count in slots.items()}
