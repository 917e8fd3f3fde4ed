"""The experts of a layer as runs of bytes, and what one of them does to its tokens.

An expert that is moved about is a *parcel*: its tensors one after the other, each on a whole cache
line. `Fused` holds families whose experts are 3-D parameters and run through the experts interface
of transformers; `Separate` holds those with a module for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import nn

from moesim.errors import UsageError
from moesim.real.memory import aligned
from moesim.traces.gates import GateLayer

Tensor = torch.Tensor
Forward = Callable[..., Tensor]
"""What stands in for a module of experts: its arguments in, [rows, hidden] out."""

NAME: Final = "moesim"
"""Of the implementation in the experts interface."""
FUSED: Final = re.compile(r"(gate_up|up|gate|down)_proj(_bias)?$")
SEPARATE: Final = ("SwitchTransformersExperts",)
"""Classes with a module for each expert whose sum over the experts is known to be plain."""


class Part(NamedTuple):
    """One tensor of an expert, ``offset`` bytes into its parcel."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Parcel:
    """How the tensors of one expert lie. ``stride``: bytes, in whole cache lines."""

    parts: tuple[Part, ...]
    stride: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Parcel:
        """The layout of tensors in this order."""
        parts, offset = [], 0
        for name, tensor in tensors.items():
            part = Part(name, tuple(tensor.shape), tensor.dtype, offset)
            parts.append(part)
            offset = aligned(offset + part.nbytes)
        return cls(tuple(parts), offset)

    def views(self, region: Tensor) -> dict[str, Tensor]:
        """The tensors in a region, uint8 [stride or more]."""
        return {
            part.name: region[part.offset : part.offset + part.nbytes]
            .view(part.dtype)
            .view(part.shape)
            for part in self.parts
        }


class Experts(Protocol):
    """The experts of one layer."""

    module: nn.Module
    count: int
    parcel: Parcel

    def tensors(self, expert: int) -> Mapping[str, Tensor]:
        """An expert's tensors, where the module holds them."""

    def places(self) -> Iterator[tuple[str, int | None, str]]:
        """(name within the module, expert or None for all of them, part) of each parameter."""

    def parameters(self) -> Iterator[tuple[nn.Module, str]]:
        """Holder and name of each parameter that is offloaded."""

    def compute(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """[rows, hidden] of one expert, before it is multiplied with the gate's weights."""

    def install(self, forward: Forward) -> None:
        """Let ``forward`` stand in for the module."""


def experts_of(model: nn.Module, layers: Sequence[GateLayer]) -> list[Experts]:
    """The experts of every MoE layer, in order.

    Raises
    ------
    UsageError
        Naming the class, where transformers would silently stay on its own path.
    """
    return [_experts(model, layer.experts, layer.count) for layer in layers]


def _experts(model: nn.Module, module: nn.Module, count: int) -> Experts:
    if type(module).__name__ in SEPARATE:
        return Separate(model, module, count)
    decorated = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed"))
    if not decorated or not hasattr(module, "_apply_gate"):
        raise _refused(
            model,
            module,
            "do not run through the experts interface of transformers, which would silently keep "
            "its own path",
        )
    return Fused(model, module, count)


def _refused(model: nn.Module, module: nn.Module, why: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__}: its {type(module).__name__} {why}; this family cannot be "
        "offloaded"
    )


