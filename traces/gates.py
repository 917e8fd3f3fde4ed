"""Find the gates of a HuggingFace MoE model, and how they are read.

There is no table of families. A MoE layer is a module with a child that holds experts and a child
that routes to them. What the calls between them carry (ids, weights, logits) is worked out from one
forward pass over a few real tokens (`find_gates`), by data type, shape and content, never by
position: positions moved between releases of transformers. Where that fails the model is refused by
the name of its class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from moesim.errors import UsageError
from moesim.traces.scores import TOLERANCES, Score, explain

Tensor = Any
Module = Any

ROUTER_CLASS: Final = re.compile(r"(Router|Gate|Gating)$")
EXPERTS_CLASS: Final = re.compile(r"Experts$")
COUNT_NAMES: Final = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
PROBE_TOKENS: Final = 13
"""Tokens of the pass that tells the layers apart; a prime, so that shapes are not confused."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's calls hold a tensor."""

    tap: str
    """`router` (an output), `experts` (an argument) or `linear` (output of a router's child)."""
    key: int | str


@dataclass(frozen=True, slots=True)
class Probe:
    """How a gate is applied to another input than its own."""

    way: str
    """`router`: its outputs hold the choice; `block`: `route_tokens_to_experts` of its logits;
    `topk`: the largest logits."""
    first: int
    """Position of the ids (`router`) or of the logits among the router's outputs."""
    second: int = 0
    """Position of the weights (`router`)."""


@dataclass(frozen=True, slots=True, eq=False)
class GateLayer:
    """One MoE layer, and how its routing is read."""

    name: str
    stack: str
    block: Module
    router: Module
    experts: Module
    count: int
    """Routed experts, E."""
    top_k: int
    form: str
    """`ids`: chosen ids and their weights; `mask`: 0/1 [rows, E], top-1; `scores`: weights [rows,
    E], zero where not chosen."""
    ids: Place
    weights: Place
    logits: Place | None
    as_logarithm: bool
    """The router hands out probabilities; their logarithm is recorded."""
    probe: Probe | None
    """How the gate is applied to another input; None: it cannot be."""
    keeps_input: bool
    """The model leaves the router's input as it was; else it must be copied."""
    scores: tuple[Score, ...]
    """What explains its weights, the likeliest first."""


@dataclass(frozen=True, slots=True, eq=False)
class Gates:
    """The MoE layers of a model in the order in which they run, encoder first."""

    layers: tuple[GateLayer, ...]
    cache: Any
    """The key-value cache after a pass over a few tokens; None if there is none."""

    @property
    def stacks(self) -> dict[str, tuple[GateLayer, ...]]:
        """Return name -> layers, encoder first."""
        names = dict.fromkeys(layer.stack for layer in self.layers)
        return {name: tuple(la for la in self.layers if la.stack == name) for name in names}

    @property
    def experts(self) -> int:
        """Routed experts of a layer, E."""
        return self.layers[0].count

    @property
    def top_k(self) -> int:
        """Experts of a token, K."""
        return self.layers[0].top_k

    @property
    def score(self) -> Score:
        """The score function that explains the weights of every layer; unknown if none does."""
        for score in self.layers[0].scores:
            if all(score in layer.scores for layer in self.layers):
                return score
        return Score("unknown")


# ---- finding -------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Block:
    """A module with experts and a router beside them."""

    name: str
    module: Module
    router: Module
    experts: Module
    count: int


