"""The laws of the trace format, verified: request by request, or a whole file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.digest import TraceDigest
from moesim.traces.reader import Halves, RequestRows, TraceReader, Uint16s, iteration_starts
from moesim.traces.schema import DROPPED, PHASES, TraceMeta

Bools = npt.NDArray[np.bool_]

INFINITE_HALF = 0x7C00
"""Bits of the float16 infinity; finite numbers from 0 up lie below, in numeric order."""
NEGATIVE_ZERO = 0x8000

LAGS = 16
"""How many lags the overlap-versus-lag law compares."""
SAMPLE_ROWS = 400_000
"""About how many rows the two statistical warnings look at; more tell no more."""
SAMPLE_TOKENS = 2_048
"""At most so many tokens of one request."""
ENOUGH_TOKENS = 64
"""Fewer tokens than this prove nothing about overlap or copied layers."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """A trace that holds every law, with what still looks strange in it."""

    meta: TraceMeta
    warnings: tuple[str, ...]


def check_file(
    path: str | Path, progress: Callable[[int], object] | None = None, batch_rows: int = 65536
) -> CheckReport:
    """Verify a whole file: every law on rows, the phases' stacks, the counts, the digest.

    `progress` is called with the number of rows of each request done. Raises `TraceError` at the
    first law that is broken. Time is linear in the rows; memory holds one request and one batch.
    """
    with TraceReader(path, batch_rows=batch_rows) as reader:
        tally = Tally(reader.meta)
        digest = TraceDigest(reader.meta)
        locality = _Locality(reader.meta)
        for rows in reader.requests():
            check_request(rows, reader.meta, reader.path)
            tally.add(rows, reader.path)
            digest.update(rows)
            locality.add(rows)
            if progress is not None:
                progress(rows.rows)
        _same_totals(reader.path, reader.meta, tally, digest.hexdigest())
        return CheckReport(reader.meta, tuple(locality.warnings()))


def check_request(rows: RequestRows, meta: TraceMeta, path: str | Path | None = None) -> None:
    """Verify the laws that replay relies on. Raises `TraceError` that names the first bad row.

    Rows strictly ascend by (iteration, layer, position); iteration 0 and only it is prefill; ids,
    layers and positions are in range; the experts of a token are distinct (`DROPPED` may repeat);
    every stack that an iteration runs through is there with all layers, each with the same tokens;
    the iterations of a phase run through the same stacks; weights are finite, not negative, and
    descending where the metadata says so; gate logits are neither NaN nor +inf.
    """
    law = _Law(rows, f"{path}: " if path is not None else "")
    _check_order(law, rows)
    _check_ranges(law, rows, meta)
    _check_experts(law, rows.experts, meta, "expert")
    for distance, experts in rows.ahead.items():
        _check_experts(law, experts, meta, f"ahead{distance} expert")
    _check_stacks(law, rows, meta)
    if rows.weights is not None:
        _check_weights(law, rows, rows.weights, meta)
    if rows.gate is not None:
        bits = rows.gate.view(np.uint16)
        logits: Bools = ((bits & 0x7FFF) <= INFINITE_HALF) & (bits != INFINITE_HALF)
        law.holds(logits, "a gate logit is NaN or +inf")
    if rows.input_norm is not None:
        law.holds(_finite(rows.input_norm), "input_norm is NaN, infinite or negative")
    _check_facts(law, rows)


class _Law:
    """Where a law is broken, said in the words of the trace."""

    def __init__(self, rows: RequestRows, prefix: str) -> None:
        self._rows = rows
        self._prefix = prefix

    def holds(self, good: Bools, problem: str) -> None:
        """Refuse the first row of `good` ([rows] or [rows, width]) that is not all true."""
        if not good.all():
            self.broken(int(np.argwhere(~good)[0, 0]), problem)

    def broken(self, row: int, problem: str) -> None:
        rows = self._rows
        raise TraceError(
            f"{self._prefix}request {rows.request}, iteration {rows.iteration[row]}, "
            f"layer {rows.layer[row]}, position {rows.position[row]}: {problem}"
        )

    def broken_fact(self, problem: str) -> None:
        raise TraceError(f"{self._prefix}request {self._rows.request}: {problem}")


def _check_order(law: _Law, rows: RequestRows) -> None:
    iteration, layer, position = rows.iteration, rows.layer, rows.position
    later = position[1:] > position[:-1]
    later &= layer[1:] == layer[:-1]
    later |= layer[1:] > layer[:-1]
    later &= iteration[1:] == iteration[:-1]
    later |= iteration[1:] > iteration[:-1]
    good = np.concatenate(([True], later))
    law.holds(good, "row out of order or repeated; sort by request, iteration, layer, position")


def _check_ranges(law: _Law, rows: RequestRows, meta: TraceMeta) -> None:
    law.holds(rows.iteration >= 0, "the iteration is negative")
    law.holds(rows.position >= 0, "the position is negative")
    in_range = (rows.layer >= 0) & (rows.layer < meta.layers)
    law.holds(in_range, f"the layer is out of range 0..{meta.layers - 1}")
    law.holds(
        rows.phase == (rows.iteration > 0),
        "iteration 0 and no other must be prefill (a trace without prefill starts at iteration 1)",
    )
    if rows.token is not None:
        law.holds(rows.token >= -1, "the token id is negative")


def _check_experts(law: _Law, experts: Uint16s, meta: TraceMeta, what: str) -> None:
    some_dropped = False
    if int(experts.max()) >= meta.experts:
        in_range = (experts < meta.experts) | (experts == DROPPED)
        law.holds(in_range, f"an {what} is out of range 0..{meta.experts - 1}")
        some_dropped = True
    law.holds(_distinct(experts, some_dropped), f"an {what} occurs twice")


def _distinct(experts: Uint16s, some_dropped: bool) -> Bools:
    """Return, for each row of [rows, width], whether its experts are distinct."""
    if experts.shape[1] > 16:
        ordered = np.sort(experts, axis=1)
        again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != DROPPED)
        distinct: Bools = ~again.any(axis=1)
        return distinct
    # Comparing each pair of columns is quadratic in the width but needs no sort: faster when small.
    columns = np.ascontiguousarray(experts.T)
    twice = np.zeros(len(experts), dtype=np.bool_)
    for one, other in combinations(columns, 2):
        twice |= (one == other) & (one != DROPPED) if some_dropped else one == other
    return ~twice


def _check_stacks(law: _Law, rows: RequestRows, meta: TraceMeta) -> None:
    """Rows are known to be ordered: equal (iteration, layer) form runs, one run per layer."""
    runs = _Runs(rows)
    for name, first, end in meta.stack_ranges():
        inside = (runs.layer >= first) & (runs.layer < end)
        if not inside.any():
            continue
        starts = runs.start[inside]
        of_iteration = iteration_starts(rows.iteration[starts])
        counts = np.diff(of_iteration)
        if (counts != end - first).any():
            at = int(np.flatnonzero(counts != end - first)[0])
            here = runs.layer[inside][of_iteration[at] : of_iteration[at + 1]]
            missing = np.setdiff1d(np.arange(first, end), here)
            law.broken(
                int(starts[of_iteration[at]]),
                f"layer {missing[0]} is missing (stack {name!r} has layers {first}..{end - 1})",
            )
        lengths = runs.length[inside].reshape(-1, end - first)
        same = (lengths == lengths[:, :1]).reshape(-1)
        if not same.all():
            bad = int(np.flatnonzero(~same)[0])
            law.broken(
                int(starts[bad]),
                f"the layer has {runs.length[inside][bad]} tokens, the first of its stack has "
                f"{lengths[bad // (end - first), 0]}",
            )
    _check_positions(law, rows, meta, runs)
    _check_same_stacks(law, rows, meta)


class _Runs:
    """The runs of equal (iteration, layer), which are the layer events of a request."""

    def __init__(self, rows: RequestRows) -> None:
        changed = rows.layer[1:] != rows.layer[:-1]
        changed |= rows.iteration[1:] != rows.iteration[:-1]
        bounds = np.concatenate(([0], np.flatnonzero(changed) + 1, [rows.rows]))
        self.start = bounds[:-1]
        self.length = np.diff(bounds)
        self.layer = rows.layer[self.start]


def _check_positions(law: _Law, rows: RequestRows, meta: TraceMeta, runs: _Runs) -> None:
    """Each layer of a stack must see the same positions as the layer before it."""
    firsts = [first for _, first, _ in meta.stack_ranges()]
    if int(runs.length.max()) == 1:
        before = np.concatenate(([0], rows.position[:-1]))
    else:
        back = np.repeat(runs.length, runs.length)
        before = rows.position[np.maximum(np.arange(rows.rows) - back, 0)]
    same = before == rows.position
    for first in firsts:
        same |= rows.layer == first
    law.holds(same, "the position differs from those in the layer before")


def _check_same_stacks(law: _Law, rows: RequestRows, meta: TraceMeta) -> None:
    for phase, stacks in stacks_by_phase(rows, meta).items():
        if stacks is None:
            law.broken_fact(
                f"some {PHASES[phase]} iterations lack a stack that others have; "
                "each phase must run through the same stacks"
            )


def stacks_by_phase(rows: RequestRows, meta: TraceMeta) -> dict[int, tuple[str, ...] | None]:
    """Return phase -> names of the stacks that its iterations run through; None if they differ."""
    ranges = meta.stack_ranges()
    firsts = rows.starts[:-1]
    phases = rows.phase[firsts]
    there = np.empty((len(firsts), len(ranges)), dtype=np.bool_)
    for column, (_, first, end) in enumerate(ranges):
        inside = (rows.layer >= first) & (rows.layer < end)
        there[:, column] = np.logical_or.reduceat(inside, firsts)
    found: dict[int, tuple[str, ...] | None] = {}
    for phase in np.unique(phases).tolist():
        of_phase = there[phases == phase]
        same = bool((of_phase == of_phase[0]).all())
        names = tuple(stack[0] for stack, has in zip(ranges, of_phase[0], strict=True) if has)
        found[phase] = names if same else None
    return found


def _finite(halves: Halves) -> Bools:
    """Return where a half is finite and not negative, by its bits (float16 arithmetic is slow)."""
    bits = halves.view(np.uint16)
    good: Bools = bits < INFINITE_HALF
    return good if good.all() else good | (bits == NEGATIVE_ZERO)


def _check_weights(law: _Law, rows: RequestRows, weights: Halves, meta: TraceMeta) -> None:
    law.holds(_finite(weights), "a weight is NaN, infinite or negative")
    if meta.rank_order != "weight":
        return
    bits = weights.view(np.uint16) & 0x7FFF  # of a number not negative, bits order like values
    if (bits[:, 1:] <= bits[:, :-1]).all():
        return
    bound = np.full(rows.rows, INFINITE_HALF, dtype=np.uint16)
    good = np.ones(rows.rows, dtype=np.bool_)
    for column in range(bits.shape[1]):
        kept = rows.experts[:, column] != DROPPED
        good &= ~kept | (bits[:, column] <= bound)
        bound = np.where(kept, bits[:, column], bound)
    law.holds(good, "weights do not descend although rank_order is 'weight'")


def _check_facts(law: _Law, rows: RequestRows) -> None:
    for name in ("arrival_ns", "prompt_tokens", "output_tokens"):
        value = getattr(rows.facts, name)
        if value is not None and value < 0:
            law.broken_fact(f"{name} is negative")
    embeddings = [*rows.embedding.values()]
    if rows.facts.prompt_embedding is not None:
        embeddings.append(rows.facts.prompt_embedding)
    if any(not np.isfinite(vector).all() for vector in embeddings):
        law.broken_fact("an embedding holds NaN or infinity")


class Tally:
    """What the metadata says about the rows as a whole: counts and phases."""

    def __init__(self, meta: TraceMeta) -> None:
        self._meta = meta
        self._firsts = np.array([first for _, first, _ in meta.stack_ranges()])
        self._stacks: dict[int, tuple[str, ...]] = {}
        self.requests = 0
        self.tokens = 0
        self.rows = 0

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the phases that occurred."""
        return tuple(PHASES[phase] for phase in sorted(self._stacks))

    def add(self, rows: RequestRows, path: str | Path) -> None:
        """Count a checked request; refuse one whose phases run through other stacks."""
        for phase, stacks in stacks_by_phase(rows, self._meta).items():
            known = self._stacks.setdefault(phase, stacks or ())
            if stacks != known:
                raise TraceError(
                    f"{path}: request {rows.request}: its {PHASES[phase]} runs through the stacks "
                    f"{', '.join(stacks or ())}, that of earlier requests through "
                    f"{', '.join(known)}; layers are missing"
                )
        self.count(rows)

    def count(self, rows: RequestRows) -> None:
        """Count a request as it is."""
        for phase in np.unique(rows.phase).tolist():
            self._stacks.setdefault(phase, ())
        self.requests += 1
        self.rows += rows.rows
        self.tokens += sum(int(np.count_nonzero(rows.layer == first)) for first in self._firsts)


