"""A step of many requests as a block, by index arithmetic over one bank of recorded rows.

Where every forward pass has the same layers and as many tokens at each of them, the rows of a
request need no look-up: which one a token reads at a layer is arithmetic on a few numbers of the
request. Nothing of a recording is copied. The block equals that of ``BlockMaker`` in every number.
"""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Any

import numba
import numpy as np

from moesim.compiled import entry, load
from moesim.costs import Costs
from moesim.engine.fields import D, E, T
from moesim.types import DROPPED, AnyArray, Phase
from moesim.workload import Step, Work

DECODE = int(Phase.DECODE)


class F(IntEnum):
    """What is known of a request. Its rows lie in the bank layer by layer, pass by pass."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return count

    LEAD = auto()
    """1 if its first pass is a prefill."""
    PROMPT = auto()
    """Row of the prompt's first token at the first layer."""
    SIZE = auto()
    """Tokens after which the prompt's rows come again."""
    LAYER_STRIDE = auto()
    TOKEN_STRIDE = auto()
    """Rows from a prompt's token at a layer to that at the next one, and to the next token."""
    DECODED = auto()
    """Row of the first decoded token at the first layer."""
    PASSES = auto()
    """Decoded passes after which they come again."""
    DECODE_CONTEXT = auto()
    PROMPT_CONTEXT = auto()
    """Tokens in its KV cache, less the number of the pass, or of the prompt's tokens so far."""


class P(IntEnum):
    """A part of a step: of whom, which pass, which tokens."""

    SLOT, NUMBER, FIRST, LAST = range(4)


class Gatherer:
    """Makes the arrays of a block; they are the same ones at every step."""

    def __init__(self, costs: Costs, experts: int, *, cpu: bool) -> None:
        self._costs = costs
        self._experts = experts
        self._cpu = cpu
        self._slots: dict[int, int] = {}
        """By place of the request."""
        self._facts = np.zeros((64, len(F)), np.int64)
        self._bank: AnyArray | None = None
        self._layers: list[int] = []
        self._head: dict[int, int] = {}
        self._prices = np.zeros((2, 1, 1), np.int64)
        self._classes = np.zeros(1, np.int64)
        self._kinds: list[int] = []
        self._dense_kinds: list[int] = []
        self._dense_class = np.zeros(1, np.int64)
        self.events = np.zeros((0, len(E)), np.int64)
        self.demand = np.zeros((int(D.STATUS), 0), np.int64)
        self.ids = np.zeros(0, np.uint32)
        self.table = np.zeros((1, len(T)), np.int64)
        self._where = np.zeros(0, np.int64)
        self._sums = np.zeros(3, np.int64)

    def gather(self, step: Step) -> bool:
        """Fill the arrays with a step; False, and nothing done, if its requests do not allow it."""
        slots = self._slots
        try:
            parts = [(slots[w.index], n, first, last) for w, n, first, last, _, _ in step.parts]
        except KeyError:
            if not all(self._knows(part.work) for part in step.parts):
                return False
            parts = [(slots[w.index], n, first, last) for w, n, first, last, _, _ in step.parts]
        if step.padding or not parts:
            return False
        most = sum(last - first for _, _, first, last in parts)
        if most >= self._prices.shape[2]:
            self._price(most)
        sums, table = self._sums, self.table
        _fill(
            self._bank,
            self._facts,
            np.array(parts, np.int64),
            self._prices,
            self._classes,
            self.events,
            self.demand,
            self.ids,
            self._where,
            sums,
        )
        tokens, context, _ = sums.tolist()
        dense = [self._costs.dense_ns(tokens, context, layer) for layer in self._dense_kinds]
        events = self.events
        events[:, E.DENSE_NS] = dense[0] if len(dense) == 1 else np.take(dense, self._dense_class)
        events[:, E.STEP] = step.number
        ends = sum(part.ends for part in step.parts)
        if ends not in self._head:
            self._head[ends] = self._costs.head_ns(ends)
        table[0, T.LAST] = len(events)
        table[0, T.BEGINS] = any(part.begins for part in step.parts)
        table[0, T.HEAD_NS] = self._head[ends]
        return True

    # ---- what is known beforehand ----------------------------------------------------------------

    def _knows(self, work: Work) -> bool:
        """Learn a request, if it allows it."""
        if work.index in self._slots:
            return True
        if work.bank is None:
            return False
        if self._bank is None:
            self._begin(work)
        slot = self._slots[work.index] = len(self._slots)
        if slot == len(self._facts):
            self._facts = np.concatenate((self._facts, np.zeros_like(self._facts)))
        facts, layers = self._facts[slot], len(self._layers)
        recorded = len(work.passes) - 1 - work.lead
        prompt = work.pass_tokens[0] if work.lead else 0
        lead = int(work.phase(0) == Phase.PREFILL)
        facts[F.LEAD] = lead
        facts[F.PROMPT] = work.base
        facts[F.SIZE] = prompt or recorded
        facts[F.LAYER_STRIDE], facts[F.TOKEN_STRIDE] = (prompt, 1) if work.lead else (1, layers)
        facts[F.DECODED] = work.base + prompt * layers
        facts[F.PASSES] = max(1, recorded)
        if lead:
            facts[F.PROMPT_CONTEXT] = work.prompt_context(0)
        if work.iterations > lead:
            facts[F.DECODE_CONTEXT] = work.context_after(lead) - lead
        return True

    def _begin(self, work: Work) -> None:
        """The shapes, from the first request: the bank's others have the same."""
        self._bank = work.bank
        self._layers = work.block_layers[: work.passes[1]]
        layers, most = len(self._layers), len(self._layers) * self._experts
        self.events = np.zeros((layers, len(E)), np.int64)
        self.events[:, E.LAYER] = self._layers
        self.events[:, E.SIGHT] = -1
        self.demand = np.zeros((int(D.STATUS), most), np.int64)
        self.ids = np.zeros(most, np.uint32)
        self._where = np.zeros(self._experts, np.int64)
        alike, experts_alike = self._costs.alike[self._layers], self._costs.experts_alike
        kinds, self._dense_class = np.unique(alike, return_inverse=True)
        self._dense_kinds = kinds.tolist()
        kinds, self._classes = np.unique(experts_alike[self._layers], return_inverse=True)
        self._kinds = kinds.tolist()
        load(*load_gather_functions())

    def _price(self, tokens: int) -> None:
        """What an expert takes for so many tokens, on the device and on the host."""
        known, kinds = self._prices.shape[2], self._kinds
        most = max(256, 2 * tokens)
        prices = np.zeros((2, len(kinds), most), np.int64)
        if known > 1:
            prices[:, :, :known] = self._prices
        for row, layer in enumerate(kinds):
            for count in range(known if known > 1 else 0, most):
                prices[0, row, count] = self._costs.expert_ns(count, layer)
                if self._cpu:
                    prices[1, row, count] = self._costs.cpu_expert_ns(count, layer)
        self._prices = prices


