"""The far side of ``rival``: lets libCacheSim process traces, and times it.

It is run by an interpreter that has libCacheSim and knows nothing of moesim, for libCacheSim's
licence keeps it in an environment of its own. Reads one JSON object a line::

    {"policy": "LRU", "parts": [["path of an oracleGeneral file", capacity in objects], ...]}

and answers with one: the ns spent inside libCacheSim's own loop, summed over the parts, and each
part's miss ratio. Every part has a cache of its own. Files stay open, so that only the first time
pays for mapping them.
"""

import json
import os
import sys
import time
from importlib import import_module
from importlib.metadata import version

SMALLEST_TABLE_POWER = 12
"""Of the powers of two tried for its hash table, none was faster for small caches."""


def main() -> None:
    """Answer until the input ends."""
    library = import_module("libcachesim")
    # What it prints itself must not stand among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    readers: dict[str, object] = {}
    print(json.dumps({"libcachesim": version("libcachesim")}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        taken, misses = 0, []
        for path, capacity in asked["parts"]:
            if path not in readers:
                kind = library.TraceType.ORACLE_GENERAL_TRACE
                readers[path] = library.TraceReader(path, kind)
            power = max(SMALLEST_TABLE_POWER, capacity.bit_length() + 2)
            cache = getattr(library, asked["policy"])(cache_size=capacity, hashpower=power)
            started = time.perf_counter_ns()
            ratio = cache.process_trace(readers[path])[0]
            taken += time.perf_counter_ns() - started
            misses.append(ratio)
        answer = {"ns": taken, "miss_ratios": misses}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
