"""Count hits with libCacheSim, which knows nothing of experts, layers or moesim.

    python libcachesim_counts.py [--policies LRU,FIFO] STREAM.npy=1,8,192 [STREAM.npy=...]

Stands alone, because libCacheSim's licence keeps it in an environment of its own: run it with an
interpreter that has the packages `libcachesim` and `numpy`. A stream is int64 [accesses], one
object id an access; after `=` come the capacities, in objects. Every object has size 1, every miss
is admitted, the cache starts empty. When each object is accessed next, which Belady must be told,
is worked out here. Prints one JSON object::

    {"libcachesim": version,
     "streams": {file stem: {"accesses": n, "sha256": of the ids,
                             "hits": {policy: {capacity: hits}}}}}
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import libcachesim
import numpy as np

POLICIES = {
    "LRU": libcachesim.LRU,
    "FIFO": libcachesim.FIFO,
    "LFU": libcachesim.LFU,
    "Belady": libcachesim.Belady,
}
"""Its LFU forgets an object's count when it evicts it; equal counts go by the oldest touch."""

RECORD = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
"""libCacheSim's `oracleGeneral` format; `next` is an index into the stream, -1 for never."""

HASH_POWER = 16


def next_access(ids: np.ndarray) -> np.ndarray:
    """Where each access's object is accessed next, int64 [accesses], -1 for never."""
    following = np.full(len(ids), -1, np.int64)
    order = np.argsort(ids, kind="stable")
    same = ids[order][1:] == ids[order][:-1]
    following[order[:-1][same]] = order[1:][same]
    return following


def count(path: Path, policy: str, capacity: int, accesses: int) -> int:
    """Hits of one policy at one capacity on an `oracleGeneral` file."""
    reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
    cache = POLICIES[policy](cache_size=capacity, hashpower=HASH_POWER)
    misses = cache.process_trace(reader)[0] * accesses
    if abs(misses - round(misses)) > 1e-3:
        raise ArithmeticError(f"{path}: {policy} at {capacity}: {misses} is no count")
    return accesses - round(misses)


def count_stream(stream: Path, capacities: list[int], policies: list[str]) -> dict[str, object]:
    """Everything that is reported of one stream."""
    ids = np.load(stream).astype("<i8")
    records = np.zeros(len(ids), RECORD)
    records["object"] = ids + 1
    records["size"] = 1
    records["next"] = next_access(ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream.oracleGeneral"
        records.tofile(path)
        hits = {p: {str(c): count(path, p, c, len(ids)) for c in capacities} for p in policies}
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return {"accesses": len(ids), "sha256": digest, "hits": hits}


def main() -> None:
    """Count what the command line names."""
    parser = argparse.ArgumentParser(description="Count hits with libCacheSim.")
    parser.add_argument("streams", nargs="+", metavar="STREAM.npy=CAPACITIES")
    parser.add_argument("--policies", default=",".join(POLICIES))
    arguments = parser.parse_args()
    streams = {}
    for job in arguments.streams:
        name, _, capacities = job.rpartition("=")
        counted = [int(c) for c in capacities.split(",")]
        path = Path(name)
        streams[path.stem] = count_stream(path, counted, arguments.policies.split(","))
    json.dump({"libcachesim": version("libcachesim"), "streams": streams}, sys.stdout)


if __name__ == "__main__":
    main()
