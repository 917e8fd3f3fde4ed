"""Named degradations: what a run may put in the place of a column that the trace lacks.

Each is asked for by name (``--allow``), and stamped on every result that rests on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.hashing import hash64
from moesim.traces.reader import RequestRows
from moesim.traces.schema import TraceMeta
from moesim.types import DROPPED, AnyArray, Needs

CHOICES = ("gate=topk", "embedding=none", "norms=unit", "prefill=decode", "ahead=recall:R@SEED")


@dataclass(frozen=True, slots=True)
class Recall:
    """Synthesised predictions: each true expert is named with probability ``rate``."""

    rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Allowed:
    """The degradations that a run accepts."""

    gate_from_topk: bool = False
    no_embedding: bool = False
    unit_norms: bool = False
    prefill_from_decode: bool = False
    """Tokens of a prompt that was not recorded take the routing of the decoded ones."""
    recall: Recall | None = None

    def names(self) -> list[str]:
        """As typed, in a fixed order."""
        names = [
            name
            for name, on in (
                ("gate=topk", self.gate_from_topk),
                ("embedding=none", self.no_embedding),
                ("norms=unit", self.unit_norms),
                ("prefill=decode", self.prefill_from_decode),
            )
            if on
        ]
        if self.recall is not None:
            rate = self.recall.rate
            # Other rates are other runs, however close.
            text = f"{rate:g}" if float(f"{rate:g}") == rate else repr(rate)
            names.append(f"ahead=recall:{text}@{self.recall.seed}")
        return names


def parse_allowed(texts: Sequence[str]) -> Allowed:
    """Read ``--allow`` values, each one or several with commas.

    Raises
    ------
    UsageError
        Naming the value and the choices.
    """
    recall = None
    flags = set()
    for text in (word.strip() for several in texts for word in several.split(",")):
        match = re.fullmatch(r"ahead=recall:([0-9.]+)(?:@([0-9]+))?", text)
        if match:
            recall = Recall(_rate(match[1], text), _seed(match[2] or "0", text))
        elif text in CHOICES[:-1]:
            flags.add(text)
        else:
            raise UsageError(f"--allow {text}: unknown; choose from {', '.join(CHOICES)}")
    return Allowed(
        gate_from_topk="gate=topk" in flags,
        no_embedding="embedding=none" in flags,
        unit_norms="norms=unit" in flags,
        prefill_from_decode="prefill=decode" in flags,
        recall=recall,
    )


def _seed(text: str, whole: str) -> int:
    if int(text) >= 1 << 63:
        raise UsageError(f"--allow {whole}: the seed must be below 2**63")
    return int(text)


def _rate(text: str, whole: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise UsageError(f"--allow {whole}: the recall must lie between 0 and 1")
    return rate


def recalled(
    rows: RequestRows,
    blocks: Sequence[int],
    layers: Sequence[int],
    distance: int,
    experts: int,
    recall: Recall,
) -> AnyArray:
    """Predictions for ``layer + distance`` at a stated recall, uint16 [rows, k].

    A true expert is kept with probability ``rate``; else an expert outside the true set takes its
    place. Where the target layer lies outside the forward pass, the row is ``DROPPED``.
    """
    target = _target_rows(rows, blocks, layers, distance)
    predicted = np.full(rows.experts.shape, DROPPED, np.uint16)
    known = np.flatnonzero(target >= 0)
    truth = rows.experts[target[known]].astype(np.int64)
    width = truth.shape[1]
    keyed: list[AnyArray | int] = [
        recall.seed, distance, rows.request, rows.iteration[known].astype(np.int64),
        rows.layer[known].astype(np.int64), rows.position[known].astype(np.int64),
    ]  # fmt: skip
    threshold = int(recall.rate * (1 << 53))
    taken = np.zeros((len(known), experts), bool)
    for rank in range(width):
        real = np.flatnonzero(truth[:, rank] != DROPPED)
        taken[real, truth[real, rank]] = True
    spare = experts - taken.sum(axis=1)
    for rank in range(width):
        draw = hash64(*keyed, rank) >> np.uint64(11)
        keep = (draw.astype(np.int64) < threshold) | (spare <= 0)
        choice = truth[:, rank].copy()
        wrong = np.flatnonzero(~keep & (choice != DROPPED))
        choice[wrong] = _untaken(taken[wrong], hash64(*[_at(k, wrong) for k in keyed], rank, 1))
        taken[wrong, choice[wrong]] = True
        spare[wrong] -= 1
        predicted[known, rank] = choice
    return predicted


def _at(part: AnyArray | int, where: AnyArray) -> AnyArray | int:
    return part if isinstance(part, int) else part[where]


def _untaken(taken: AnyArray, draw: AnyArray) -> AnyArray:
    """An expert that is not taken in each row, chosen by the draw."""
    free = np.cumsum(~taken, axis=1)
    rank = (draw % np.maximum(free[:, -1:].T[0], 1).astype(np.uint64)).astype(np.int64) + 1
    choice: AnyArray = (free >= rank[:, None]).argmax(axis=1)
    return choice


def _target_rows(
    rows: RequestRows, blocks: Sequence[int], layers: Sequence[int], distance: int
) -> AnyArray:
    """For each row, the row of the same token ``distance`` layers on, or -1."""
    starts = np.asarray(blocks[:-1], np.int64)
    ends = np.asarray(blocks[1:], np.int64)
    sizes = ends - starts
    layer = np.asarray(layers, np.int64)
    iteration = rows.iteration[starts] if len(starts) else np.empty(0, np.int64)
    there = np.arange(len(starts)) + distance
    inside = there < len(starts)
    there = np.where(inside, there, 0)
    fits = (
        inside
        & (iteration[there] == iteration)
        & (layer[there] == layer + distance)
        & (sizes[there] == sizes)
    )
    block = np.repeat(np.arange(len(starts)), sizes)
    offset = np.arange(len(block)) - starts[block]
    return np.where(fits[block], starts[there[block]] + offset, -1)


def lacking(
    needs: Needs, distances: Sequence[int], allowed: Allowed, meta: TraceMeta
) -> Iterator[tuple[str, str]]:
    """(what, how it may be allowed) for each input that is not there."""
    if Needs.PARTS in needs and meta.expert_parts == 1:
        yield "PARTS", "; `moesim trace parts` cuts its experts"
    if Needs.WEIGHTS in needs and not meta.has_weights:
        yield "WEIGHTS", ""
    if Needs.GATE in needs and not meta.has_gate:
        if not meta.has_weights:
            yield "GATE", ", and it has no weights to stand in"
        elif not allowed.gate_from_topk:
            yield "GATE", "; --allow gate=topk stands in"
    if Needs.AHEAD in needs and allowed.recall is None:
        for distance in distances:
            if distance not in meta.ahead:
                yield f"AHEAD ({distance})", "; --allow ahead=recall:0.8@1 stands in"
    if Needs.EMBEDDING in needs and meta.embedding == "none" and not allowed.no_embedding:
        yield "EMBEDDING", "; --allow embedding=none stands in"
    if Needs.NORMS in needs and lacks_norms(meta) and not allowed.unit_norms:
        yield "NORMS", "; --allow norms=unit stands in"


def lacks_norms(meta: TraceMeta) -> bool:
    """Whether norms of the layer inputs or of the experts are missing."""
    return not meta.has_norms or meta.expert_norms is None


def rested_on(needs: Needs, allowed: Allowed, meta: TraceMeta) -> list[str]:
    """The degradations that a run with these needs rests on, as typed."""
    used = []
    if Needs.GATE in needs and allowed.gate_from_topk and not meta.has_gate:
        used.append("gate=topk")
    if Needs.EMBEDDING in needs and allowed.no_embedding and meta.embedding == "none":
        used.append("embedding=none")
    if Needs.NORMS in needs and allowed.unit_norms and lacks_norms(meta):
        used.append("norms=unit")
    if Needs.AHEAD in needs and allowed.recall is not None:
        used.append(allowed.names()[-1])
    return used
