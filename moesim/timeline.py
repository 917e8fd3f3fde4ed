"""A run's lanes as Chrome trace events, which Perfetto opens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LANES = ("dense", "expert", "stall", "demand", "prefetch", "cpu", "job")
_TRACKS = {"dense": 1, "expert": 1, "stall": 1, "demand": 2, "prefetch": 2, "cpu": 3, "job": 4}
_NAMES = {1: "compute", 2: "link", 3: "host experts", 4: "host jobs"}


def chrome_events(spans: Sequence[tuple[str, int, int, int]], experts: int) -> list[dict[str, Any]]:
    """Spans of (lane, start ns, end ns, key or -1) as complete events; microseconds, as asked."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": track, "name": "thread_name", "args": {"name": name}}
        for track, name in _NAMES.items()
    ]
    for lane, start, end, key in spans:
        event: dict[str, Any] = {
            "ph": "X",
            "pid": 1,
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
