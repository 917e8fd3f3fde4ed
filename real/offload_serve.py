"""Serving a model that routes by its own gates: a ``Server`` that learns of its work as it comes.

The rules are those of every run on lanes (``moesim.serving``). What differs is where steps and
layer events come from: the model's thread brings them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moesim.policies.masked_gate import gate_values
from moesim.real.experts_parcel import Experts
from moesim.real.offload_lanes import OffloadLanes
from moesim.real.providers import Chosen, Told
from moesim.serving import Server
from moesim.traces.reader import RequestFacts, RequestRows
from moesim.types import (
    DROPPED,
    NEVER,
    AnyArray,
    Gate,
    IntArray,
    LayerEvent,
    Phase,
    Plan,
    Slot,
    State,
)
from moesim.workload import Item, Part, Step, Work, fixed_point, union

Tensor = torch.Tensor
RESIDENT = int(State.RESIDENT)


# ---- what the model brings -----------------------------------------------------------------------


class LiveRequest(Work):
    """A sequence that is being generated: it has as many forward passes as it turns out to have."""

    def __init__(self, index: int, request: int, prompt_tokens: int) -> None:
        nothing = np.zeros(0, np.int32)
        rows = RequestRows(
            request=request,
            starts=np.zeros(1, np.int64),
            iteration=nothing,
            position=nothing,
            layer=nothing.astype(np.int16),
            phase=nothing.astype(np.uint8),
            experts=np.zeros((0, 1), np.uint16),
            facts=RequestFacts(prompt_tokens=prompt_tokens),
        )
        super().__init__(
            index=index,
            rows=rows,
            arrival_ns=None,
            blocks=[0],
            block_layers=[],
            passes=[0],
            pass_tokens=[],
            bounds=np.zeros(1, np.int64),
            layers=np.zeros(0, np.int64),
        )
        self.ended = False
        self.embeddings: dict[int, AnyArray] = {}
        """Forward pass -> float16 [d]."""

    @property
    def iterations(self) -> int:
        """How many forward passes it has had, once it has ended."""
        return len(self.pass_tokens) if self.ended else NEVER

    def iteration(self, number: int) -> int:
        """Number of a forward pass."""
        return number

    def phase(self, number: int) -> Phase:
        """The first pass is the prefill."""
        return Phase.DECODE if number else Phase.PREFILL

    def prompt_embedding(self) -> AnyArray | None:
        """None: the embedding belongs to the first pass."""
        return None

    def embedding(self, number: int) -> AnyArray | None:
        """int32 [d] of a pass, in 1/16384, or None."""
        found = self.embeddings.pop(number, None)
        return None if found is None else fixed_point(found).astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Whose rows a module of experts gets.

    count : all rows, padding and finished sequences included.
    taken : those that are served, request by request; None: all.
    """

    count: int
    taken: IntArray | None
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """A forward pass begins. ``parts``: the requests that it serves, and the number of their pass.

    idle : sequences of the batch that have ended.
    """

    parts: tuple[tuple[LiveRequest, int], ...]
    idle: int


class LayerCall:
    """A layer's experts are asked for: rows in, and each expert's share of the output.

    The sum is made last, in the order of the library's own loop, so that it does not matter which
    expert came first, and the result is the same bit for bit.
    """

    def __init__(
        self,
        layer: int,
        experts: Experts,
        hidden: Tensor,
        chosen: Chosen,
        told: Told,
        rows: Rows,
        logits: AnyArray | None = None,
    ) -> None:
        self.layer = layer
        self.told = told
        self.rows = rows
        self.logits = logits
        self._experts = experts
        self._hidden = hidden
        self._ids = chosen.ids
        self._weights = chosen.weights
        self._order: tuple[Tensor, IntArray] | None = None
        self._shares: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def taken(self) -> Any:
        """Index of the rows that are served."""
        return slice(None) if self.rows.taken is None else self.rows.taken

    def bend(self, executed: AnyArray, values: AnyArray) -> None:
        """Other experts, with other weights: uint16 and float64 [T, k], as ``told.chosen``."""
        changed = (executed != self.told.chosen).any(axis=1)
        at = np.arange(len(self._ids))[self.taken][changed]
        ids = executed[changed].astype(np.int64)
        self._ids = self._ids.copy()
        self._ids[at] = np.where(ids == DROPPED, -1, ids)
        new = torch.from_numpy(values[changed]).to(self._weights.device, self._weights.dtype)
        self._weights = self._weights.clone()
        self._weights[torch.from_numpy(at).to(self._weights.device)] = new

    def compute(self, expert: int, weights: Mapping[str, Tensor]) -> None:
        """An expert's share: all rows that chose it, those of padding too (they are free then)."""
        at, by = self._rows_of(expert)
        # Experts that the host computes lie there, whatever the model's device is.
        where = next(iter(weights.values())).device
        with torch.no_grad():
            made = self._experts.compute(self._hidden[at].to(where), weights)
            self._shares[expert] = (at, made.to(at.device) * self._weights[at, by, None])

    def sum(self) -> Tensor:
        """[N, hidden]; rows whose experts nobody else asked for stay zero."""
        total = torch.zeros_like(self._hidden)
        with torch.no_grad():
            for _, (at, share) in sorted(self._shares.items(), key=lambda item: item[0]):
                total.index_add_(0, at, share.to(total.dtype))
        return total

    def _rows_of(self, expert: int) -> Tensor:
        """(rows, ranks) that chose an expert, by rank and then row, as the library has them: int64
        [2, n], a part of what has come to the device at once for all experts."""
        if self._order is None:
            flat = self._ids.T.reshape(-1)
            order = np.argsort(flat, kind="stable")
            place, token = np.divmod(order, len(self._ids))
            there = torch.from_numpy(np.stack([token, place])).to(self._hidden.device)
            self._order = there, flat[order]
        there, flat = self._order
        first, last = np.searchsorted(flat, (expert, expert + 1))
        return there[:, first:last]


