"""Named policies: four seats each. Any seat or parameter can be changed with ``--set``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Preset:
    """A policy by its seats. ``initial``: what is resident at the start, unless asked otherwise."""

    summary: str
    keep: str = "lru"
    prefetch: str = "none"
    miss: str = "fetch"
    route: str = "exact"
    initial: str = "cold"
    parameters: Mapping[str, object] = field(default_factory=dict)
    """``seat.parameter`` -> value."""


PRESETS: dict[str, Preset] = {
    "lru": Preset("least recently used"),
    "fifo": Preset("first in, first out", keep="fifo"),
    "lfu": Preset("least frequently used; counts survive eviction", keep="lfu"),
    "lfu-incache": Preset("least frequently used; eviction forgets", keep="lfu-incache"),
    "lfu-decay": Preset("least frequently used, counts fade", keep="lfu-decay"),
    "lfru": Preset("fewest uses for its age", keep="lfru"),
    "least-stale": Preset("first what this pass no longer needs", keep="least-stale"),
    "slru": Preset("LRU in two segments", keep="slru"),
    "random": Preset("a random victim", keep="random"),
    "static": Preset("the most used experts, fixed", keep="static", initial="static"),
    "min": Preset("Belady's MIN, every miss admitted (bound)", keep="min"),
    "min-bypass": Preset("Belady's MIN, misses may stay outside (bound)", keep="min-bypass"),
    "previous-token": Preset(
        "FIFO, and each layer's last demand prefetched", keep="fifo", prefetch="previous-token"
    ),
    "next-gate": Preset("LRU, and the next layer's gate applied early", prefetch="next-gate"),
    "hot-set": Preset("LRU, and each layer's hottest experts prefetched", prefetch="hot-set"),
    "look-ahead": Preset("LRU, and the next layer's demand known (bound)", prefetch="look-ahead"),
    "hindsight": Preset(
        "MIN with bypass, and the next 8 layers' demand known (bound)",
        keep="min-bypass",
        prefetch="look-ahead",
        parameters={"prefetch.distance": 8},
    ),
    "streaming": Preset("the whole next layer, always", keep="fifo", prefetch="whole-layer"),
    "cpu": Preset(
        "a fixed set; misses run on the host", keep="static", miss="cpu", initial="static"
    ),
    "fiddler": Preset(
        "a fixed set; misses are copied or run on the host, whichever is quicker",
        keep="static",
        miss="fiddler",
        initial="static",
    ),
}
