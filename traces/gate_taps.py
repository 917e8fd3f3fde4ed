"""Tap the gates of a model while it runs: hooks that take what `find_gates` knows to be there.

Nothing is patched: the taps are module hooks, all of which return None, for what a hook returns
would replace the output. They hold on to tensors that the model has made anyway, and copy them to
the host together, many forward passes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from moesim.errors import UsageError
from moesim.traces.gates import GateLayer, Gates, Place, first_tensor, prober, reader
from moesim.traces.schema import DROPPED

Tensor = Any
Module = Any
AnyArray = npt.NDArray[Any]

HELD_BYTES: Final = 64 << 20
"""So much of what was tapped may wait on the device before it is copied to the host."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to tap beside ids and weights."""

    logits: bool = False
    ahead: tuple[int, ...] = ()
    """Distances. 0 applies a layer's gate to its own input: the control of the probe."""
    norms: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Forwards:
    """What the gates of one stack did in T forward passes over N = batch x length rows each."""

    stack: str
    ids: AnyArray
    """uint16 [T, layers, N, K] in the model's order, `DROPPED` where capacity dropped the token."""
    weights: AnyArray
    """float32 [T, layers, N, K]."""
    logits: AnyArray | None
    """float16 [T, layers, N, E]."""
    ahead: Mapping[int, tuple[AnyArray, AnyArray]]
    """distance -> ids and weights as above, for the first (layers - distance) layers."""
    norms: AnyArray | None
    """float32 [T, layers, N]."""


class GateTaps:
    """Hooks on every gate, as a context manager; `take` hands over what they saw.

    A forward pass is complete when its last layer ran; one that broke off (`start` after an error)
    leaves nothing. Tensors wait on the device, stacked over the layers, and are copied to the host
    together. `ticked` is called with the rows of each pass. Raises `UsageError` where a gate shows
    no logits, or cannot be applied to another input, and `wanted` asks for it.
    """

    def __init__(
        self, gates: Gates, wanted: Wanted, ticked: Callable[[int], None] | None = None
    ) -> None:
        for layer in gates.layers:
            if wanted.ahead:
                _refuse_blind(layer)
            if wanted.logits:
                _refuse_silent(layer)
        self._ticked = ticked
        self._stacks = [_StackTaps(s, layers, wanted) for s, layers in gates.stacks.items()]
        self._handles: list[Any] = []

    def __enter__(self) -> GateTaps:
        for stack in self._stacks:
            self._handles += stack.attach(self._closed)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self) -> None:
        """Forget everything tapped so far."""
        self._waiting: list[tuple[str, dict[str, Tensor]]] = []
        self._bytes = 0
        self._forwards: list[Forwards] = []
        for stack in self._stacks:
            stack.clear()

    def take(self) -> list[Forwards]:
        """Return the complete forward passes since `start` or the last `take`, in order.

        Passes that follow each other and are alike come together; the cuts mean nothing.
        """
        self._flush()
        forwards, self._forwards = self._forwards, []
        return forwards

    def _closed(self, stack: str, tensors: dict[str, Tensor]) -> None:
        self._waiting.append((stack, tensors))
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._ticked is not None:
            self._ticked(tensors["ids"].shape[1])
        if self._bytes > HELD_BYTES:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        alike = groupby(waiting, key=lambda item: (item[0], item[1]["ids"].shape))
        for (stack, _), group in alike:
            self._forwards.append(_to_host(stack, [tensors for _, tensors in group]))


