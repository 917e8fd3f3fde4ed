"""The arithmetic of one model on one device: dense parts with attention, output head, experts.

The same code on every device; streams are the caller's. Inputs are made up, for routing is forced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from moesim.profile import ModelProfile
from moesim.real.attention import Cache, heads_of
from moesim.real.memory import Fit, Needs, aligned
from moesim.types import AnyArray
from moesim.workload import Row

Tensor = torch.Tensor


class Inputs:
    """Hidden states of any number of tokens."""

    def __init__(self, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.empty(0, hidden, dtype=dtype, device=device)

    def __call__(self, tokens: int) -> Tensor:
        """[tokens, hidden]."""
        rows = self._rows
        if tokens > len(rows):
            made = torch.randn(tokens, rows.shape[1], device=rows.device)
            rows = self._rows = made.to(rows.dtype)
        return rows[:tokens]


class Experts:
    """Gated MLPs over bytes, summed up as a layer sums its experts."""

    def __init__(self, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self.inputs = Inputs(hidden, dtype, device)
        self._sum = torch.empty(0, hidden, dtype=dtype, device=device)

    def compute(self, weights: Tensor, tokens: int) -> None:
        """One expert, on the device where its weights lie."""
        with torch.inference_mode():
            result = mlp(self.inputs(tokens), weights)
            if tokens > len(self._sum):
                self._sum = torch.zeros_like(self.inputs(tokens))
            if result is not None:
                self._sum[:tokens, : result.shape[1]] += result


class DenseParts:
    """What a layer computes beside its experts, and the output head.

    A dense part is a product that makes queries, keys and values, attention over the cache, and a
    product over the rest of its bytes; the routing is among what comes out.

    Parameters
    ----------
    dense : [buffers, bytes of the largest part], and ``head`` : [1, bytes], of type uint8.
    """

    def __init__(
        self, model: ModelProfile, dense: Tensor, head: Tensor, cache: Cache, inputs: Inputs
    ) -> None:
        self.cache = cache
        self._dense = dense
        self._head = head
        self.inputs = inputs
        self._dtype = inputs(1).dtype
        self._hidden = model.hidden
        self._dense_bytes: list[int] = model.dense_bytes_table().tolist()
        self._head_bytes = model.head_bytes
        most = max((one.asked for one in cache.heads if one is not None), default=0)
        self._wide = Inputs(most, self._dtype, dense.device)

    @classmethod
    def random(
        cls, model: ModelProfile, needs: Needs, shared: Fit, inputs: Inputs, seed: int
    ) -> DenseParts:
        """Made-up weights and an empty cache, where the inputs are."""
        one = inputs(1)
        made = torch.Generator(one.device).manual_seed(seed % (1 << 63))

        def weights(count: int, nbytes: int) -> Tensor:
            numbers = count * aligned(nbytes) // one.element_size()
            block = torch.empty(numbers, dtype=one.dtype, device=one.device)
            return block.normal_(0, 1 / 64, generator=made).view(torch.uint8).view(count, -1)

        heads = [heads_of(model, layer, one.element_size()) for layer in range(model.layers)]
        cache = Cache(heads, needs.sequences, needs.positions, one.dtype, one.device)
        dense = weights(shared.dense_buffers, needs.dense_bytes)
        return cls(model, dense, weights(1, needs.head_bytes), cache, inputs)

    def dense(self, layer: int, tokens: int, rows: Sequence[Row], turn: int = 0) -> None:
        """One layer's part. ``rows``: who attends; all others are padding. ``turn``: takes the
        weights of another layer, which no cache holds."""
        buffer = self._dense[(layer + turn) % len(self._dense)]
        matrix = self._matrix(buffer[: self._dense_bytes[layer]])
        with torch.inference_mode():
            heads = self.cache.heads[layer]
            if heads is None or not rows:
                self._product(matrix, tokens)
            elif heads.asked <= len(matrix):
                projected = self._product(matrix[: heads.asked], tokens)
                self.cache.attend(layer, projected, rows)
                self._product(matrix[heads.asked :], tokens)
            else:
                # So few bytes hold no such product.
                self._product(matrix, tokens)
                self.cache.attend(layer, self._wide(tokens), rows)

    def head(self, tokens: int) -> None:
        """The output head."""
        with torch.inference_mode():
            self._product(self._matrix(self._head[0][: self._head_bytes]), tokens)

    def _matrix(self, nbytes: Tensor) -> Tensor:
        """[rows, width]; no rows where there are no bytes."""
        weights = numbers_of(nbytes, self._dtype)
        width = max(1, min(self._hidden, weights.numel()))
        rows = weights.numel() // width
        return weights[: rows * width].view(rows, width)

    def _product(self, matrix: Tensor, tokens: int) -> Tensor:
        return functional.linear(self.inputs(tokens)[:, : matrix.shape[1]], matrix)


def mlp(inputs: Tensor, weights: Tensor) -> Tensor | None:
    """down(silu(gate(x)) * up(x)); None where the bytes hold no weight of each."""
    hidden, width = sides(weights.numel(), inputs.shape[1])
    if not width:
        return None
    split = 2 * width * hidden
    both = functional.linear(inputs[:, :hidden], weights[:split].view(2 * width, hidden))
    inner = functional.silu(both[:, :width]) * both[:, width:]
    return functional.linear(inner, weights[split : 3 * width * hidden].view(hidden, width))


def sides(numbers: int, hidden: int) -> tuple[int, int]:
    """(hidden size, width) of three equal matrices made of so many numbers."""
    hidden = min(hidden, numbers // 3)
    return hidden, numbers // (3 * hidden) if hidden else 0


def numbers_of(nbytes: Tensor | AnyArray, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; a rest that makes no number is left out."""
    there = nbytes if isinstance(nbytes, Tensor) else torch.from_numpy(nbytes)
    return there[: len(there) // dtype.itemsize * dtype.itemsize].view(dtype)


def said_of(cache: Cache) -> str:
    """What a manifest says of attention."""
    there = {one for one in cache.heads if one is not None}
    if not there:
        return "no cache, no attention"
    ways = sorted({f"{one.queries} over {one.kept} heads of {one.size}" for one in there})
    derived = any(one.derived for one in there)
    return f"attention, {' or '.join(ways)}" + derived * " (derived from the bytes of the cache)"