def _fill_arrays(
    bank: Any,
    facts: Any,
    parts: Any,
    prices: Any,
    classes: Any,
    events: Any,
    demand: Any,
    ids: Any,
    where: Any,
    sums: Any,
) -> None:
    """The demand of a step, layer by layer, as ``workload.union`` orders it; in ``sums`` its
    tokens, their context, and the accesses."""
    layers, experts, k = len(events), len(where), bank.shape[1]
    tokens = 0
    context = 0
    for p in range(len(parts)):
        slot = parts[p, P.SLOT]
        tokens += parts[p, P.LAST] - parts[p, P.FIRST]
        if parts[p, P.NUMBER] == 0 and facts[slot, F.LEAD]:
            context += facts[slot, F.PROMPT_CONTEXT] + parts[p, P.LAST]
        else:
            context += facts[slot, F.DECODE_CONTEXT] + parts[p, P.NUMBER]
    first_phase = 0 if parts[0, P.NUMBER] == 0 and facts[parts[0, P.SLOT], F.LEAD] else DECODE
    n = 0
    for layer in range(layers):
        begin = n
        where[:] = -1
        decoding = 0
        for p in range(len(parts)):
            slot = parts[p, P.SLOT]
            number = parts[p, P.NUMBER]
            if number == 0 and facts[slot, F.LEAD]:
                phase = 0
                size = facts[slot, F.SIZE]
                stride = facts[slot, F.TOKEN_STRIDE]
                head = facts[slot, F.PROMPT] + layer * facts[slot, F.LAYER_STRIDE]
            else:
                phase = DECODE
                size = 1
                stride = 0
                at = (number - facts[slot, F.LEAD]) % facts[slot, F.PASSES]
                head = facts[slot, F.DECODED] + at * layers + layer
            at = parts[p, P.FIRST] % size
            for _ in range(parts[p, P.FIRST], parts[p, P.LAST]):
                row = head + at * stride
                at += 1
                if at == size:
                    at = 0
                for rank in range(k):
                    expert: Any = np.int64(bank[row, rank])
                    if expert == DROPPED:
                        continue
                    if where[expert] >= 0:
                        demand[D.TOKENS, where[expert]] += 1
                        continue
                    where[expert] = n
                    demand[D.EXPERT, n] = expert + events[layer, E.LAYER] * experts
                    ids[n] = demand[D.EXPERT, n]
                    demand[D.TOKENS, n] = 1
                    demand[D.PHASE, n] = phase
                    decoding += phase
                    n += 1
        kind = classes[layer]
        for i in range(begin, n):
            demand[D.NS, i] = prices[0, kind, demand[D.TOKENS, i]]
            demand[D.CPU_NS, i] = prices[1, kind, demand[D.TOKENS, i]]
        events[layer, E.FIRST] = begin
        events[layer, E.COUNT] = n - begin
        events[layer, E.PHASE] = first_phase
        events[layer, E.MIXED] = decoding > 0 and decoding < (n - begin) * DECODE
    sums[0] = tokens
    sums[1] = context
    sums[2] = n


_fill = entry(_fill_arrays)


def load_gather_functions() -> list[tuple[Any, Any]]:
    """What Python calls here, and the types that it calls it with."""
    flat, table = numba.int64[::1], numba.int64[:, ::1]
    types = (
        numba.uint16[:, ::1], table, table, numba.int64[:, :, ::1], flat, table, table,
        numba.uint32[::1], flat, flat,
    )  # fmt: skip
    return [(_fill, types)]