@dataclass(slots=True, eq=False)
class _Call:
    """What one layer's calls carried in the calibrating pass."""

    block: Block
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    input_copy: Tensor
    times: int = 1
    experts: dict[int | str, Any] = field(default_factory=dict)
    linear: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Tokens that the router saw."""
        return int(self.input_copy.numel() // self.input_copy.shape[-1])

    def tensors(self, tap: str) -> Iterator[tuple[Place, Tensor]]:
        """Yield each tensor of a tap as [rows, width]."""
        held: dict[Any, Any] = self.experts if tap == "experts" else dict(self.linear)
        if tap == "router":
            held = dict(enumerate(outputs(self.outputs)))
        for key, value in held.items():
            if torch.is_tensor(value) and value.dim() and value.numel() % self.rows == 0:
                yield Place(tap, key), value.detach().reshape(self.rows, -1)


def find_gates(model: Module, tokens: Sequence[int]) -> Gates:
    """Work out how the model routes, from one forward pass over `tokens` (repeated as needed).

    Raises `UsageError` naming the class for a model that is not MoE or routes in a way that is not
    understood.
    """
    blocks = list(find_blocks(model))
    if not blocks:
        raise UsageError(
            f"{type(model).__name__} is not a Mixture-of-Experts model that can be recorded: no "
            "router was found beside a module of experts; pass the --model of one that is"
        )
    calls, cache = _calibrate(model, blocks, tokens)
    if not calls:
        raise UsageError(f"{type(model).__name__}: no router ran; it cannot be recorded")
    encoder = encoder_modules(model)
    layers = [_read_call(model, call, encoder) for call in calls]
    layers.sort(key=lambda layer: layer.stack == "decoder")
    _refuse_uneven(model, layers)
    return Gates(tuple(layers), cache)


def find_blocks(model: Module) -> Iterator[Block]:
    """Yield every module that has experts and a router beside them, run or not."""
    for name, module in model.named_modules():
        children = dict(module.named_children())
        experts = children.get("experts") or next(
            (c for c in children.values() if EXPERTS_CLASS.search(type(c).__name__)), None
        )
        if experts is None:
            continue
        named = [c for c in children.values() if ROUTER_CLASS.search(type(c).__name__)]
        router = named[0] if named else children.get("gate") or children.get("router")
        if router is None:
            continue
        count = _count(experts, router, module)
        if count is not None:
            yield Block(name, module, router, experts, count)


def _count(*modules: Module) -> int | None:
    experts = modules[0]
    if isinstance(experts, (torch.nn.ModuleDict, torch.nn.ModuleList)):
        return len(experts)
    for module in modules:
        for name in COUNT_NAMES:
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    fused = [p.shape[0] for p in experts.parameters() if p.dim() == 3]
    return fused[0] if fused else None


def is_encoder_decoder(model: Module) -> bool:
    """Whether prompts go to an encoder and the decoder begins on its own."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def input_device(model: Module) -> Any:
    """Return where token ids go; a part that lies elsewhere fetches them itself."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def encoder_modules(model: Module) -> set[int]:
    """Return the ids of all modules of the encoder; none without one."""
    if not is_encoder_decoder(model):
        return set()
    return {id(module) for module in model.get_encoder().modules()}


def _calibrate(
    model: Module, blocks: list[Block], tokens: Sequence[int]
) -> tuple[list[_Call], Any]:
    """Run a few tokens through the model; return the calls in order, and the cache."""
    calls: dict[int, _Call] = {}
    handles = [handle for block in blocks for handle in _calibrating_hooks(block, calls)]
    repeats = -(-PROBE_TOKENS // max(1, len(tokens)))
    ids = torch.tensor([(list(tokens) * repeats)[:PROBE_TOKENS]], device=input_device(model))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with torch.no_grad():
            if is_encoder_decoder(model):
                encoded = model.get_encoder()(**inputs)
                inputs = {"encoder_outputs": encoded, "decoder_input_ids": ids}
            out = model(**inputs, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    for call in calls.values():
        if call.times > 1:
            raise _not_understood(model, call, f"it runs {call.times} times in one forward pass")
    return list(calls.values()), getattr(out, "past_key_values", None)


def _calibrating_hooks(block: Block, calls: dict[int, _Call]) -> Iterator[Any]:
    # The router may be entered before its linear child is seen to belong to a call.
    linear: dict[str, Any] = {}

    def on_linear(name: str) -> Callable[..., None]:
        def hook(module: Module, args: Any, out: Any) -> None:
            linear[name] = out

        return hook

    def on_router(module: Module, args: Any, kwargs: Any, out: Any) -> None:
        if id(block) in calls:
            calls[id(block)].times += 1
            return
        copy = first_tensor(args, kwargs).detach().clone()
        calls[id(block)] = _Call(block, args, kwargs, out, copy, linear=linear)

    def on_experts(module: Module, args: Any, kwargs: Any) -> None:
        if id(block) in calls:
            calls[id(block)].experts = {**dict(enumerate(args)), **kwargs}

    for name, child in block.router.named_children():
        if isinstance(child, torch.nn.Linear) and child.out_features == block.count:
            yield child.register_forward_hook(on_linear(name))
    yield block.router.register_forward_hook(on_router, with_kwargs=True)
    yield block.experts.register_forward_pre_hook(on_experts, with_kwargs=True)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a call: its first argument that is a tensor."""
    return args[0] if args else next(v for v in kwargs.values() if torch.is_tensor(v))


