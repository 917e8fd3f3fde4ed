"""Policies: one file per idea. ``README.md`` shows how to write one.

The tables name the built-in seats and presets without importing them; `pyproject.toml` lists the
seats again as entry points, which is how other packages add theirs.
"""

if __name__ != "moesim.policies":
    raise ImportError("import this folder as moesim.policies, not as policies")

SEATS: dict[str, str] = {
    "keep.lru": "moesim.policies.lru:LRU",
    "keep.fifo": "moesim.policies.fifo:FIFO",
    "keep.lfu": "moesim.policies.lfu:LFU",
    "keep.lfu-incache": "moesim.policies.lfu:LFUInCache",
    "keep.lfu-decay": "moesim.policies.lfu_decay:LFUDecay",
    "keep.lfru": "moesim.policies.lfru:LFRU",
    "keep.least-stale": "moesim.policies.least_stale:LeastStale",
    "keep.slru": "moesim.policies.slru:SLRU",
    "keep.random": "moesim.policies.random_victim:Random",
    "keep.static": "moesim.policies.static:Static",
    "keep.importance": "moesim.policies.importance:Importance",
    "keep.min": "moesim.policies.belady:MinForced",
    "keep.min-bypass": "moesim.policies.belady:MinBypass",
    "keep.layer-lru": "moesim.policies.layer_lru:LayerLRU",
    "keep.activation-matrix": "moesim.policies.activation_matrix:ActivationMatrixKeep",
    "keep.map-frequency": "moesim.policies.map_frequency:MapFrequency",
    "prefetch.none": "moesim.policies.no_prefetch:NoPrefetch",
    "prefetch.previous-token": "moesim.policies.previous_token:PreviousToken",
    "prefetch.next-gate": "moesim.policies.next_gate:NextGate",
    "prefetch.hot-set": "moesim.policies.hot_set:HotSet",
    "prefetch.look-ahead": "moesim.policies.look_ahead:LookAhead",
    "prefetch.whole-layer": "moesim.policies.whole_layer:WholeLayer",
    "prefetch.staged-gate": "moesim.policies.staged_gate:StagedGate",
    "prefetch.activation-matrix": "moesim.policies.activation_matrix:ActivationMatrix",
    "prefetch.stride": "moesim.policies.stride:Stride",
    "prefetch.virtual-experts": "moesim.policies.virtual_experts:VirtualExperts",
    "prefetch.map-search": "moesim.policies.map_search:MapSearch",
    "prefetch.map-trajectory": "moesim.policies.map_search:MapTrajectory",
    "prefetch.hit-count": "moesim.policies.map_search:HitCount",
    "miss.fetch": "moesim.policies.fetch:Fetch",
    "miss.cpu": "moesim.policies.cpu:CPU",
    "miss.fiddler": "moesim.policies.fiddler:Fiddler",
    "route.exact": "moesim.policies.exact:Exact",
    "route.masked": "moesim.policies.masked_gate:MaskedGate",
}
