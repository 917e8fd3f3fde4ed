"""Make a synthetic trace of any size, request by request, with knobs for each kind of structure.

Every layer has a logit for each expert and token::

    logit = -skew * ln(popularity rank) + topic_strength * topic vector + gumbel(z)
    z     = sqrt(cross_layer) * shared + sqrt(1 - cross_layer) * own

`shared` (one for all layers, its experts renamed in each) and `own` (one for each layer) are
standard normal and first-order autoregressive over the tokens of a request with coefficient
`overlap`; `gumbel` maps the normal to the Gumbel distribution. The k largest logits are chosen, as
a gate does. So with all other knobs at zero the first choice follows Zipf's law with exponent
`skew` exactly, and the k of them are drawn from it without replacement.

Each request has its own counter-based generator, keyed by (seed, request): the first n requests of
a longer trace equal a trace of n requests. Only raw bits of the generator are used, which NumPy
keeps stable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt

from moesim.errors import ProfileError, UsageError
from moesim.profile import ModelProfile
from moesim.traces.import_common import AnyArray, Layout
from moesim.traces.reader import Halves, RequestFacts, RequestRows, iteration_starts
from moesim.traces.schema import DROPPED, TraceMeta
from moesim.traces.writer import TraceWriter

Floats = npt.NDArray[np.float32]

SCORES: Final = ("softmax-topk", "softmax", "softmax-renorm", "sigmoid-bias-scale")
"""Score kinds whose weights can be made; a model with another one gets the first."""
_LEVELS: Final = 1 << 16
_TABLE_STEPS: Final = 4096
_TABLE_RANGE: Final = 6.0
_CHUNK_VALUES: Final = 1 << 21
_WORLD: Final = (1 << 64) - 1
_NOISE, _FACTS, _EMBEDDING, _AHEAD = range(4)


@dataclass(frozen=True, slots=True)
class Synth:
    """What to make. Raises `UsageError` for a value out of its range.

    The prefill makes the first output token, so a request has `output_tokens` - 1 decode
    iterations (all of them if there is no prompt).
    """

    model: ModelProfile
    requests: int
    prompt_tokens: int
    output_tokens: int
    skew: float = 0.5
    """Zipf exponent of expert popularity; 0 is uniform."""
    overlap: float = 0.5
    """How much a token repeats of the one before, 0..1."""
    topics: int = 8
    topic_strength: float = 0.5
    """Standard deviation of the topic's share of a logit."""
    cross_layer: float = 0.2
    """Share of the varying part that all layers have in common, 0..1."""
    gate: bool = False
    """Write the logits of all experts."""
    ahead: tuple[int, ...] = ()
    """Distances for which experts are predicted."""
    recall: float = 0.8
    """Probability that a predicted expert is a true one."""
    embedding: int = 0
    """Numbers in each iteration's embedding, which tells the topic; 0: none."""
    seed: int = 0

    def __post_init__(self) -> None:
        _in_range("--requests", self.requests, 1, 2**31 - 1)
        _in_range("--prompt-tokens", self.prompt_tokens, 0, 2**30)
        _in_range("--output-tokens", self.output_tokens, 0, 2**30)
        _in_range("--skew", self.skew, 0, 20)
        _in_range("--overlap", self.overlap, 0, 1)
        _in_range("--topics", self.topics, 1, 1 << 20)
        _in_range("--topic-strength", self.topic_strength, 0, 100)
        _in_range("--cross-layer", self.cross_layer, 0, 1)
        _in_range("--recall", self.recall, 0, 1)
        _in_range("--embeddings", self.embedding, 0, 1 << 16)
        _in_range("--seed", self.seed, 0, 2**64 - 1)
        for distance in self.ahead:
            _in_range("--ahead", distance, 1, 99)
        if self.tokens < 1:
            raise UsageError("--prompt-tokens and --output-tokens leave no token to run")
        if self.ahead and self.recall < 1 and self.model.experts < 2 * self.model.top_k:
            raise UsageError("--recall below 1 needs at least twice as many experts as --top-k")
        if len(self.model.stacks) > 1 and not self.prompt_tokens:
            raise UsageError("--prompt-tokens 0: a model with an encoder needs a prompt")

    @property
    def tokens(self) -> int:
        """Tokens of a request that run through the model."""
        return self.prompt_tokens + self.decode_iterations

    @property
    def decode_iterations(self) -> int:
        """Decode iterations of a request."""
        return max(self.output_tokens - (1 if self.prompt_tokens else 0), 0)

    @property
    def score(self) -> str:
        """How weights come from the logits."""
        return self.model.score if self.model.score in SCORES else SCORES[0]


