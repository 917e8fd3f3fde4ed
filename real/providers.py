"""What a policy may be told of a layer, from the model that is running.

The same values as a recorded trace would hold, through the same roundings: logits in float16,
weights in float16, predictions of the later layers' gates on this layer's input, all in the order
of the gate's weights. A policy cannot tell a live run from a replay of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moesim.errors import NotRunError, TraceError, UsageError
from moesim.real.errors import ExecutionError
from moesim.traces.gate_taps import Seen
from moesim.traces.gates import (
    GateLayer,
    Gates,
    Prober,
    find_blocks,
    find_gates,
    first_tensor,
    prober,
    reader,
)
from moesim.traces.reader import gate_probabilities
from moesim.traces.record_rows import by_weight, finite_logits, halves
from moesim.traces.schema import TraceMeta
from moesim.types import DROPPED, AnyArray, IntArray, Needs
from moesim.workload import Inputs, fixed_point

Tensor = Any
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a router."""


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """One layer's routing as a policy is told it: T rows, request by request.

    chosen : uint16 [T, k] by gate rank. weights, gate : int32 in 1/16384, or None.
    ahead : distance -> uint16 [T, k]. norms : int64 [T] in 1/16384, or None.
    """

    chosen: AnyArray
    weights: AnyArray | None = None
    gate: AnyArray | None = None
    ahead: Mapping[int, AnyArray] = field(default_factory=dict)
    norms: AnyArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """One layer's routing as the model executes it: N rows of the forward pass.

    ids : int64 [N, K] on the host, -1 where dropped. weights : [N, K] on the device.
    host_weights : float32 [N, K].
    """

    ids: IntArray
    weights: Tensor
    host_weights: AnyArray


class LiveGates:
    """Hooks on every gate of a model, and what they show of the layer under way.

    Raises
    ------
    NotRunError
        If the policy needs what the model's gates cannot tell.
    """

    def __init__(self, gates: Gates, calls: Mapping[int, Call], meta: TraceMeta) -> None:
        self.gates = gates
        self.layers = gates.layers
        self._meta = meta
        self._calls = calls
        self._seen = [Seen() for _ in gates.layers]
        self._readers = [reader(layer.form, layer.top_k) for layer in gates.layers]
        self._probers: dict[int, Prober] = {}
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Register the hooks."""
        for at, layer in enumerate(self.layers):
            self._handles += _hooks(layer, self._seen[at])

    def place(self, device: torch.device) -> None:
        """What routers were handed beside their input lies where the model does from now on."""
        self._calls = {key: _moved(call, device) for key, call in self._calls.items()}

    def detach(self) -> None:
        """Take them away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def refuse_blind(self, name: str, inputs: Inputs) -> None:
        """NotRunError naming the policy and the first thing that it needs and is not to be had."""
        needs = inputs.needs
        router = type(self.layers[0].router).__name__
        if Needs.GATE in needs:
            self._refuse_broken()
            if any(layer.logits is None for layer in self.layers):
                raise NotRunError(f"not run: {name} needs GATE, and {router} shows no logits")
            if not self._meta.score.startswith(("softmax", "sigmoid")):
                raise NotRunError(
                    f"not run: {name} needs GATE, and what {router} makes of its logits is not "
                    "understood"
                )
        if Needs.AHEAD in needs and any(layer.probe is None for layer in self.layers):
            raise NotRunError(
                f"not run: {name} needs AHEAD, and {router} cannot be applied to another layer's "
                "input"
            )
        if Needs.FUTURE in needs:
            raise NotRunError(f"not run: {name} needs FUTURE, which no live run has")

    def _refuse_broken(self) -> None:
        """UsageError for gates with NaN among their weights: nothing can be understood of them."""
        for layer in self.layers:
            if any(bool(weight.isnan().any()) for weight in layer.router.parameters()):
                raise UsageError(
                    f"{layer.name}: the weights of its gate hold NaN; see what is wrong with the "
                    "checkpoint"
                )

    # ---- the layer under way ---------------------------------------------------------------------

    def chosen(self, at: int, arguments: Mapping[int | str, Any]) -> Chosen:
        """What the gate of a layer chose; ``arguments``: those of the experts module."""
        layer, seen = self.layers[at], self._seen[at]
        seen.arguments = arguments
        ids, weights = self._readers[at](seen.get(layer.ids), seen.get(layer.weights), seen.rows)
        return Chosen(ids.cpu().numpy().astype(np.int64), weights, weights.float().cpu().numpy())

    def told(self, at: int, chosen: Chosen, rows: IntArray | None, inputs: Inputs) -> Told:
        """What a policy is told of some rows of a layer (all of them: None)."""
        cut = slice(None) if rows is None else rows
        ids = np.where(chosen.ids < 0, DROPPED, chosen.ids).astype(np.uint16)[cut]
        ordered, weights = by_weight(ids, chosen.host_weights[cut])
        if np.isnan(weights).any():
            raise ExecutionError(
                f"{self.layers[at].name}: the model's gate gave NaN; use --dtype float32, or see "
                "what is wrong with the weights"
            )
        needs = inputs.needs
        return Told(
            chosen=ordered,
            weights=_steps(halves(weights)) if Needs.WEIGHTS in needs else None,
            gate=self._gate(at, cut) if Needs.GATE in needs else None,
            ahead=self._ahead(at, cut, inputs.distances) if Needs.AHEAD in needs else {},
            norms=self._norms(at, cut) if Needs.NORMS in needs else None,
        )

    def logits(self, at: int, rows: IntArray | None) -> AnyArray:
        """float64 [T, E] as the gate made them, unrounded."""
        cut = slice(None) if rows is None else rows
        made: AnyArray = self._wide(at).double().cpu().numpy()[cut]
        return made

    def forget(self, at: int) -> None:
        """Let go of a layer's tensors."""
        self._seen[at].forget()

    # ---- inside ----------------------------------------------------------------------------------

    def _wide(self, at: int) -> Tensor:
        layer, seen = self.layers[at], self._seen[at]
        assert layer.logits is not None
        values = seen.get(layer.logits).reshape(seen.rows, layer.count)
        return values.float().log() if layer.as_logarithm else values

    def _gate(self, at: int, cut: Any) -> AnyArray:
        logits = finite_logits(self._wide(at).half().cpu().numpy()[cut])
        return _steps(gate_probabilities(logits, self._meta))

    def _norms(self, at: int, cut: Any) -> AnyArray:
        norm = torch.linalg.vector_norm(self._seen[at].x, dim=-1, dtype=torch.float32).reshape(-1)
        made: AnyArray = fixed_point(halves(norm.cpu().numpy()[cut]))
        return made

    def _ahead(self, at: int, cut: Any, distances: Sequence[int]) -> dict[int, AnyArray]:
        """The later gates on this layer's input; DROPPED where the stack has no such layer."""
        found = {}
        for distance in distances:
            later = at + distance
            ended = later >= len(self.layers) or self.layers[later].stack != self.layers[at].stack
            found[distance] = self._nothing(at, cut) if ended else self._probe(at, later, cut)
        return found

    def _nothing(self, at: int, cut: Any) -> AnyArray:
        made: AnyArray = np.full((self._seen[at].rows, self.gates.top_k), DROPPED, np.uint16)[cut]
        return made

    def _probe(self, at: int, later: int, cut: Any) -> AnyArray:
        if later not in self._probers:
            self._probers[later] = prober(self.layers[later])
        args, kwargs = self._calls[id(self.layers[later].router)]
        x = self._seen[at].x
        ids, weights = self._probers[later](x, args, kwargs)
        host = ids.cpu().numpy()
        named = np.where(host < 0, DROPPED, host).astype(np.uint16)
        made: AnyArray = by_weight(named, weights.float().cpu().numpy())[0][cut]
        return made


