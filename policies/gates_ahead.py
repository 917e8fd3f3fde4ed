"""What seats share that read the gates of several next layers at once."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import UsageError
from moesim.protocol import PrefetchSeat, World, check_distance
from moesim.types import Needs


@dataclass
class GatesAhead(PrefetchSeat):
    """Reads what the gates of the next ``distance`` layers would choose now."""

    needs = Needs.AHEAD
    distance: int = 3
    width: int = 0

    def __post_init__(self) -> None:
        """Some layers ahead, some experts."""
        check_distance(self.distance)
        if self.width < 0:
            raise UsageError(f"prefetch.width={self.width}: must be 0 (top k) or more")

    @property
    def distances(self) -> tuple[int, ...]:
        """All up to the farthest."""
        return tuple(range(1, self.distance + 1))

    def begin(self, world: World) -> None:
        """Take the shapes."""
        self.world = world