def synth_model(
    model: ModelProfile | None, layers: int | None, experts: int | None, top_k: int | None
) -> ModelProfile:
    """Return the model to imitate: a profile, or a stand-in of the given shape.

    Raises `UsageError` if a shape is missing, impossible, or not the model's.
    """
    given = {"--layers": layers, "--experts": experts, "--top-k": top_k}
    if model is not None:
        shape = {"--layers": model.layers, "--experts": model.experts, "--top-k": model.top_k}
        for option, value in given.items():
            if value not in (None, shape[option]):
                raise UsageError(f"{option} {value}: model {model.name} has {shape[option]}")
        return model
    missing = [option for option, value in given.items() if value is None]
    if layers is None or experts is None or top_k is None:
        raise UsageError(f"give {', '.join(missing)}, or a --model")
    try:
        made = ModelProfile.generic(layers, experts, top_k, "synthetic")
    except ProfileError as error:
        raise UsageError(f"{', '.join(given)}: {error}") from None
    return replace(made, score=SCORES[0])


def synthesise(
    dst: str | Path, options: Synth, progress: Callable[[int], None] | None = None
) -> TraceMeta:
    """Write the trace; return its metadata. Memory holds one request.

    `progress` is called with the number of requests written so far. Raises `UsageError` if `dst`
    cannot be written.
    """
    with TraceWriter(dst, _meta(options)) as writer:
        for number, rows in enumerate(synth_requests(options)):
            writer.write_request(rows)
            if progress is not None:
                progress(number + 1)
    return writer.meta


def synth_requests(options: Synth) -> Iterator[RequestRows]:
    """Yield the requests one by one."""
    world = _World(options)
    for number in range(options.requests):
        yield _request(options, world, number)