def _same_totals(path: Path, meta: TraceMeta, tally: Tally, digest: str) -> None:
    for name in ("rows", "requests", "tokens"):
        said, counted = getattr(meta, name), getattr(tally, name)
        if said != counted:
            raise TraceError(f"{path}: {counted} {name} where the metadata says {said}")
    if set(meta.phases) != set(tally.phases):
        raise TraceError(
            f"{path}: has phases {', '.join(tally.phases)} where the metadata says "
            f"{', '.join(meta.phases)}"
        )
    if meta.digest != digest:
        raise TraceError(
            f"{path}: the rows have digest {digest[:12]}, the metadata says {meta.digest[:12]}; "
            "the rows were changed after writing"
        )


class _Locality:
    """Two statistics that expose traces put together wrongly.

    The overlap of the experts of two tokens falls with their distance in the text, so it must peak
    at lag 1; a trace whose sequences were interleaved peaks elsewhere. Two layers never choose the
    same experts for all tokens; a trace where they do has copied layers.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self._meta = meta
        self._every = max(1, meta.rows // SAMPLE_ROWS)
        self._seen = 0
        self._tokens = 0
        self._hashes = [hashlib.blake2b(digest_size=16) for _ in range(meta.layers)]
        self._hashed = np.zeros(meta.layers, dtype=np.int64)
        self._same = np.zeros(LAGS + 1)
        self._pairs = np.zeros(LAGS + 1)

    def add(self, rows: RequestRows) -> None:
        """Look at the request if it is in the sample."""
        self._seen += 1
        if (self._seen - 1) % self._every:
            return
        for _, first, end in self._meta.stack_ranges():
            experts = _by_layer(rows, first, end)
            if experts is None:
                continue
            for layer in range(first, end):
                self._hashes[layer].update(experts[:, layer - first].tobytes())
            self._hashed[first:end] += experts.shape[2]
            if experts.shape[2] > 2 * LAGS:
                self._compare(experts)

    def _compare(self, experts: Uint16s) -> None:
        self._tokens += experts.shape[2]
        for lag in range(1, LAGS + 1):
            now, then = experts[:, :, lag:], experts[:, :, :-lag]
            for one in now:
                kept = one != DROPPED
                self._same[lag] += sum(np.count_nonzero((one == other) & kept) for other in then)
            self._pairs[lag] += now.size

    def warnings(self) -> Iterator[str]:
        """Yield one line for each thing that looks strange."""
        yield from self._copied_layers()
        if self._tokens < ENOUGH_TOKENS:
            return
        overlap = self._same[1:] / self._pairs[1:]
        best = int(np.argmax(overlap))
        first, most = float(overlap[0]), float(overlap[best])
        # Layers of one token are not independent: only tokens count towards the error.
        error = (2 * most * (1 - most) / (self._tokens * self._meta.top_k)) ** 0.5
        if best and most - first > max(0.01, 4 * error):
            yield (
                f"consecutive tokens share {first:.1%} of their experts, tokens {best + 1} apart "
                f"share {most:.1%}: overlap must peak at lag 1, so rows are probably interleaved "
                f"({best + 1} sequences in turn?)"
            )

    def _copied_layers(self) -> Iterator[str]:
        groups: dict[tuple[int, bytes], list[int]] = {}
        for layer in np.flatnonzero(self._hashed >= ENOUGH_TOKENS).tolist():
            key = (int(self._hashed[layer]), self._hashes[layer].digest())
            groups.setdefault(key, []).append(layer)
        for layers in groups.values():
            if len(layers) > 1:
                listed = ", ".join(map(str, layers))
                yield f"layers {listed} hold the same experts throughout: probably copies"


def _by_layer(rows: RequestRows, first: int, end: int) -> Uint16s | None:
    """Return the experts of a stack as [K, layers, tokens], tokens in order; None if absent."""
    inside = np.flatnonzero((rows.layer >= first) & (rows.layer < end))
    if not len(inside):
        return None
    order = inside[np.argsort(rows.layer[inside], kind="stable")]
    columns: npt.NDArray[Any] = rows.experts[order].T
    shaped = columns.reshape(columns.shape[0], end - first, -1)[:, :, :SAMPLE_TOKENS]
    return np.ascontiguousarray(shaped)
