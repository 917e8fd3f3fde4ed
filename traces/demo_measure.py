"""What a demo model knows and how it routes: held-out loss, and the laws of learned routing.

For every MoE layer, over the held-out text of all topics, as many tokens of each: entropy of the
gate, mutual information between expert and topic, overlap of consecutive tokens' experts, the
load's largest share against the mean, experts never chosen, and Jensen-Shannon divergence of the
loads between topics and within one. The same numbers of an untrained model of the same class are
the yardstick: an untrained attention stack averages its context, so it routes by topic a little and
repeats itself a lot, for no reason that training would keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moesim.traces.demo_shapes import PAD, Shape
from moesim.traces.demo_train import router_logits

Floats = npt.NDArray[np.float64]

ROWS: Final = 48
LENGTH: Final = 256
"""Held-out windows of each topic, and their tokens."""
_BATCH_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class Layer:
    """One MoE layer. Entropy is a share of ln(experts), information and divergence in bits."""

    stack: str
    gate_entropy: float
    topic_bits: float
    overlap: float
    largest_load: float
    dead_experts: int
    between_topics_bits: float
    within_topic_bits: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's held-out loss (nats a token) by topic, and its layers."""

    loss: dict[str, float]
    layers: tuple[Layer, ...]

    def mean(self, name: str) -> float:
        """The mean over layers of one of their numbers."""
        return float(np.mean([getattr(layer, name) for layer in self.layers]))


@dataclass(slots=True)
class _Routed:
    """One layer and topic: gate entropy, load of each half, overlap, each with its count."""

    entropy: float
    halves: Floats
    overlap: float


def measure(model: Any, shape: Shape, held: Mapping[str, Any]) -> Measured:
    """Run the model over each topic's held-out batch.

    `held` maps a topic to the model's arguments, two rows or more, whose first half of rows comes
    from other documents than the second half.
    """
    import torch

    model.eval()
    losses: dict[str, float] = {}
    by_topic: list[list[_Routed]] = []
    with router_logits(model) as routed, torch.no_grad():
        for topic, batch in held.items():
            losses[topic], gates, real = _run(model, batch, routed)
            by_topic.append([_summarise(g, r, shape) for g, r in zip(gates, real, strict=True)])
    layers = [list(topics) for topics in zip(*by_topic, strict=True)]
    half = len(layers) // 2
    names = ["encoder" if shape.pairs and i < half else "decoder" for i in range(len(layers))]
    return Measured(losses, tuple(_layer(n, t, shape) for n, t in zip(names, layers, strict=True)))


def _run(model: Any, batch: Mapping[str, Any], routed: list[Any]) -> tuple[float, Any, Any]:
    """Mean loss, and per layer the gate's logits (rows, length, experts) and which are real."""
    import torch

    rows, device = len(batch["input_ids"]), next(model.parameters()).device
    total, weight, parts = 0.0, 0, []
    for start in range(0, rows, _BATCH_ROWS):
        piece = {k: v[start : start + _BATCH_ROWS].to(device) for k, v in batch.items()}
        routed.clear()
        count = int((piece["labels"] >= 0).sum())
        total += float(model(**piece).loss) * count
        weight += count
        size = len(piece["input_ids"])
        parts.append([g.float().cpu().reshape(size, -1, g.shape[-1]) for g in routed])
    gates = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    return total / weight, gates, [_real(batch, gate.shape[1]) for gate in gates]


def _real(batch: Mapping[str, Any], length: int) -> Any:
    """Which places hold a token of the text or of the answer, not padding."""
    if batch["labels"].shape[1] == length and "attention_mask" in batch:
        return batch["labels"] >= 0
    return batch["input_ids"] != PAD


def _summarise(gate: Any, real: Any, shape: Shape) -> _Routed:
    import torch

    logs = gate.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)[real].mean()
    chosen = torch.zeros_like(gate).scatter_(-1, gate.topk(shape.top_k, -1).indices, 1.0)
    chosen *= real[..., None]
    both = (real[:, 1:] & real[:, :-1]).sum() * shape.top_k
    overlap = (chosen[:, 1:] * chosen[:, :-1]).sum() / both
    half = len(gate) // 2
    halves = torch.stack([chosen[:half].sum((0, 1)), chosen[half:].sum((0, 1))])
    return _Routed(float(entropy), halves.double().numpy(), float(overlap))


def _layer(stack: str, topics: Sequence[_Routed], shape: Shape) -> Layer:
    # Every topic counts alike, whatever its number of tokens.
    shares = np.stack([_share(t.halves.sum(0)) for t in topics])
    load = shares.mean(0)
    return Layer(
        stack=stack,
        gate_entropy=float(np.mean([t.entropy for t in topics])) / math.log(max(2, shape.experts)),
        topic_bits=divergence_bits(shares),
        overlap=float(np.mean([t.overlap for t in topics])),
        largest_load=float(load.max() / load.mean()),
        dead_experts=int((load == 0).sum()),
        between_topics_bits=_mean_pairs(shares),
        within_topic_bits=float(
            np.mean([divergence_bits(np.stack([_share(h) for h in t.halves])) for t in topics])
        ),
    )


def _share(counts: Floats) -> Floats:
    share: Floats = counts / counts.sum()
    return share


def _mean_pairs(shares: Floats) -> float:
    pairs = combinations(range(len(shares)), 2)
    return float(np.mean([divergence_bits(shares[list(pair)]) for pair in pairs] or [0.0]))


def divergence_bits(shares: Floats) -> float:
    """Jensen-Shannon divergence of equally weighted distributions (rows), bits.

    For the loads of topics this is the mutual information between expert and topic.
    """
    mean = shares.mean(0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * np.log2(shares / mean), 0.0)
    return float(terms.sum(1).mean())