def outputs(out: Any) -> tuple[Any, ...]:
    """Return a module's outputs as a tuple, one or many."""
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _not_understood(model: Module, call: _Call, why: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__}: how {type(call.block.router).__name__} routes to "
        f"{type(call.block.experts).__name__} ({call.block.name}) is not understood: {why}; this "
        "model cannot be recorded"
    )


# ---- what a call carries -------------------------------------------------------------------------


def _read_call(model: Module, call: _Call, encoder: set[int]) -> GateLayer:
    chosen = _find_ids(call) or _find_mask(call) or _find_scores(call)
    if chosen is None:
        raise _not_understood(model, call, "no chosen experts were found in its calls")
    form, ids, weights = chosen
    read = reader(form, _top_k(call, form, ids))
    true_ids, true_weights = read(_held(call, ids), _held(call, weights), call.rows)
    logits, as_logarithm, scores = _find_logits(call, true_ids, true_weights)
    block = call.block
    layer = GateLayer(
        name=block.name,
        stack="encoder" if id(block.module) in encoder else "decoder",
        block=block.module,
        router=block.router,
        experts=block.experts,
        count=block.count,
        top_k=int(true_ids.shape[1]),
        form=form,
        ids=_same_in_router(call, ids),
        weights=_same_in_router(call, weights),
        logits=logits,
        as_logarithm=as_logarithm,
        probe=None,
        keeps_input=bool(torch.equal(first_tensor(call.args, call.kwargs), call.input_copy)),
        scores=scores,
    )
    return replace(layer, probe=_find_probe(layer, call, true_ids, true_weights))


def _find_ids(call: _Call) -> tuple[str, Place, Place] | None:
    """Look for whole numbers that are distinct experts in each row, and a weight for each."""
    for tap in ("experts", "router"):
        for place, values in call.tensors(tap):
            if values.is_floating_point() or not 1 <= values.shape[1] <= call.block.count:
                continue
            if _are_experts(values, call.block.count):
                weights = _find_weights(call, tap, values.shape[1])
                if weights is not None:
                    return "ids", place, weights
    return None


def _are_experts(values: Tensor, count: int) -> bool:
    if values.dtype == torch.bool or int(values.min()) < 0 or int(values.max()) >= count:
        return False
    ordered = values.sort(dim=1).values
    return not bool((ordered[:, 1:] == ordered[:, :-1]).any())


def _find_weights(call: _Call, tap: str, width: int) -> Place | None:
    for source in dict.fromkeys((tap, "router")):
        for place, values in call.tensors(source):
            is_input = source == "experts" and values.shape[1] == call.input_copy.shape[-1]
            if values.is_floating_point() and values.shape[1] == width and not is_input:
                return place
    return None


def _find_mask(call: _Call) -> tuple[str, Place, Place] | None:
    """Look for a 0/1 matrix that sends each token to one expert or none."""
    for tap in ("experts", "router"):
        for place, values in call.tensors(tap):
            if values.is_floating_point() or values.shape[1] != call.block.count:
                continue
            if int(values.min()) >= 0 and int(values.sum(dim=1).max()) == 1:
                weights = _find_weights(call, tap, 1)
                if weights is not None:
                    return "mask", place, weights
    return None