class _StackTaps:
    """The taps of one stack and what they hold of the forward pass under way."""

    def __init__(self, name: str, layers: tuple[GateLayer, ...], wanted: Wanted) -> None:
        self.name = name
        self._layers = layers
        self._wanted = wanted
        self._probers = [prober(layer) if wanted.ahead else None for layer in layers]
        self._reach = max(wanted.ahead, default=0)
        self.clear()

    def clear(self) -> None:
        """Forget the forward pass under way."""
        self._inputs: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._ahead: dict[int, tuple[list[Tensor], list[Tensor]]] = {
            distance: ([], []) for distance in self._wanted.ahead
        }

    def attach(self, closed: Callable[[str, dict[str, Tensor]], None]) -> Iterator[Any]:
        """Register the hooks of every layer; yield their handles."""
        for at, layer in enumerate(self._layers):
            yield from self._attach_layer(at, layer, closed)

    def _attach_layer(
        self, at: int, layer: GateLayer, closed: Callable[[str, dict[str, Tensor]], None]
    ) -> Iterator[Any]:
        read, seen = reader(layer.form, layer.top_k), Seen()
        wanted, places = self._wanted, [layer.ids, layer.weights]
        if wanted.logits and layer.logits is not None:
            places.append(layer.logits)
        by_experts = any(place.tap == "experts" for place in places)

        def finish() -> None:
            ids, weights = read(seen.get(layer.ids), seen.get(layer.weights), seen.rows)
            self._ids.append(ids)
            self._weights.append(weights)
            if wanted.logits and layer.logits is not None:
                self._logits.append(seen.get(layer.logits).reshape(seen.rows, layer.count))
            seen.forget()
            if at == len(self._layers) - 1:
                closed(self.name, self._close())

        def on_router(module: Module, args: Any, kwargs: Any, out: Any) -> None:
            if at == 0:
                self.clear()
            x = first_tensor(args, kwargs)
            # The probes below run the router's children again: what they made is kept first.
            seen.outputs, seen.linear = out, seen.latest
            seen.rows = x.numel() // x.shape[-1]
            if wanted.norms:
                norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
                self._norms.append(norm.reshape(-1))
            if wanted.ahead:
                self._look_ahead(at, layer, x, args, kwargs)
            if not by_experts:
                finish()

        def on_experts(module: Module, args: Any, kwargs: Any) -> None:
            seen.arguments = {**dict(enumerate(args)), **kwargs}
            finish()

        def on_linear(module: Module, args: Any, out: Any) -> None:
            seen.latest = out

        yield layer.router.register_forward_hook(on_router, with_kwargs=True)
        if by_experts:
            yield layer.experts.register_forward_pre_hook(on_experts, with_kwargs=True)
        if any(place.tap == "linear" for place in places):
            child = getattr(layer.router, str(layer.logits and layer.logits.key))
            yield child.register_forward_hook(on_linear)

    def _look_ahead(self, at: int, layer: GateLayer, x: Tensor, args: Any, kwargs: Any) -> None:
        """Apply this layer's gate to the inputs of the layers before it."""
        self._inputs.append(x if layer.keeps_input else x.clone())
        probe = self._probers[at]
        assert probe is not None
        for distance, (ids, weights) in self._ahead.items():
            if distance <= at:
                other = self._inputs[at - distance]
                found = probe(other.to(x.device), args, kwargs)
                ids.append(found[0])
                weights.append(found[1])
        if at >= self._reach:
            self._inputs[at - self._reach] = None

    def _close(self) -> dict[str, Tensor]:
        tensors = {"ids": _stacked(self._ids), "weights": _stacked(self._weights)}
        if self._logits:
            tensors["logits"] = self._as_logits(_stacked(self._logits))
        if self._norms:
            tensors["norms"] = _stacked(self._norms)
        for distance, (ids, weights) in self._ahead.items():
            if ids:
                tensors[f"ids{distance}"] = _stacked(ids)
                tensors[f"weights{distance}"] = _stacked(weights)
        self.clear()
        return tensors

    def _as_logits(self, values: Tensor) -> Tensor:
        if self._layers[0].as_logarithm:
            values = values.float().log()
        return values.half()


class Seen:
    """What the calls of one layer carried last; ``x``, its input, where somebody keeps it."""

    __slots__ = ("arguments", "latest", "linear", "outputs", "rows", "x")

    def __init__(self) -> None:
        self.rows = 0
        self.latest: Any = None
        self.forget()

    def forget(self) -> None:
        """Let go of the tensors."""
        self.outputs: Any = None
        self.arguments: Mapping[int | str, Any] = {}
        self.linear: Any = None
        self.x: Any = None

    def get(self, place: Place) -> Tensor:
        """Return the tensor at a place."""
        if place.tap == "experts":
            return self.arguments[place.key]
        if place.tap == "linear":
            return self.linear
        made = self.outputs
        return made[int(place.key)] if isinstance(made, (tuple, list)) else made


def _refuse_blind(layer: GateLayer) -> None:
    if layer.probe is None:
        raise UsageError(
            f"{type(layer.router).__name__} ({layer.name}) cannot be applied to another layer's "
            "input so that it chooses as it does in the model; record with --ahead none"
        )


def _refuse_silent(layer: GateLayer) -> None:
    if layer.logits is None:
        raise UsageError(
            f"{type(layer.router).__name__} ({layer.name}) shows no logits over all experts; "
            "record with --gate topk"
        )


def _stacked(tensors: list[Tensor]) -> Tensor:
    first = tensors[0].device
    if any(tensor.device != first for tensor in tensors):
        tensors = [tensor.cpu() for tensor in tensors]
    return torch.stack(tensors)


def _to_host(stack: str, passes: list[dict[str, Tensor]]) -> Forwards:
    host = {name: torch.stack([one[name] for one in passes]).cpu() for name in passes[0]}
    distances = [int(name[3:]) for name in host if name.startswith("ids") and name != "ids"]
    return Forwards(
        stack=stack,
        ids=_as_ids(host["ids"]),
        weights=host["weights"].float().numpy(),
        logits=host["logits"].numpy() if "logits" in host else None,
        ahead={
            d: (_as_ids(host[f"ids{d}"]), host[f"weights{d}"].float().numpy()) for d in distances
        },
        norms=host["norms"].numpy() if "norms" in host else None,
    )


def _as_ids(ids: Tensor) -> AnyArray:
    values: AnyArray = ids.numpy()
    return np.where(values < 0, DROPPED, values).astype(np.uint16)