# ---- serving it ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bending:
    """How a lossy policy's choice is weighed.

    probabilities : logits [T, E] -> what the gate makes of them. variant : A, B or C
    (``moesim.policies.masked_gate``). scale : the model's factor.
    """

    probabilities: Callable[[AnyArray], AnyArray]
    normalised: bool
    scale: float
    variant: str
    routable: Callable[[int], AnyArray] | None = field(default=None)


class LiveServer(Server):
    """Serves one model as it generates.

    ``rested`` is called whenever a batch has ended and the clock stands still; between two passes
    too where ``wants_rest`` says so and nothing moves on the link.
    """

    lanes: OffloadLanes

    def __init__(
        self, *args: Any, bending: Bending | None = None,
        rested: Callable[[], None] = lambda: None,
        wants_rest: Callable[[], bool] = lambda: False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._bending = bending
        self._rested = rested
        self._wants_rest = wants_rest
        self._steps = 0

    def serve(self) -> None:
        """Serve batch after batch, until the model's thread says that none will come."""
        self._begun = True
        self._fill()
        self.lanes.rest()
        while (begun := self.lanes.answer_door()) is not None:
            self.lanes.resume()
            while begun is not None:
                self._live_step(begun)
                begun = self.lanes.arrived
                if begun is not None and self._wants_rest() and not self.loads.sending:
                    self._rest()
                    self.lanes.resume()
            self._rest()
            self.lanes.released()
        self.lanes.resume()
        self._finish()

    def _rest(self) -> None:
        """The clock stands still from here on."""
        self._spend("plan", self.now())
        self.lanes.rest()
        self.lanes.layer = None
        self._rested()

    def _live_step(self, begun: Pass) -> None:
        parts = tuple(
            Part(work, number, 0, work.pass_tokens[number], True, True)
            for work, number in begun.parts
        )
        self._step(Step(self._steps, parts, begun.idle))
        self._steps += 1

    def _forward(self, step: Step) -> None:
        tokens = sum(part.last for part in step.parts) + step.padding
        while True:
            # Where the model will arrive, it alone knows; the layer is told for the timeline.
            self._compute_dense(self._layer, tokens, ())
            call = self.lanes.arrived
            if not isinstance(call, LayerCall):
                if self.lanes.steady:
                    # All that was planned in a pass is there when it ends, before the next plan.
                    self._wait(lambda: not self.loads.sending)
                return
            self._live_event(step, call)

    def _live_event(self, step: Step, call: LayerCall) -> None:
        self._layer = call.layer
        self.lanes.layer = call
        gate, plan = self.gate(self._item(step, call))
        if self.policy.lossy:
            self._bend(call, gate, plan)
        self._serve(gate, plan)

    def _item(self, step: Step, call: LayerCall) -> Item:
        told = call.told
        source = LayerEvent(
            event=self.tally.events,
            step=step.number,
            layer=call.layer,
            slots=call.rows.slots,
            token_experts=told.chosen,
            weights=told.weights,
            gate=told.gate,
            ahead=told.ahead,
            norms=told.norms,
        )
        return Item(source, union(source, self.world.experts), call.rows.count, 0)

    def _bend(self, call: LayerCall, gate: Gate, plan: Plan) -> None:
        executed = self.answers.executed(gate, plan)
        chosen = call.told.chosen
        if np.array_equal(executed, chosen):
            return
        how = self._bending
        assert how is not None and call.logits is not None
        values = gate_values(
            how.probabilities(call.logits),
            chosen,
            executed,
            self._routable(call.layer),
            how.variant,
            normalised=how.normalised,
        )
        call.bend(executed, values * how.scale)

    def _routable(self, layer: int) -> AnyArray:
        """bool [E]: what the policy lets tokens go to."""
        how = self._bending
        if how is not None and how.routable is not None:
            return how.routable(layer)
        own = slice(layer * self.world.experts, (layer + 1) * self.world.experts)
        here: AnyArray = self.ledger.state[own] == RESIDENT
        return here


def rows_of(requests: Sequence[LiveRequest], numbers: Sequence[int], mask: AnyArray) -> Rows:
    """Whose rows are those of a batch [B, T]; ``numbers``: which sequences are still served.

    mask : bool [B, T], False for padding.
    """
    length = mask.shape[1]
    slots, taken, first = [], [], 0
    for number in numbers:
        at = np.flatnonzero(mask[number]) + number * length
        work = requests[number]
        this = len(work.pass_tokens) - 1
        slots.append(Slot(work.rows.request, this, work.phase(this), first, len(at)))
        taken.append(at)
        first += len(at)
    whole = first == mask.size
    return Rows(mask.size, None if whole else np.concatenate(taken), tuple(slots))
