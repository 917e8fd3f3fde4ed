"""Divide a layer's misses so that the host and the link finish together: q*. Lossless.

FreeToken (arXiv 2608.16157) sends q of a layer's n missing experts to the host, where their weights
are read at B_c, and n - q over the link at B_p, with q / B_c = (n - q) / B_p. Here the same is said
in times, so that tokens count as well: of all q, the one for which the later of

    the sum of the host's times of its q experts, and n - q loads

is the earliest; among equals the largest q, which moves least. The experts with the fewest tokens
go to the host, of equals the last in demand order (the lowest gate rank). The source takes its two
rates from the machine under both loads at once; a cost table has each alone. Time on the device is
left out, as it is there (``miss=hybrid-schedule`` counts it). Copies under way count as half a load
each. Needs the cost table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesim.policies.prices import Division, Layer


def quota(on_host: Sequence[int], copy: int, link: int = 0) -> int:
    """Kernel: how many experts, from the back of ``on_host`` (times, falling), go to the host.

    copy : time of one load. link : when the link is free.
    """
    count = len(on_host)
    host, best, least = 0, 0, link + count * copy if count else 0
    for q in range(1, count + 1):
        host += on_host[count - q]
        copies = count - q
        latest = max(host, link + copies * copy if copies else 0)
        if latest <= least:
            best, least = q, latest
    return best


@dataclass
class LinkSplit(Division):
    """Sends to the host as many misses as it serves while the link copies the others."""

    name = "q-split"
    source = "arXiv 2608.16157"
    cost = "O(n log n)"

    def copied(self, layer: Layer) -> int:
        """All but the quota."""
        late = len(layer.late) * (layer.copy // 2)
        return len(layer.on_host) - quota(layer.on_host, layer.copy, late)
