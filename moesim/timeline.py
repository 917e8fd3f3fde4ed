"""A run's lanes as Chrome trace events, which Perfetto opens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LANES = ("dense", "expert", "stall", "demand", "prefetch", "cpu", "job", "exchange", "ssd")
_TRACKS = {"dense": 1, "expert": 1, "stall": 1, "demand": 2, "prefetch": 2, "cpu": 3, "job": 4}
_TRACKS |= {"exchange": 5, "ssd": 6}
DEVICES = 2
"""Process of the first of several devices."""
_NAMES = {1: "compute", 2: "link", 3: "host experts", 4: "host jobs"}


def chrome_events(spans: Sequence[tuple[str, int, int, int]], experts: int) -> list[dict[str, Any]]:
    """Spans of (lane, start ns, end ns, key or -1) as complete events; microseconds, as asked.

    ``expert@2`` is the lane ``expert`` of device 2, which is a process of its own.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": track, "name": "thread_name", "args": {"name": name}}
        for track, name in (_NAMES | _drive_of(spans)).items()
    ]
    devices = sorted({int(lane.partition("@")[2]) for lane, *_ in spans if "@" in lane})
    if devices:
        made: dict[str, Any] = {"ph": "M", "pid": 1, "tid": 5, "name": "thread_name"}
        events.append({**made, "args": {"name": "interconnect"}})
    for number in devices:
        events += _device_names(number)
    for name, start, end, key in spans:
        lane, _, device = name.partition("@")
        event: dict[str, Any] = {
            "ph": "X",
            "pid": DEVICES + int(device) if device else 1,
            "tid": _TRACKS[lane],
            "cat": lane,
            "name": lane,
            "ts": start / 1000,
            "dur": (end - start) / 1000,
        }
        if key >= 0:
            event["name"] = f"{lane} {key // experts}.{key % experts}"
            event["args"] = {"layer": key // experts, "expert": key % experts}
        events.append(event)
    return events


def _device_names(device: int) -> list[dict[str, Any]]:
    """What a device and its tracks are called."""
    pid, name = DEVICES + device, {"name": f"device {device}"}
    made: list[dict[str, Any]] = [{"ph": "M", "pid": pid, "name": "process_name", "args": name}]
    for track in (1, 2):
        name = {"name": _NAMES[track]}
        made.append({"ph": "M", "pid": pid, "tid": track, "name": "thread_name", "args": name})
    return made


def _drive_of(spans: Sequence[tuple[str, int, int, int]]) -> dict[int, str]:
    """The track of the drive, where there is one."""
    return {6: "drive"} if any(span[0] == "ssd" for span in spans) else {}