def _find_scores(call: _Call) -> tuple[str, Place, Place] | None:
    """Look for weights of all experts, zero but for the chosen."""
    top_k = getattr(call.block.router, "top_k", None)
    for place, values in call.tensors("router"):
        if values.is_floating_point() and values.shape[1] == call.block.count:
            per_row = (values != 0).sum(dim=1)
            if isinstance(top_k, int) and top_k < call.block.count and (per_row == top_k).all():
                return "scores", place, place
    return None


def _top_k(call: _Call, form: str, ids: Place) -> int:
    if form == "mask":
        return 1
    if form == "scores":
        return int(call.block.router.top_k)
    return next(int(v.shape[1]) for p, v in call.tensors(ids.tap) if p == ids)


def _held(call: _Call, place: Place) -> Tensor:
    if place.tap == "experts":
        return call.experts[place.key]
    if place.tap == "linear":
        return call.linear[str(place.key)]
    return outputs(call.outputs)[int(place.key)]


def _same_in_router(call: _Call, place: Place) -> Place:
    """Return the router's output that is this very tensor, if there is one: one hook less."""
    held = _held(call, place)
    for index, value in enumerate(outputs(call.outputs)):
        if value is held:
            return Place("router", index)
    return place


Reader = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(ids as held, weights as held, rows) -> ids int64 [rows, K] (-1 = dropped), weights [rows, K]."""


def reader(form: str, top_k: int) -> Reader:
    """Return a function that reads ids and weights as a `GateLayer` of this form holds them."""

    def read_ids(ids: Tensor, weights: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        return ids.reshape(rows, top_k), weights.reshape(rows, top_k)

    def read_mask(mask: Tensor, weights: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        most, ids = mask.reshape(rows, -1).max(dim=1, keepdim=True)
        kept = most != 0
        return torch.where(kept, ids, -1), torch.where(kept, weights.reshape(rows, 1), 0)

    def read_scores(scores: Tensor, _: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        weights, ids = scores.reshape(rows, -1).topk(top_k, dim=1)
        return ids, weights

    return {"ids": read_ids, "mask": read_mask, "scores": read_scores}[form]


def _find_logits(
    call: _Call, ids: Tensor, weights: Tensor
) -> tuple[Place | None, bool, tuple[Score, ...]]:
    """Return where the logits are, whether their logarithm is meant, and what they explain."""
    wide = [
        (place, values)
        for tap in ("router", "linear")
        for place, values in call.tensors(tap)
        if values.is_floating_point() and values.shape[1] == call.block.count
    ]
    shares = [(place, values.float().log(), True) for place, values in wide if _are_shares(values)]
    tried = [*((place, values, False) for place, values in wide), *shares]
    for place, values, as_logarithm in tried:
        scores = _explained(call, values, ids, weights)
        if scores:
            return place, as_logarithm, scores
    # Nothing explains the weights: what sums to 1 is then taken for probabilities.
    likely = [*shares, *tried]
    return (likely[0][0], likely[0][2], ()) if likely else (None, False, ())


def _are_shares(values: Tensor) -> bool:
    sums = values.float().sum(dim=1)
    return bool((values >= 0).all() and (sums - 1).abs().max() < 1e-2)


def _explained(call: _Call, logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Score, ...]:
    jitter = getattr(call.block.router, "router_jitter_noise", None)
    factor = getattr(call.block.router, "routed_scaling_factor", None)
    kind = str(weights.dtype).removeprefix("torch.")
    return explain(
        logits.double().cpu().numpy(),
        ids.cpu().numpy(),
        weights.double().cpu().numpy(),
        tolerance=max(TOLERANCES.get(kind, 1e-2), _logit_tolerance(logits)),
        biased=_has_bias(call),
        factor=float(factor) if isinstance(factor, (int, float)) and factor > 0 else 1.0,
        jitter=float(jitter) if isinstance(jitter, float) else None,
    )


def _logit_tolerance(logits: Tensor) -> float:
    """Return what rounding the logits does to a weight: the exponential's error is theirs."""
    if logits.dtype in (torch.float32, torch.float64):
        return 0.0
    return float(torch.finfo(logits.dtype).eps * logits.float().abs().max())


