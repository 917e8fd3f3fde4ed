"""What one layer event costs on three resources: the device, the link and the host.

Shared by the seats that divide a layer's missing experts between the host and the link. All times
are modelled ones of the cost table, whole nanoseconds; a cost table is not a clock (Needs.COSTS).

The model is that of HybriMoE (arXiv 2504.05897): the device computes one expert at a
time, residents first; the link copies one expert at a time; the host computes one expert at a time
(a machine with several host workers is quicker than this says, and a policy is not told). What the
host and the link take from each other's memory bandwidth is left out.

Times inside a :class:`Layer` are doubled, so that half a load is whole: a copy under way has, as
far as a policy can tell, half of it still to come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesim.protocol import CacheView, CostTable, MissSeat, World
from moesim.types import ExpertId, Gate, Needs, Serve, Status


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer event to divide, all times in half nanoseconds.

    device : what the device computes before anything arrives.
    late : device time of each expert whose copy is under way, in the order of arrival.
    copy : time of one whole load.
    on_device, on_host : time of each missing expert on either, most tokens first.
    """

    device: int
    late: tuple[int, ...]
    copy: int
    on_device: tuple[int, ...]
    on_host: tuple[int, ...]

    def ready(self) -> tuple[int, int]:
        """(link, device) free at, once the copies under way have come and been computed."""
        link, device = 0, self.device
        for duration in self.late:
            link += self.copy // 2
            device = max(device, link) + duration
        return link, device

    def end(self, copied: Sequence[int]) -> int:
        """When the layer ends if these missing experts are copied, in this order, the rest not."""
        link, device = self.ready()
        for place in copied:
            link += self.copy
            device = max(device, link) + self.on_device[place]
        kept = set(copied)
        host = sum(t for place, t in enumerate(self.on_host) if place not in kept)
        return max(device, host)


class Prices:
    """The cost table, asked once for each layer and number of tokens."""

    def __init__(self, world: World) -> None:
        assert world.costs is not None
        self._costs: CostTable = world.costs
        self._nbytes: list[int] = world.expert_bytes[0].tolist()
        self._device: dict[tuple[int, int], int] = {}
        self._host: dict[tuple[int, int], int] = {}
        self._load = [world.costs.load_ns(nbytes) for nbytes in self._nbytes]

    def load(self, layer: int) -> int:
        """Copying one expert of a layer, ns."""
        return self._load[layer]

    def device(self, tokens: int, layer: int) -> int:
        """Computing one expert on the device, ns."""
        key = (tokens, layer)
        if key not in self._device:
            self._device[key] = self._costs.expert_ns(tokens, layer)
        return self._device[key]

    def host(self, tokens: int, layer: int) -> int:
        """Computing one expert on the host, ns."""
        key = (tokens, layer)
        if key not in self._host:
            self._host[key] = self._costs.cpu_expert_ns(tokens, layer)
        return self._host[key]

    def layer(
        self, layer: int, here: Sequence[int], late: Sequence[int], missing: Sequence[int]
    ) -> Layer:
        """A layer event by the tokens of its experts; ``missing`` by falling number of tokens."""
        return Layer(
            device=2 * sum(self.device(t, layer) for t in here),
            late=tuple(2 * self.device(t, layer) for t in late),
            copy=2 * self.load(layer),
            on_device=tuple(2 * self.device(t, layer) for t in missing),
            on_host=tuple(2 * self.host(t, layer) for t in missing),
        )


def by_load(gate: Gate) -> list[int]:
    """Rows of a gate's missing experts, most tokens first, then in demand order."""
    rows: list[int] = (gate.status == Status.MISS).nonzero()[0].tolist()
    return sorted(rows, key=lambda row: -int(gate.tokens[row]))


def of_gate(prices: Prices, gate: Gate, missing: Sequence[int]) -> Layer:
    """The layer event that a gate has judged; ``missing`` as :func:`by_load` has them."""
    tokens: list[int] = gate.tokens.tolist()
    here = [t for t, s in zip(tokens, gate.status, strict=True) if s == Status.HIT]
    late = [t for t, s in zip(tokens, gate.status, strict=True) if s == Status.LATE]
    return prices.layer(gate.layer, here, late, [tokens[row] for row in missing])


@dataclass
class Division(MissSeat):
    """Lines up a layer's misses by load, and sends the back of the line to the host."""

    needs = Needs.COSTS

    def begin(self, world: World) -> None:
        """Take the cost table."""
        self.prices = Prices(world)

    def serve(self, gate: Gate, cache: CacheView) -> Mapping[ExpertId, Serve]:
        """The back of the line runs on the host."""
        missing = by_load(gate)
        if not missing:
            return {}
        count = self.copied(of_gate(self.prices, gate, missing))
        return {int(gate.experts[row]): Serve.CPU for row in missing[count:]}

    def copied(self, layer: Layer) -> int:
        """How many, from the front of the line, are copied."""
        raise NotImplementedError
