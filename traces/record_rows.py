"""From what the gates did in the forward passes of a batch to the rows of its requests.

A batch went through one prefill of [batch, length] tokens, padded, and then through passes of one
token for each sequence, also for those that had finished. Here each request gets its own rows, in
the order of the format, without padding and without what came after its end. NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.reader import Halves, Int32s, RequestFacts, RequestRows, iteration_starts
from moesim.traces.schema import DECODE, DROPPED, PREFILL

AnyArray = npt.NDArray[Any]
LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What one stack's gates did in T forward passes of a batch; rows are sequence by sequence."""

    layers: tuple[int, int]
    """First MoE layer of the stack, one past its last."""
    columns: Mapping[str, AnyArray]
    """`ids` uint16 and `weights` float32 [T, L, batch, length, K], `logits` float16 [.., E],
    `norms` float32 [.., 1], and `ahead<d>`, `ahead<d> weights` like ids and weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The forward passes of one batch."""

    prefill: tuple[Pass, ...]
    """T = 1: the prompts, by the encoder if there is one and then the decoder's first token."""
    decode: tuple[Pass, ...]
    """The passes of one token each, in one or several pieces."""


@dataclass(frozen=True, slots=True, eq=False)
class RanSequence:
    """One sequence of a batch, as it was run."""

    request: int
    prompt: Int32s
    """Token ids."""
    padding: int
    """Rows before the prompt's first token; padding behind the prompt is not counted."""
    output: Int32s
    """Generated token ids up to and with the end-of-sequence token, the last of which was not run
    through the model."""
    start: int | None
    """The token that the decoder of an encoder-decoder model begins with; None without encoder."""
    facts: RequestFacts
    embedding: Mapping[int, Halves]


def request_rows(batch: Batch, number: int, sequence: RanSequence) -> RequestRows:
    """Return the rows of the batch's sequence `number`.

    Raises `TraceError` if the router gave NaN for it.
    """
    blocks = list(_blocks(batch, number, sequence))
    columns = {name: _joined([block[name] for block in blocks]) for name in blocks[0]}
    if np.isnan(columns["weights"]).any():
        raise TraceError(
            f"request {sequence.request}: the model's gates gave NaN; record with --dtype float32"
        )
    experts, weights = by_weight(columns["ids"], columns["weights"])
    iteration = columns["iteration"]
    return RequestRows(
        request=sequence.request,
        starts=iteration_starts(iteration),
        iteration=iteration,
        position=columns["position"],
        layer=columns["layer"],
        phase=np.where(iteration == 0, PREFILL, DECODE).astype(np.uint8),
        experts=experts,
        weights=halves(weights),
        gate=finite_logits(columns["logits"]) if "logits" in columns else None,
        ahead=_ahead(columns),
        input_norm=halves(columns["norms"][:, 0]) if "norms" in columns else None,
        token=columns["token"],
        embedding=sequence.embedding,
        facts=sequence.facts,
    )


def by_weight(ids: AnyArray, weights: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Order ids and weights [rows, K] by descending weight, equal weights as they were; dropped
    ones last, with weight 0."""
    weights = np.where(ids == DROPPED, -1, weights)
    order = np.argsort(-weights, axis=1, kind="stable")
    ordered = np.take_along_axis(weights, order, axis=1)
    return np.take_along_axis(ids, order, axis=1), np.maximum(ordered, 0)


def halves(values: AnyArray) -> Halves:
    """Return values as float16; those beyond its range become its largest number."""
    with np.errstate(over="ignore"):
        made: Halves = np.minimum(values, LARGEST_HALF).astype(np.float16)
    return made


def finite_logits(logits: Halves) -> Halves:
    """Return logits whose infinities are the largest number."""
    return np.where(np.isposinf(logits), np.float16(LARGEST_HALF), logits)


def _ahead(columns: Mapping[str, AnyArray]) -> dict[int, AnyArray]:
    distances = [int(name[5:]) for name in columns if name[:5] == "ahead" and name[5:].isdigit()]
    return {d: by_weight(columns[f"ahead{d}"], columns[f"ahead{d} weights"])[0] for d in distances}


def _joined(pieces: Sequence[AnyArray]) -> AnyArray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


# ---- blocks: one stack's rows of one or several passes -------------------------------------------


def _blocks(batch: Batch, number: int, sequence: RanSequence) -> Iterator[dict[str, AnyArray]]:
    """Yield the columns of one run of rows after the other, in the order of the format."""
    for stage, one in enumerate(batch.prefill):
        if stage == 0:
            tokens = sequence.prompt
            first = sequence.padding
        else:
            tokens = np.array([sequence.start], dtype=np.int32)
            first = 0
        rows = slice(first, first + len(tokens))
        yield _block(one, number, slice(0, 1), rows, tokens[None, :], 0, 0)
    left, iteration = len(sequence.output) - 1, 1
    begin = 1 if sequence.start is not None else len(sequence.prompt)
    for one in batch.decode:
        passes = min(left, one.columns["ids"].shape[0])
        if passes <= 0:
            continue
        fed = sequence.output[iteration - 1 : iteration - 1 + passes]
        position = begin + iteration - 1
        yield _block(one, number, slice(0, passes), slice(0, 1), fed[:, None], iteration, position)
        left, iteration = left - passes, iteration + passes


def _block(
    one: Pass,
    number: int,
    passes: slice,
    rows: slice,
    tokens: Int32s,
    iteration: int,
    position: int,
) -> dict[str, AnyArray]:
    """Return the columns of `tokens` [passes, length], rows ordered by (pass, layer, token)."""
    first, end = one.layers
    shape = (len(tokens), end - first, tokens.shape[1])
    numbers = np.arange(tokens.size, dtype=np.int32).reshape(len(tokens), 1, -1)
    layers = np.arange(first, end, dtype=np.int16)[:, None]
    made: dict[str, AnyArray] = {
        "iteration": np.arange(iteration, iteration + len(tokens), dtype=np.int32)[:, None, None],
        "position": position + numbers,
        "layer": layers,
        "token": np.where(layers == first, tokens[:, None, :], -1).astype(np.int32),
    }
    made = {name: np.broadcast_to(value, shape).reshape(-1) for name, value in made.items()}
    for name, values in one.columns.items():
        cut = values[passes, :, number, rows]
        made[name] = cut.reshape(-1, cut.shape[-1])
    return made