def _has_bias(call: _Call) -> bool:
    """Whether a learned bias, which is not in the logits, takes part in the choice."""
    return any(
        "correction_bias" in name or name == "expert_bias"
        for module in (call.block.router, call.block.module)
        for name, _ in (*module.named_buffers(), *module.named_parameters())
    )


# ---- applying a gate to another input ------------------------------------------------------------


def _find_probe(layer: GateLayer, call: _Call, ids: Tensor, weights: Tensor) -> Probe | None:
    """Return the way of applying the gate that gives the true experts on the true input."""
    true_ids, _ = _by_weight(ids, weights)
    for probe in _probes(layer, call):
        try:
            with torch.no_grad():
                found = prober(replace(layer, probe=probe))(call.input_copy, call.args, call.kwargs)
        except (TypeError, AttributeError, RuntimeError, ValueError, IndexError, StopIteration):
            continue
        if torch.equal(_by_weight(*found)[0], true_ids):
            return probe
    return None


def _probes(layer: GateLayer, call: _Call) -> Iterator[Probe]:
    in_router = _without_experts(call)
    chosen = _find_ids(in_router) or _find_mask(in_router) or _find_scores(in_router)
    if chosen is not None and chosen[0] == layer.form:
        yield Probe("router", int(chosen[1].key), int(chosen[2].key))
    if layer.logits is not None and layer.logits.tap == "router":
        yield Probe("block", int(layer.logits.key))
        yield Probe("topk", int(layer.logits.key))


def _without_experts(call: _Call) -> _Call:
    """Return the call without what the experts were handed."""
    return replace(call, experts={})


def _by_weight(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Order by descending weight, equal weights as they were."""
    ordered, order = weights.float().sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), ordered


Prober = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], tuple[Tensor, Tensor]]
"""(another input, the router's own arguments) -> ids and weights as from a `Reader`."""


def prober(layer: GateLayer) -> Prober:
    """Return a function that applies the layer's gate to another input.

    It calls the router's `forward` itself, past the hooks, or the taps would see it.
    """
    assert layer.probe is not None
    way, first, second = layer.probe.way, layer.probe.first, layer.probe.second
    read, router = reader(layer.form, layer.top_k), layer.router

    def apply(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if args:
            return outputs(router.forward(x, *args[1:], **kwargs))
        name = next(k for k, v in kwargs.items() if torch.is_tensor(v))
        return outputs(router.forward(**{**kwargs, name: x}))

    def by_router(x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        out = apply(x, args, kwargs)
        return read(out[first], out[second], x.numel() // x.shape[-1])

    def by_block(x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        found = outputs(layer.block.route_tokens_to_experts(apply(x, args, kwargs)[first]))
        ids = next(v for v in found if not v.is_floating_point())
        weights = next(v for v in found if v.is_floating_point())
        return read(ids, weights, x.numel() // x.shape[-1])

    def by_top_k(x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        logits = apply(x, args, kwargs)[first].reshape(-1, layer.count)
        weights, ids = logits.topk(layer.top_k, dim=1)
        return ids, weights

    return {"router": by_router, "block": by_block, "topk": by_top_k}[way]


def _refuse_uneven(model: Module, layers: list[GateLayer]) -> None:
    shapes = {(layer.count, layer.top_k) for layer in layers}
    if len(shapes) > 1:
        found = ", ".join(f"top {k} of {e}" for e, k in sorted(shapes))
        raise UsageError(
            f"{type(model).__name__}: its MoE layers differ ({found}); a trace needs one shape"
        )