def _moved(call: Call, device: torch.device) -> Call:
    def there(value: Any) -> Any:
        return value.to(device) if torch.is_tensor(value) else value

    args, kwargs = call
    return tuple(map(there, args)), {name: there(value) for name, value in kwargs.items()}


def _steps(values: AnyArray) -> AnyArray:
    return fixed_point(values).astype(np.int32)


# ---- finding and hooking -------------------------------------------------------------------------


def find_live(model: Any, tokens: Sequence[int]) -> tuple[Gates, dict[int, Call]]:
    """The gates of a model, and by the id of each router the arguments of a call to it.

    A router may be handed more than its input; when it is asked about another layer's input, the
    rest is taken from that call.
    """
    calls: dict[int, Call] = {}

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(id(module), (args, kwargs))

    handles = [
        block.router.register_forward_pre_hook(keep, with_kwargs=True)
        for block in find_blocks(model)
    ]
    try:
        return find_gates(model, tokens), calls
    finally:
        for handle in handles:
            handle.remove()


def _hooks(layer: GateLayer, seen: Seen) -> Iterator[Any]:
    def on_router(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        x = first_tensor(args, kwargs)
        # A probe of this gate runs its child again: what the model's own call made is kept.
        seen.outputs, seen.linear = out, seen.latest
        seen.rows = x.numel() // x.shape[-1]
        seen.x = x if layer.keeps_input else x.clone()

    def on_linear(module: Any, args: Any, out: Any) -> None:
        seen.latest = out

    yield layer.router.register_forward_hook(on_router, with_kwargs=True)
    places = [layer.ids, layer.weights, *([layer.logits] if layer.logits else [])]
    child = next((place.key for place in places if place.tap == "linear"), None)
    if child is not None:
        yield getattr(layer.router, str(child)).register_forward_hook(on_linear)


def true_probabilities(logits: AnyArray, score: str) -> AnyArray:
    """float64 [T, E]: what the gate makes of its logits, before it chooses and scales.

    Raises
    ------
    TraceError
        For a score kind that has no rule.
    """
    if score.startswith("softmax"):
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: AnyArray = scores / scores.sum(axis=1, keepdims=True)
        return shares
    if score.startswith("sigmoid"):
        values: AnyArray = 0.5 + 0.5 * np.tanh(0.5 * logits)
        return values
    raise TraceError(f"no rule turns logits of score kind {score!r} into probabilities")
