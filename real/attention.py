"""Attention over a KV cache, in the sizes of a model profile.

Everything is real but the numbers: queries, keys and values come out of a product with the dense
part's own weights, keys and values of new tokens are written into the cache of their request and
layer, and each token reads the positions that it may see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from moesim.profile import ModelProfile
from moesim.workload import Row

_HEAD_SIZE = 128
"""Numbers of a head, where the model's configuration does not say."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention of one layer.

    queries, kept : heads of queries, and of keys and values. size : numbers of a head.
    window : positions that are kept in sight; 0: all.
    derived : the configuration does not say so, and they follow from the bytes of the cache.
    """

    queries: int
    kept: int
    size: int
    window: int
    derived: bool

    @property
    def asked(self) -> int:
        """Numbers of one token's query, key and value together."""
        return (self.queries + 2 * self.kept) * self.size


def heads_of(model: ModelProfile, layer: int, itemsize: int) -> Heads | None:
    """A layer's heads when computed in numbers of ``itemsize`` bytes; None: it keeps no cache.

    The cache takes the profile's bytes, whatever they are computed in. A layer that counts for
    several (those without experts lie in the next one's dense part) has the heads of them all.
    """
    held = int(model.kv_bytes_table()[layer]) // 2
    window = int(model.kv_window_table()[layer])
    config = dict(model.config)
    if held < itemsize:
        return None
    queries = int(config.get("num_attention_heads", config.get("num_heads", 0)))
    kept = int(config.get("num_key_value_heads", queries))
    size = int(config.get("head_dim", config.get("d_kv", model.hidden // max(1, queries))))
    once = kept * size * (4 if model.dtype in ("fp32", "float32") else 2)
    if once and queries % kept == 0 and held % once == 0 and size * itemsize * kept <= held:
        times = held // once
        whole = held // (itemsize * kept * times)
        return Heads(queries * times, kept * times, whole, window, whole != size)
    numbers = held // itemsize
    kept = max(1, numbers // _HEAD_SIZE)
    size = numbers // kept
    groups = max(1, model.hidden // (kept * size))
    return Heads(kept * groups, kept, size, window, True)


def without_cudnn() -> Callable[[], None]:
    """Keep torch from cuDNN's attention, which makes a plan for each length of context: a run
    would measure plans. What is returned puts it back."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    return lambda: torch.backends.cuda.enable_cudnn_sdp(before)


class Cache:
    """Keys and values of every layer that keeps them, for so many sequences at a time.

    Parameters
    ----------
    heads : by layer.
    sequences : requests of a batch.
    positions : of the longest.
    """

    def __init__(
        self,
        heads: Sequence[Heads | None],
        sequences: int,
        positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.heads = heads
        self.sequences = sequences
        self.positions = positions
        self._places: dict[int, int] = {}
        """Request -> its place among the sequences."""
        self._layers = [
            None if one is None else torch.zeros(
                sequences, 2, one.kept, positions, one.size, dtype=dtype, device=device
            )
            for one in heads
        ]  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(block.nbytes for block in self._layers if block is not None)

    def anyone(self) -> tuple[Row, ...]:
        """Somebody who attends to a first position, to try it out; nobody where there is none."""
        return (Row(-1, 1, 1),) if self.positions else ()

    def attend(self, layer: int, projected: torch.Tensor, rows: Sequence[Row]) -> None:
        """Write what is new, and let every token read.

        projected : [tokens, numbers], of which a token's first are its query, key and value.
        rows : in the order of the tokens.
        """
        one, block = self.heads[layer], self._layers[layer]
        if one is None or block is None:
            return
        first = 0
        for place, (_, tokens, context) in zip(self._seat(rows), rows, strict=True):
            asked = projected[first : first + tokens, : one.asked]
            _attend(one, block[place], asked, context)
            first += tokens

    def _seat(self, rows: Sequence[Row]) -> list[int]:
        """The place of each request's part; who is not there any more has given up its own."""
        here = {row.request for row in rows}
        if not here <= self._places.keys():
            self._places = {r: place for r, place in self._places.items() if r in here}
            free = sorted(set(range(self.sequences)) - set(self._places.values()), reverse=True)
            self._places |= {r: free.pop() for r in sorted(here - self._places.keys())}
        return [self._places[row.request] for row in rows]


def _attend(one: Heads, held: torch.Tensor, asked: torch.Tensor, context: int) -> torch.Tensor:
    """A sequence's new tokens, the last ones of its ``context``; [queries, tokens, size]."""
    tokens = len(asked)
    split = asked.reshape(tokens, -1, one.size).transpose(0, 1)
    held[0, :, context - tokens : context] = split[one.queries : one.queries + one.kept]
    held[1, :, context - tokens : context] = split[one.queries + one.kept :]
    queries = split[: one.queries]
    if tokens == 1:
        first = max(0, context - one.window) if one.window else 0
        return _one(queries, held[:, :, first:context])
    if not one.window or context <= one.window:
        return _many(queries, held[:, :, :context], 0)
    # Blocks of a window: each sees itself and the window before it.
    made = []
    for begin in range(0, tokens, one.window):
        block = queries[:, begin : begin + one.window]
        last = context - tokens + begin + block.shape[1]
        first = max(0, last - block.shape[1] - one.window + 1)
        made.append(_many(block, held[:, :, first:last], one.window))
    return torch.cat(made, dim=1)


def _one(queries: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """One token: queries that share a head go as rows of one product, so no head is copied."""
    keys, values = held
    folded = queries.reshape(len(keys), -1, keys.shape[2])
    if keys.device.type == "cpu":
        # One query a head takes the library's own kernel four times as long as two products.
        scores = folded @ keys.transpose(1, 2) * keys.shape[2] ** -0.5
        made: torch.Tensor = scores.softmax(-1) @ values
    else:
        made = _kernel(folded, keys, values)
    # What a kernel returns need not lie as its queries do.
    return made.reshape(queries.shape)


def _many(queries: torch.Tensor, held: torch.Tensor, window: int) -> torch.Tensor:
    """Tokens at the end of their context, each blind to what follows it."""
    keys, values = held
    tokens, context = queries.shape[1], keys.shape[1]
    shared = len(queries) != len(keys)
    if tokens == context and not window:
        return _kernel(queries, keys, values, is_causal=True, enable_gqa=shared)
    sight = torch.ones(tokens, context, dtype=torch.bool, device=keys.device)
    sight = sight.tril(context - tokens)
    if window:
        sight = sight.triu(context - tokens - window + 1)
    return _kernel(queries, keys, values, attn_mask=sight, enable_gqa=shared)


def _kernel(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **more: Any
) -> torch.Tensor:
    made = functional.scaled_dot_product_attention(queries[None], keys[None], values[None], **more)
    first: torch.Tensor = made.squeeze(0)
    return first
