"""Who takes the device's memory, and what is left for experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from moesim.errors import UsageError
from moesim.past import requests_of
from moesim.profile import HardwareProfile, ModelProfile
from moesim.replays import Request
from moesim.traces.reader import Columns, TraceReader


@dataclass(frozen=True, slots=True)
class Room:
    """Device memory, in bytes.

    device_bytes : what each device has. reserved_bytes : driver and activations.
    weights_bytes : all weights but the routed experts'. kv_bytes : the KV cache of a full batch of
    the longest context; layers of sliding attention keep their window. expert_bytes : all routed
    experts. most_bytes : what experts may have: what is left, or the budget, and no more than there
    is to hold. devices : how many share the experts out in equal parts; the first of them has all
    else to hold as well.
    """

    device_bytes: int
    reserved_bytes: int
    weights_bytes: int
    kv_bytes: int
    expert_bytes: int
    most_bytes: int
    devices: int = 1

    @property
    def left_bytes(self) -> int:
        """What is left for experts; below 0: so much is missing for everything else."""
        taken = self.reserved_bytes + self.weights_bytes + self.kv_bytes
        return (self.device_bytes - taken) * self.devices


def room(
    model: ModelProfile,
    hardware: HardwareProfile,
    context: int,
    batch: int,
    budget: int | None,
    devices: int = 0,
) -> Room:
    """The memory of a machine that serves ``batch`` requests of ``context`` tokens at once.

    ``devices`` as in a replay's request; 0: as many as the machine has.

    Raises
    ------
    UsageError
        If not one expert fits, with what is missing.
    """
    memory = hardware.memory
    everything = model.all_expert_bytes()
    made = Room(
        device_bytes=memory.device_bytes,
        reserved_bytes=memory.reserved_bytes,
        weights_bytes=model.fixed_bytes(),
        kv_bytes=_kv_bytes(model, context) * batch,
        expert_bytes=everything,
        most_bytes=0,
        devices=devices or hardware.devices,
    )
    most = min(everything, made.left_bytes if budget is None else budget)
    largest = int(model.expert_bytes_table().max()) * made.devices
    if most < largest:
        raise UsageError(_too_small(made, hardware.name, model.name, most, largest, budget))
    return replace(made, most_bytes=most)


def _kv_bytes(model: ModelProfile, context: int) -> int:
    """Of one request."""
    windows = model.kv_window_table()
    kept = np.where(windows > 0, np.minimum(windows, context), context)
    return int((model.kv_bytes_table() * kept).sum())


def _too_small(
    made: Room, hardware: str, model: str, most: int, largest: int, budget: int | None
) -> str:
    if budget is not None:
        return (
            f"--budget: {budget} bytes a device hold no expert of {model}; give at least {largest}"
        )
    needed = made.reserved_bytes + made.weights_bytes + made.kv_bytes
    return (
        f"--hardware {hardware}: memory is short by {(largest - most) / 1e9:.2f} GB: {model} needs "
        f"{needed / 1e9:.2f} GB beside its experts and the device has "
        f"{made.device_bytes / 1e9:.2f}; name a larger device, or --budget for what experts may "
        "have"
    )


def longest_context(request: Request) -> int:
    """Most positions that a request of the replay reaches."""
    with TraceReader(request.trace, Columns.experts_only(), request.batch_rows) as reader:
        served = islice(requests_of(reader, request.share), request.limit)
        return max((int(rows.position.max()) + 1 for rows in served), default=1)
