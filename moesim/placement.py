"""Several devices: which of them owns an expert, and which cache holds it.

Each expert has one owner. A device has a cache of its own (scope "global"), or one for each layer
of which it owns experts (scope "layer").
"""

from __future__ import annotations

import numpy as np

from moesim.errors import UsageError
from moesim.types import DROPPED, AnyArray, IntArray

PLACEMENTS = ("round-robin", "load", "layers")


def place(how: str, devices: int, layers: int, experts: int, uses: IntArray | None) -> IntArray:
    """int64 [layers * experts]: the device that owns each expert.

    how : "round-robin" deals the experts in (layer, expert) order (FineMoE, section 5); "load"
        gives, within each layer, the most used expert to the device with the least use so far, and
        no device more than its share of the layer's experts (LPT, as DeepSeek's EPLB packs);
        "layers" gives each device a run of layers.
    uses : int64 [layers * experts], for "load".

    Raises
    ------
    UsageError
        Where a device would own nothing.
    """
    units, what = (layers, "layers") if how == "layers" else (layers * experts, "experts")
    if devices > units:
        raise UsageError(
            f"--devices {devices}: more than the {units} {what} that --placement {how} deals out; "
            "use fewer"
        )
    if how == "layers":
        owners = np.arange(layers) * devices // layers
        return np.repeat(owners, experts)
    if how == "round-robin":
        return np.arange(layers * experts) % devices
    assert uses is not None
    return _by_load(devices, uses.reshape(layers, experts))


def _by_load(devices: int, uses: IntArray) -> IntArray:
    """Ties go to the device that has fewer of the layer's experts, then less use in all layers
    before, then fewer experts in all, then to the lowest."""
    layers, experts = uses.shape
    owners = np.zeros((layers, experts), np.int64)
    total = np.zeros(devices, np.int64)
    owned = np.zeros(devices, np.int64)
    share = -(-experts // devices)
    for layer in range(layers):
        load = np.zeros(devices, np.int64)
        held = np.zeros(devices, np.int64)
        for expert in np.argsort(-uses[layer], kind="stable").tolist():
            room = np.flatnonzero(held < share)
            order = np.lexsort((owned[room], total[room], held[room], load[room]))
            device = room[order[0]]
            owners[layer, expert] = device
            load[device] += uses[layer, expert]
            held[device] += 1
            owned[device] += 1
        total += load
    return owners.reshape(-1)


def caches_of(layers: int, experts: int, scope: str, owners: IntArray | None) -> IntArray:
    """int64 [layers * experts]: the cache that holds each expert. Caches are numbered device by
    device, and within one layer by layer; a device has none for a layer of which it owns nothing.
    """
    layer = np.repeat(np.arange(layers), experts)
    if owners is None:
        return layer if scope == "layer" else np.zeros_like(layer)
    if scope != "layer":
        return owners
    places: IntArray = np.unique(owners * layers + layer, return_inverse=True)[1]
    return places.astype(np.int64)


def divide(
    capacity_bytes: tuple[int, ...], layer_bytes: IntArray, scope: str, owners: IntArray
) -> tuple[int, ...]:
    """Bytes of each cache: equal parts of what was given for all devices.

    Of a layer's own bytes each owner gets whole experts, the lowest devices what is left over.

    Parameters
    ----------
    capacity_bytes : one number (scope "global") or one a layer, of all devices together.
    layer_bytes : int64 [layers], bytes of one expert in full precision.

    Raises
    ------
    UsageError
        For less than one expert in a cache.
    """
    layers, devices = len(layer_bytes), int(owners.max()) + 1
    by_layer = owners.reshape(layers, -1)
    given: dict[tuple[int, int], int] = {}
    if scope != "layer":
        given = {(device, 0): capacity_bytes[0] // devices for device in range(devices)}
        least = {device: int(layer_bytes[(by_layer == device).any(axis=1)].max())
                 for device in range(devices)}  # fmt: skip
        wanted = {(device, 0): least[device] for device in range(devices)}
    else:
        wanted = {}
        for layer in range(layers):
            size = int(layer_bytes[layer])
            own = np.unique(by_layer[layer]).tolist()
            slots, over = divmod(capacity_bytes[layer] // size, len(own))
            for rank, device in enumerate(own):
                given[device, layer] = (slots + (rank < over)) * size
                wanted[device, layer] = size
    for place, nbytes in given.items():
        if nbytes < wanted[place]:
            where = f"device {place[0]}" + (f", layer {place[1]}" if scope == "layer" else "")
            raise UsageError(
                f"--capacity: is what all {devices} devices hold together, and leaves {nbytes} "
                f"bytes for {where}, where one expert has {wanted[place]}; give more, or use fewer "
                "--devices"
            )
    return tuple(given[place] for place in sorted(given))


class Travel:
    """How many hidden states travel between devices.

    A layer's dense part runs on its *home*: the owner of all its experts, or else device 0. A token
    goes from there once to each other device that owns one of its experts, and comes back. Where
    the home changes from one layer to the next, every token moves.
    """

    def __init__(self, layers: int, owners: IntArray) -> None:
        self._owners = owners.reshape(layers, -1)
        only = (self._owners == self._owners[:, :1]).all(axis=1)
        self.home: IntArray = np.where(only, self._owners[:, 0], 0)

    def away(self, layers: IntArray, chosen: AnyArray) -> IntArray:
        """int64 [rows]: to how many other devices each row's token goes.

        layers : int64 [rows]. chosen : uint16 [rows, k], 65535 where there is none.
        """
        there = chosen != DROPPED
        owner = self._owners[layers[:, None], np.where(there, chosen, 0)]
        there &= owner != self.home[layers][:, None]
        count = np.zeros(len(layers), np.int64)
        for rank in range(chosen.shape[1]):
            before = there[:, :rank] & (owner[:, :rank] == owner[:, rank : rank + 1])
            count += there[:, rank] & ~before.any(axis=1)
        return count

    def moves(self, before: int, layer: int) -> bool:
        """Whether the home changes between two layers; ``before`` is -1 at the first of a step."""
        return before >= 0 and bool(self.home[before] != self.home[layer])
