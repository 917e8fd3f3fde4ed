"""Generate for a batch of prompts with the gates tapped; hand over the rows of each request."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import transformers

from moesim.errors import TraceError
from moesim.traces.gate_taps import Forwards, GateTaps, Wanted
from moesim.traces.gates import Gates, input_device, is_encoder_decoder
from moesim.traces.reader import Halves, Int32s, RequestFacts, RequestRows
from moesim.traces.record_model import Loaded
from moesim.traces.record_rows import Batch, Pass, RanSequence, request_rows
from moesim.traces.schema import DROPPED

AnyArray = npt.NDArray[Any]
Tensor = Any

EMBEDDINGS: Final = ("none", "prompt", "iteration")


@dataclass(frozen=True, slots=True)
class Generation:
    """How to generate. Greedy unless `sample`, which takes the seed."""

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    """No end of sequence before so many tokens."""
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def in_words(self) -> str:
        """Return one line for the trace's notes."""
        how = "greedy"
        if self.sample:
            how = f"sampled, temperature {self.temperature:g}, top-p {self.top_p:g}"
        least = f", at least {self.min_new_tokens}" if self.min_new_tokens else ""
        return f"generation: {how}, at most {self.max_new_tokens} new tokens{least}"


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A prompt as the model takes it."""

    request: int
    tokens: Int32s
    facts: RequestFacts
    """Of the prompt; what comes of the run is added."""


class BatchRecorder:
    """Records batches of one model. Use as a context manager: the gates are tapped inside.

    `ticked` is called with the rows of each forward pass.
    """

    def __init__(
        self,
        loaded: Loaded,
        gates: Gates,
        wanted: Wanted,
        generation: Generation,
        *,
        embeddings: str = "none",
        ticked: Callable[[int], None] | None = None,
    ) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._gates = gates
        self._wanted = wanted
        self._generation = generation
        self._embeddings = embeddings
        self._taps = GateTaps(gates, wanted, ticked)
        self._special = _special_tokens(loaded)
        self._config = _generation_config(generation, self._special)

    def __enter__(self) -> BatchRecorder:
        self._taps.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._taps.__exit__(*error)

    def record(self, batch: Sequence[Encoded]) -> list[RequestRows]:
        """Generate for the batch; return its requests' rows, in order.

        Equal batches give equal rows, whatever was recorded before. Raises `TraceError` if the
        gates gave NaN, `torch.cuda.OutOfMemoryError` as it comes.
        """
        self._taps.start()
        sequences = self.generate(batch)
        passes = self._taps.take()
        outputs = self._outputs(sequences, _longest(batch))
        grouped = self._grouped(passes, len(batch))
        return [
            request_rows(grouped, number, self._ran(one, output, batch))
            for number, (one, output) in enumerate(zip(batch, outputs, strict=True))
        ]

    def generate(self, batch: Sequence[Encoded]) -> Tensor:
        """Generate for the batch as plain transformers does; token ids [batch, length]."""
        ids, mask = self._padded(batch)
        if self._generation.sample:
            torch.manual_seed(_seed(self._generation.seed, batch[0].request))
        with torch.no_grad():
            return self._model.generate(
                input_ids=ids, attention_mask=mask, generation_config=self._config
            )

    def _padded(self, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Pad on the left, or for an encoder on the right: there the capacity of an expert is
        filled in order of position."""
        width = _longest(batch)
        ids = np.full((len(batch), width), self._special["pad_token_id"], dtype=np.int64)
        mask = np.zeros((len(batch), width), dtype=np.int64)
        for row, one in enumerate(batch):
            length = len(one.tokens)
            at = slice(0, length) if self._has_encoder else slice(width - length, width)
            ids[row, at], mask[row, at] = one.tokens, 1
        device = input_device(self._model)
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

    @property
    def _has_encoder(self) -> bool:
        return is_encoder_decoder(self._model)

    def _outputs(self, sequences: Tensor, prompt: int) -> list[Int32s]:
        """Cut the generated tokens out of each sequence, up to and with its end token."""
        begin = 1 if self._has_encoder else prompt
        generated = sequences[:, begin:].cpu().numpy().astype(np.int32)
        ends = np.isin(generated, self._special["eos_token_id"])
        return [
            row[: int(end.argmax()) + 1 if end.any() else len(row)]
            for row, end in zip(generated, ends, strict=True)
        ]

    def _grouped(self, forwards: list[Forwards], batch: int) -> Batch:
        """Part the passes into the prefill, one of each stack, and the decoding ones."""
        ranges = _stack_ranges(self._gates)
        passes = [(one.stack, self._as_pass(one, ranges[one.stack], batch)) for one in forwards]
        prefill, decode, seen = [], [], set()
        for stack, one in passes:
            if stack in seen:
                decode.append(one)
                continue
            seen.add(stack)
            prefill.append(_cut(one, slice(0, 1)))
            decode.append(_cut(one, slice(1, None)))
        if seen != set(ranges):
            raise TraceError("the model generated without running all of its MoE layers")
        return Batch(tuple(prefill), tuple(decode))

    def _as_pass(self, forwards: Forwards, layers: tuple[int, int], batch: int) -> Pass:
        """Give every column its place: [T, layers, batch, length, width]."""
        columns: dict[str, AnyArray] = {"ids": forwards.ids, "weights": forwards.weights}
        if forwards.logits is not None:
            columns["logits"] = forwards.logits
        if forwards.norms is not None:
            columns["norms"] = forwards.norms[..., None]
        nothing = (forwards.ids[:, :0], forwards.weights[:, :0])
        for distance in self._wanted.ahead:
            ids, weights = forwards.ahead.get(distance, nothing)
            columns[f"ahead{distance}"] = _to_all_layers(ids, layers, DROPPED)
            columns[f"ahead{distance} weights"] = _to_all_layers(weights, layers, 0)
        shaped = {
            name: values.reshape(*values.shape[:2], batch, -1, values.shape[-1])
            for name, values in columns.items()
        }
        return Pass(layers, shaped)

    def _ran(self, one: Encoded, output: Int32s, batch: Sequence[Encoded]) -> RanSequence:
        start = self._special["decoder_start_token_id"] if self._has_encoder else None
        table = self._embedded(one, output, start)
        return RanSequence(
            request=one.request,
            prompt=one.tokens,
            padding=0 if self._has_encoder else _longest(batch) - len(one.tokens),
            output=output,
            start=start,
            facts=_facts(one, output, table.get(0) if self._embeddings == "prompt" else None),
            embedding=table if self._embeddings == "iteration" else {},
        )

    def _embedded(self, one: Encoded, output: Int32s, start: int | None) -> dict[int, Halves]:
        """Return iteration -> the model's own input embedding: the mean over the prompt's tokens,
        then that of the token that is run."""
        if self._embeddings == "none":
            return {}
        fed = output[:-1] if self._embeddings == "iteration" else output[:0]
        tokens = np.concatenate((one.tokens, fed)).astype(np.int64)
        with torch.no_grad():
            ids = torch.from_numpy(tokens).to(input_device(self._model))[None]
            table = self._model.get_input_embeddings()(ids)[0].float().cpu().numpy()
        prompt, rest = table[: len(one.tokens)], table[len(one.tokens) :]
        mean = prompt.mean(axis=0, dtype=np.float64).astype(np.float16)
        return {0: mean, **dict(enumerate(rest.astype(np.float16), start=1))}


