"""HybriMoE's schedule of a layer's misses (arXiv 2504.05897). Lossless.

A layer's experts are lined up, residents first, then the missing ones, each kind by falling number
of tokens. The device takes from the front, the host from the back; whichever would finish its next
expert sooner takes it (a tie goes to the device). A missing expert that the device takes must be
copied first, and copies follow each other. Needs the cost table alone; the paper profiles the same
three times on its machine, and its code has them as constants by model.

How good it is: of all places at which the line of missing experts can be cut, the rule finds a best
one. (The device's end rises with the cut, the host's falls; whoever took the last expert did so
because the other would have ended no sooner with it, so moving the cut either way ends no sooner.)
A cut of this line is optimal among all divisions where an expert's time on the device does not
depend on its tokens, as in decoding one request. Where it does, other divisions can be better.

Choices and differences:

- HybriMoE lets the host take cached experts too, once no missing one is left. Here a resident
  always runs on the device: a plan is asked about misses alone.
- The released code schedules decoding alone and copies everything of a prefill; the paper schedules
  both, as does this.
- Experts under way count as half a load that the link has to finish first.
- Copies are planned in the order of falling load; the link serves demand in demand order. For
  experts of one number of tokens both are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.policies.prices import Division, Layer


def greedy(layer: Layer) -> int:
    """How many of the missing experts, from the front, are copied by HybriMoE's rule."""
    link, device = layer.ready()
    front, back, host = 0, len(layer.on_host), 0
    while front < back:
        here = max(device, link + layer.copy) + layer.on_device[front]
        there = host + layer.on_host[back - 1]
        if here <= there:
            link += layer.copy
            device = here
            front += 1
        else:
            host = there
            back -= 1
    return front


def ending(layer: Layer) -> int:
    """When a layer ends by the rule, in half nanoseconds."""
    return layer.end(range(greedy(layer)))


@dataclass
class HybridSchedule(Division):
    """Divides a layer's misses so that the device, the link and the host finish early."""

    name = "hybrid-schedule"
    source = "arXiv 2504.05897"
    cost = "O(n log n)"

    def copied(self, layer: Layer) -> int:
        """By HybriMoE's rule."""
        return greedy(layer)
