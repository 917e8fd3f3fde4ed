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


_STILL: dict[str, object] = {"prefetch.period": 0, "prefetch.spare": 0}
"""SwapMoE's first set, for good."""

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
    "deepspeed": Preset(
        "DeepSpeed: streams every layer whole, as `streaming`", keep="fifo", prefetch="whole-layer"
    ),
    "deepspeed-cache": Preset(
        "DeepSpeed with an expert cache, as FineMoE's authors ran it: on demand, as `lru`"
    ),
    "mixtral-offloading": Preset(
        "Mixtral-Offloading: LRU by layer, the next layer's gate speculates into 4 buffers",
        keep="layer-lru",
        prefetch="staged-gate",
    ),
    "moe-infinity": Preset(
        "MoE-Infinity: activation matrices of past requests, as in the paper",
        keep="activation-matrix",
        prefetch="activation-matrix",
    ),
    "moe-infinity-code": Preset(
        "MoE-Infinity's released code as FineMoE's authors ran it: LFU, prefetching on",
        keep="lfu-incache",
        prefetch="activation-matrix",
        parameters={"prefetch.variant": "code", "prefetch.width": 0},
    ),
    "promoe": Preset(
        "ProMoE: LRU, and a predictor two layers ahead (fit one: moesim fit)", prefetch="stride"
    ),
    "promoe-speculative": Preset(
        "ProMoE as FineMoE's authors ran it: LRU, and the gate two layers on applied early",
        prefetch="next-gate",
        parameters={"prefetch.distance": 2, "prefetch.cancel": True},
    ),
    "arc": Preset("ARC: recent and frequent, balanced by what misses teach", keep="arc"),
    "pregated": Preset(
        "Pre-gated MoE with perfect gates: LRU, and the next layer of the pass known (bound)",
        prefetch="pre-gate",
    ),
    "speculating-experts": Preset(
        "LRU, and what the next layer's gate said a layer early is what runs (lossy)",
        prefetch="next-gate",
        route="pre-gate",
    ),
    "fate": Preset(
        "Fate: the next layer's gate applied early, ARC by layer, the first layers held whole",
        keep="shallow-arc",
        prefetch="cross-gate",
    ),
    "moe-beyond": Preset(
        "MoE-Beyond: LRU, and a predictor over the request's tokens (fit one: moesim fit)",
        prefetch="token-net",
    ),
    "draft": Preset(
        "LRU, and a draft of the next token's experts at a stated recall (bound)",
        prefetch="draft",
    ),
    "cache-prior": Preset(
        "LRU, and routing leans towards what is resident (lossy)", route="cache-prior"
    ),
    "odds": Preset(
        "Ours: keeps and prefetches by counted chances of use; host and link share the misses",
        keep="reuse-odds",
        prefetch="pair-odds",
        miss="q-split",
    ),
    "finemoe": Preset(
        "FineMoE: maps of past iterations, by meaning and trajectory; evicts by p * freq",
        keep="map-frequency",
        prefetch="map-search",
    ),
    "finemoe-ts": Preset(
        "FineMoE's Map(T+S): the likeliest k of a layer, whatever the score",
        keep="map-frequency",
        prefetch="map-search",
        parameters={"prefetch.delta": False},
    ),
    "finemoe-t": Preset(
        "FineMoE's Map(T): the same without embeddings",
        keep="map-frequency",
        prefetch="map-trajectory",
        parameters={"prefetch.delta": False},
    ),
    "finemoe-hits": Preset(
        "FineMoE's Hit count: the same on whole requests' counts of uses",
        keep="map-frequency",
        prefetch="hit-count",
        parameters={"prefetch.delta": False},
    ),
    "cpu": Preset(
        "a fixed set; misses run on the host", keep="static", miss="cpu", initial="static"
    ),
    "fiddler": Preset(
        "a fixed set; misses are copied or run on the host, whichever is quicker",
        keep="static",
        miss="fiddler",
        initial="static",
    ),
    "ktransformers": Preset(
        "KTransformers: the most used experts, anew for each long prompt; misses run on the host",
        prefetch="placement",
        miss="cpu",
        initial="policy",
        parameters={"prefetch.dynamic": "prefill"},
    ),
    "hybrimoe": Preset(
        "HybriMoE: misses divided by a schedule, prefetches by impact, evicts the least liked",
        keep="recent-score",
        prefetch="impact",
        miss="hybrid-schedule",
    ),
    "q-split": Preset(
        "LRU; a layer's misses divided so that host and link finish together", miss="q-split"
    ),
    "reuse-break-even": Preset(
        "LFU with fading counts; misses run on the host unless a copy is used often enough",
        keep="lfu-decay",
        miss="reuse-break-even",
    ),
    "static-lru": Preset(
        "half of the cache pinned to the most used experts, LRU in the rest",
        keep="pinned-lru",
        initial="static",
    ),
    "adapmoe": Preset(
        "AdapMoE's lossless part: slots by layer, the first absent expert ahead prefetched",
        keep="layer-quota",
        prefetch="first-absent",
    ),
    "edgemoe": Preset(
        "EdgeMoE's lossless part: evicts by use and layer, prefetches what followed before",
        keep="layer-frequency",
        prefetch="layer-statistics",
    ),
    "moepic": Preset(
        "MoEpic: top halves of many experts rather than few whole ones (moesim trace parts)",
        keep="top-halves",
        prefetch="next-gate",
    ),
    "hobbit": Preset(
        "HOBBIT: what weighs little is loaded in low precision, what weighs least not at all "
        "(lossy)",
        keep="hobbit",
        prefetch="next-gate",
        route="mixed-precision",
    ),
    "swapmoe": Preset(
        "SwapMoE: tokens go to resident experts only, and the set follows the input (lossy)",
        keep="importance",
        prefetch="virtual-experts",
        route="masked",
        initial="policy",
    ),
    "prune-importance": Preset(
        "the most important experts on past requests, fixed; routing is masked (lossy)",
        keep="importance",
        prefetch="virtual-experts",
        route="masked",
        initial="policy",
        parameters=_STILL,
    ),
    "prune-magnitude": Preset(
        "the experts with the largest weights, fixed; routing is masked (lossy)",
        keep="importance",
        prefetch="virtual-experts",
        route="masked",
        initial="policy",
        parameters={**_STILL, "prefetch.initial": "magnitude"},
    ),
    "prune-random": Preset(
        "experts by chance, fixed; routing is masked (lossy)",
        keep="importance",
        prefetch="virtual-experts",
        route="masked",
        initial="policy",
        parameters={**_STILL, "prefetch.initial": "random"},
    ),
}