class Fused:
    """Experts whose parameters hold all of them, [E, ...]."""

    def __init__(self, model: nn.Module, module: Any, count: int) -> None:
        self.module = module
        self.count = count
        stacked = {
            name: value
            for name, value in (*module.named_parameters(), *module.named_buffers())
            if value.dim() >= 2 and value.shape[0] == count
        }
        for name, value in stacked.items():
            if not FUSED.match(name) or not value.is_floating_point():
                raise _refused(model, module, f"hold {name} ({value.dtype}), which is unknown here")
        self._names = tuple(stacked)
        self.parcel = Parcel.of({name: value[0] for name, value in stacked.items()})
        self._up = "gate_up_proj" if module.has_gate else "up_proj"

    def tensors(self, expert: int) -> Mapping[str, Tensor]:
        """An expert's tensors, where the module holds them."""
        return {name: getattr(self.module, name)[expert] for name in self._names}

    def places(self) -> Iterator[tuple[str, int | None, str]]:
        """(name within the module, None, part) of each parameter."""
        for name in self._names:
            yield name, None, name

    def parameters(self) -> Iterator[tuple[nn.Module, str]]:
        """Holder and name of each parameter that is offloaded."""
        for name in self._names:
            yield self.module, name

    def compute(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """As the library's own loop does, operation by operation."""
        module: Any = self.module
        hidden = self._linear(x, weights, self._up)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        hidden = self._linear(hidden, weights, "down_proj")
        if getattr(module, "has_post_expert_norm", False):
            hidden = module.post_expert_norm(hidden)
        return hidden

    def _linear(self, x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
        bias = weights[f"{name}_bias"] if self.module.has_bias else None
        if not self.module.is_transposed:
            return nn.functional.linear(x, weights[name], bias)
        product = x @ weights[name]
        return product if bias is None else product + bias

    def install(self, forward: Forward) -> None:
        """Through the experts interface; ``register`` first."""
        self.module._moesim_forward = forward


class Separate:
    """Experts that are modules of their own, all alike."""

    def __init__(self, model: nn.Module, module: nn.Module, count: int) -> None:
        self.module = module
        self.count = count
        self._children = dict(module.named_children())
        shapes = {
            tuple((name, value.shape, value.dtype) for name, value in child.named_parameters())
            for child in self._children.values()
        }
        if len(shapes) != 1 or len(self._children) != count:
            raise _refused(model, module, "are not all alike")
        self._one = next(iter(self._children.values()))
        self.parcel = Parcel.of(dict(self._one.named_parameters()))

    def tensors(self, expert: int) -> Mapping[str, Tensor]:
        """An expert's tensors, where its module holds them."""
        return dict(list(self._children.values())[expert].named_parameters())

    def places(self) -> Iterator[tuple[str, int | None, str]]:
        """(name within the module, expert, part) of each parameter."""
        for number, (name, child) in enumerate(self._children.items()):
            for part, _ in child.named_parameters():
                yield f"{name}.{part}", number, part

    def parameters(self) -> Iterator[tuple[nn.Module, str]]:
        """Holder and name of each parameter that is offloaded."""
        for child in self._children.values():
            for holder in child.modules():
                for name in holder._parameters:
                    yield holder, name

    def compute(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The first expert's module with another's weights."""
        made: Tensor = torch.func.functional_call(self._one, dict(weights), (x,))
        return made

    def install(self, forward: Forward) -> None:
        """In place of the module's own forward."""
        self.module.forward = forward


# ---- the experts interface -----------------------------------------------------------------------


def register(model: Any, experts: Sequence[Experts]) -> None:
    """Send the fused experts of a model through what is installed on each.

    Raises
    ------
    UsageError
        Where the library takes the name and does not use it.
    """
    from transformers.integrations.moe import ExpertsInterface

    fused = [one.module for one in experts if isinstance(one, Fused)]
    if not fused:
        return
    ExpertsInterface.register(NAME, _dispatched)
    model.set_experts_implementation(NAME)
    for module in fused:
        if getattr(module.config, "_experts_implementation", None) != NAME:
            raise _refused(model, module, "do not take another experts implementation")


def _dispatched(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    made: Tensor = module._moesim_forward(*args, **kwargs)
    return made


def drop(experts: Experts) -> None:
    """Leave the shapes behind, and free the storage."""
    for holder, name in experts.parameters():
        value = holder._parameters[name]
        if value is not None and value.device.type != "meta":
            holder._parameters[name] = nn.Parameter(
                torch.empty_like(value, device="meta"), requires_grad=False
            )