def _in_range(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{option} {value:g}: must be in {low:g}..{high:g}")


def _meta(options: Synth) -> TraceMeta:
    knobs = (
        f"skew {options.skew:g}, overlap {options.overlap:g}, topics {options.topics},"
        f" topic strength {options.topic_strength:g}, cross-layer {options.cross_layer:g}"
    )
    if options.ahead:
        knobs += f", recall {options.recall:g}"
    return TraceMeta(
        model=options.model,
        rank_order="weight",
        score=options.score,
        ahead=dict.fromkeys(options.ahead, options.model.top_k),
        has_weights=True,
        has_gate=options.gate,
        embedding="iteration" if options.embedding else "none",
        dataset="synthetic",
        seed=options.seed if options.seed < 2**63 else None,
        source="synthetic",
        notes=(f"made by moesim trace synth: {knobs}",),
    )


# ---- what all requests share ---------------------------------------------------------------------


def _bits(seed: int, request: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """Return `count` uint64 of one stream of one request."""
    return _generator(seed, request, stream).random_raw(count)


def _generator(seed: int, request: int, stream: int) -> np.random.Philox:
    key = np.array([seed, request], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def _levels(bits: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.uint16]:
    """Return `count` uint16 from bits, the same on machines of either byte order."""
    return bits.astype("<u8").view("<u2")[:count].astype(np.uint16, copy=False)


def _quantiles() -> Floats:
    """Return the normal quantile at the middle of each of 2**16 equal levels."""
    inverse = NormalDist().inv_cdf
    upper = [inverse((level + 0.5) / _LEVELS) for level in range(_LEVELS // 2, _LEVELS)]
    half = np.array(upper, dtype=np.float32)
    return np.concatenate((-half[::-1], half))


def _gumbel_table() -> Floats:
    """Return the Gumbel quantile of the normal CDF at equal steps of the normal value."""
    values = np.linspace(-_TABLE_RANGE, _TABLE_RANGE, _TABLE_STEPS + 1)
    below = [0.5 * math.erfc(-value / math.sqrt(2)) for value in values]
    above = [0.5 * math.erfc(value / math.sqrt(2)) for value in values]
    return np.array(
        [
            -math.log(-math.log1p(-over)) if over < 0.5 else -math.log(-math.log(under))
            for under, over in zip(below, above, strict=True)
        ],
        dtype=np.float32,
    )


class _World:
    """Popularity, topics and renamings: drawn once from the seed, the same for all requests."""

    def __init__(self, options: Synth) -> None:
        layers, experts = options.model.layers, options.model.experts
        shape = (layers, experts)
        self.normal = _quantiles()
        self.gumbel = _gumbel_table()
        ranks = np.argsort(_bits(options.seed, _WORLD, 0, layers * experts).reshape(shape), axis=1)
        self.bias = np.empty(shape, dtype=np.float32)
        popularity = -options.skew * np.log(np.arange(1, experts + 1))
        np.put_along_axis(self.bias, ranks, popularity[None, :].astype(np.float32), axis=1)
        renamed = _bits(options.seed, _WORLD, 1, layers * experts).reshape(shape)
        self.renaming = np.argsort(renamed, axis=1).astype(np.int64)

    def topic_bias(self, options: Synth, topic: int) -> Floats:
        """Return popularity and topic together, [layers, experts]."""
        if not options.topic_strength:
            return self.bias
        vector = self.draw(options.seed, _WORLD, 16 + topic, self.bias.size)
        return self.bias + np.float32(options.topic_strength) * vector.reshape(self.bias.shape)

    def draw(self, seed: int, request: int, stream: int, count: int) -> Floats:
        """Return `count` standard normal numbers of one stream."""
        bits = _bits(seed, request, stream, -(-count // 4))
        return self.normal[_levels(bits, count)]

    def centre(self, options: Synth, topic: int) -> Floats:
        """Return the middle of a topic's embeddings, of length about 1."""
        vector = self.draw(options.seed, _WORLD - 1, topic, options.embedding)
        return vector / np.float32(math.sqrt(options.embedding))


# ---- one request ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Cells:
    """A request's cells, token-major."""

    experts: npt.NDArray[np.uint16]
    """[tokens, layers, k]."""
    weights: Halves
    gate: Halves | None
    """[tokens, layers, E]."""


def _request(options: Synth, world: _World, number: int) -> RequestRows:
    topic = int(_bits(options.seed, number, _FACTS, 1)[0] % np.uint64(options.topics))
    cells = _cells(options, world, number, topic)
    rows = _joined([_part(options, cells, number, part) for part in _parts(options)])
    return replace(
        rows,
        embedding=_embeddings(options, world, number, topic, rows),
        facts=RequestFacts(
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            topic=f"topic-{topic}",
        ),
    )


def _cells(options: Synth, world: _World, number: int, topic: int) -> _Cells:
    """Draw the request's cells, some tokens at a time."""
    model, tokens = options.model, options.tokens
    layers, experts, k = model.layers, model.experts, model.top_k
    bias = world.topic_bias(options, topic)
    state = np.zeros((layers + 1, experts), dtype=np.float32)
    values = (layers + 1) * experts
    words = -(-values // 4)
    chunk = max(1, _CHUNK_VALUES // values)
    generator = _generator(options.seed, number, _NOISE)
    ids = np.empty((tokens, layers, k), dtype=np.uint16)
    weights = np.empty((tokens, layers, k), dtype=np.float16)
    gate = np.empty((tokens, layers, experts), dtype=np.float16) if options.gate else None
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        raw = generator.random_raw(count * words).astype("<u8").view("<u2")
        noise = raw.reshape(count, 4 * words)[:, :values].reshape(count, layers + 1, experts)
        logits = np.empty((count, layers, experts), dtype=np.float32)
        _LOGITS(
            noise,
            state,
            start == 0,
            *(np.float32(x) for x in _mix(options)),
            world.normal,
            world.gumbel,
            world.renaming,
            bias,
            logits,
        )
        part = slice(start, start + count)
        best = np.empty((count, layers, k), dtype=np.float32)
        _LARGEST(logits, ids[part], best)
        weights[part] = _weights(best, logits, options.score)
        if gate is not None:
            gate[part] = logits
    return _Cells(ids, weights, gate)


def _mix(options: Synth) -> tuple[float, float, float, float]:
    """Return memory and innovation of the process, shares of the common and the own latent."""
    memory, common = options.overlap, options.cross_layer
    return memory, math.sqrt(1 - memory**2), math.sqrt(common), math.sqrt(1 - common)


def _weights(best: Floats, logits: Floats, score: str) -> Floats:
    """Return what the model multiplies with, from the chosen logits [..., k] (descending)."""
    top = best[..., :1]
    if score == "sigmoid-bias-scale":
        gates = 0.5 + 0.5 * np.tanh(0.5 * best)
        return np.asarray(gates / gates.sum(axis=-1, keepdims=True))
    odds = np.exp(best - top)
    over = np.exp(logits - top) if score == "softmax" else odds
    return np.asarray(odds / over.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, slots=True)
class _Part:
    """The tokens that run through one stack of layers."""

    first_layer: int
    end_layer: int
    first_token: int
    end_token: int
    prefill_tokens: int


def _parts(options: Synth) -> list[_Part]:
    prompt, tokens, layers = options.prompt_tokens, options.tokens, options.model.layers
    stacks = options.model.stacks
    if len(stacks) == 1:
        through = prompt if stacks[0].name == "encoder" else tokens
        return [_Part(0, layers, 0, through, prompt)]
    # The encoder sees the prompt; the decoder begins with one token in the same iteration.
    encoder = stacks[0].layers
    return [
        _Part(0, encoder, 0, prompt, prompt),
        _Part(encoder, layers, prompt - 1, tokens, 1),
    ]


def _part(options: Synth, cells: _Cells, number: int, part: _Part) -> RequestRows:
    cut = (slice(part.first_token, part.end_token), slice(part.first_layer, part.end_layer))
    experts = cells.experts[cut]
    layout = Layout(len(experts), part.end_layer - part.first_layer, part.prefill_tokens)
    ahead = {
        distance: layout.rows(_predicted(options, experts, number, distance))
        for distance in options.ahead
    }
    rows = layout.request(
        number,
        experts,
        weights=layout.rows(cells.weights[cut]),
        gate=None if cells.gate is None else layout.rows(cells.gate[cut]),
        ahead=ahead,
    )
    return replace(rows, layer=rows.layer + np.int16(part.first_layer))


def _joined(parts: list[RequestRows]) -> RequestRows:
    """Join stacks; the first has prefill only, so the rows stay in order."""
    if len(parts) == 1:
        return parts[0]

    def join(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    names = ("iteration", "position", "layer", "phase", "experts", "weights", "gate")
    columns = {name: join(name) for name in names}
    ahead = {
        distance: np.concatenate([part.ahead[distance] for part in parts])
        for distance in parts[0].ahead
    }
    starts = iteration_starts(columns["iteration"])
    return RequestRows(request=parts[0].request, starts=starts, ahead=ahead, **columns)


def _predicted(options: Synth, experts: AnyArray, number: int, distance: int) -> AnyArray:
    """Return predictions for `distance` layers on, [tokens, layers, k]; none for the last ones."""
    predicted = np.full_like(experts, DROPPED)
    true = np.ascontiguousarray(experts[:, distance:])
    if not true.size:
        return predicted
    stream = _AHEAD + distance
    bits = _bits(options.seed, number, stream, true.size).reshape(true.shape)
    keep = (bits >> np.uint64(32)).astype(np.int64) < round(options.recall * 2**32)
    start = ((bits & np.uint64(0xFFFFFFFF)) % np.uint64(options.model.experts)).astype(np.int64)
    _MISTAKE(true, keep, start, options.model.experts)
    predicted[:, : true.shape[1]] = true
    return predicted


def _embeddings(
    options: Synth, world: _World, number: int, topic: int, rows: RequestRows
) -> dict[int, Halves]:
    """Return iteration -> embedding: the topic's middle, the request's share, a little noise."""
    if not options.embedding:
        return {}
    iterations = rows.iteration[rows.starts[:-1]].tolist()
    count = (len(iterations) + 1) * options.embedding
    noise = world.draw(options.seed, number, _EMBEDDING, count).reshape(-1, options.embedding)
    noise = noise / np.float32(math.sqrt(options.embedding))
    base = world.centre(options, topic) + np.float32(0.5) * noise[0]
    vectors = (base + np.float32(0.25) * noise[1:]).astype(np.float16)
    return dict(zip(iterations, vectors, strict=True))


# ---- kernels -------------------------------------------------------------------------------------


def _logits(
    noise: npt.NDArray[np.uint16],
    state: Floats,
    first: bool,
    memory: np.float32,
    innovation: np.float32,
    common: np.float32,
    own: np.float32,
    normal: Floats,
    gumbel: Floats,
    renaming: npt.NDArray[np.int64],
    bias: Floats,
    logits: Floats,
) -> None:
    """Advance the latents `state` [layers + 1, E] over the tokens; fill `logits`.

    A logit is rounded to 11 significant bits (Veltkamp's split), so float16 holds it exactly: the
    choice made here is the choice that the recorded gate shows.
    """
    tokens, layers, experts = logits.shape
    reach = np.float32(_TABLE_RANGE)
    scale = np.float32(_TABLE_STEPS / (2 * _TABLE_RANGE))
    split = np.float32(8193)
    tiny = np.float32(2.0**-14)
    for token in range(tokens):
        begin = first and token == 0
        for latent in range(layers + 1):
            for expert in range(experts):
                fresh = normal[noise[token, latent, expert]]
                if begin:
                    state[latent, expert] = fresh
                else:
                    state[latent, expert] = memory * state[latent, expert] + innovation * fresh
        for layer in range(layers):
            for expert in range(experts):
                z = common * state[layers, renaming[layer, expert]] + own * state[layer, expert]
                place = (min(max(z, -reach), reach) + reach) * scale
                step = min(int(place), _TABLE_STEPS - 1)
                low = gumbel[step]
                x = (
                    bias[layer, expert]
                    + low
                    + (gumbel[step + 1] - low) * (place - np.float32(step))
                )
                big = split * x
                x = big - (big - x)
                logits[token, layer, expert] = x if abs(x) >= tiny else np.float32(0)


def _largest(logits: Floats, ids: npt.NDArray[np.uint16], best: Floats) -> None:
    """Fill the k largest logits of each cell, descending, and their ids; ties to the lowest id."""
    tokens, layers, experts = logits.shape
    k = ids.shape[2]
    for token in range(tokens):
        for layer in range(layers):
            filled = 0
            for expert in range(experts):
                x = logits[token, layer, expert]
                if filled == k and x <= best[token, layer, k - 1]:
                    continue
                place = filled if filled < k else k - 1
                while place > 0 and best[token, layer, place - 1] < x:
                    best[token, layer, place] = best[token, layer, place - 1]
                    ids[token, layer, place] = ids[token, layer, place - 1]
                    place -= 1
                best[token, layer, place] = x
                ids[token, layer, place] = expert
                if filled < k:
                    filled += 1


def _mistake(
    experts: npt.NDArray[np.uint16],
    keep: npt.NDArray[np.bool_],
    start: npt.NDArray[np.int64],
    count: int,
) -> None:
    """Replace, in place, each expert not kept by one that its cell did not choose."""
    tokens, layers, k = experts.shape
    used = np.zeros(count, dtype=np.bool_)
    for token in range(tokens):
        for layer in range(layers):
            used[:] = False
            for rank in range(k):
                used[experts[token, layer, rank]] = True
            for rank in range(k):
                if not keep[token, layer, rank]:
                    other = start[token, layer, rank]
                    while used[other]:
                        other = other + 1 if other + 1 < count else 0
                    used[other] = True
                    experts[token, layer, rank] = other


_JIT: Any = numba.njit(nogil=True)
_LOGITS: Any = _JIT(_logits)
_LARGEST: Any = _JIT(_largest)
_MISTAKE: Any = _JIT(_mistake)