def _longest(batch: Sequence[Encoded]) -> int:
    return max(len(one.tokens) for one in batch)


def _seed(seed: int, request: int) -> int:
    """Return the seed of a batch, from the recording's and its first request."""
    digest = hashlib.sha256(f"{seed} {request}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _facts(one: Encoded, output: Int32s, embedding: Halves | None) -> RequestFacts:
    known = one.facts
    return RequestFacts(
        prompt_tokens=len(one.tokens),
        output_tokens=len(output),
        topic=known.topic,
        split=known.split,
        prompt_digest=known.prompt_digest,
        prompt_embedding=embedding,
        text=known.text,
    )


# ---- generation ----------------------------------------------------------------------------------


def _special_tokens(loaded: Loaded) -> dict[str, Any]:
    """Return pad, end and start tokens: the model's, else the tokenizer's."""
    generation, config = loaded.model.generation_config, loaded.model.config

    def of(name: str) -> Any:
        for holder in (generation, config, loaded.tokenizer):
            value = getattr(holder, name, None)
            if value is not None:
                return value
        return None

    end = of("eos_token_id")
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    pad, start = of("pad_token_id"), of("decoder_start_token_id")
    pad = pad if isinstance(pad, int) else ends[0] if ends else 0
    return {
        "pad_token_id": pad,
        "eos_token_id": ends,
        "decoder_start_token_id": pad if start is None else start,
    }


def _generation_config(generation: Generation, special: Mapping[str, Any]) -> Any:
    """Return what `generate` takes. Of the settings that a model ships with, those that bend the
    choice of tokens are made neutral; what it forces (such as a first token) stays."""
    values: dict[str, Any] = {
        "max_new_tokens": generation.max_new_tokens,
        "min_new_tokens": generation.min_new_tokens or None,
        "do_sample": generation.sample,
        "num_beams": 1,
        "use_cache": True,
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "disable_compile": True,
        "pad_token_id": special["pad_token_id"],
        "eos_token_id": special["eos_token_id"] or None,
        "decoder_start_token_id": special["decoder_start_token_id"],
    }
    if generation.sample:
        values |= {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
        values |= {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_p": 0.0}
    return transformers.GenerationConfig(**values)


# ---- passes --------------------------------------------------------------------------------------


def _stack_ranges(gates: Gates) -> dict[str, tuple[int, int]]:
    ranges, first = {}, 0
    for name, layers in gates.stacks.items():
        ranges[name] = (first, first + len(layers))
        first += len(layers)
    return ranges


def _to_all_layers(values: AnyArray, layers: tuple[int, int], nothing: int) -> AnyArray:
    """Add the layers that see no other one at that distance."""
    missing = layers[1] - layers[0] - values.shape[1]
    widths = [(0, missing) if axis == 1 else (0, 0) for axis in range(values.ndim)]
    return np.pad(values, widths, constant_values=nothing)


def _cut(one: Pass, passes: slice) -> Pass:
    return Pass(one.layers, {name: values[passes] for name, values in one.columns.items()})
