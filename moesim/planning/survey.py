"""What a planner reads from the profiling trace: how often each expert is used, how long requests
are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from moesim.past import Share, requests_of
from moesim.planning.space import FloatArray
from moesim.traces.check import check_request
from moesim.traces.reader import TraceReader
from moesim.traces.schema import TraceMeta
from moesim.types import DROPPED, IntArray, Phase
from moesim.workload import Inputs, Work, prepare


@dataclass(frozen=True, slots=True)
class Survey:
    """Facts of a trace.

    uses : int64 [layers, experts], how many tokens chose each expert.
    """

    top_k: int
    requests: int
    uses: IntArray
    mean_prompt: float
    mean_decodes: float
    """Decoding passes of a request."""
    mean_context: float
    """Cached positions that a decoding pass reads."""
    longest: int
    """Positions of the longest request."""
    widest: int
    """Tokens of the widest pass."""

    def missed_shares(self) -> FloatArray:
        """float64 [layers, experts + 1]: share of uses outside each layer's n most used experts."""
        ordered = -np.sort(-self.uses, axis=1).astype(np.float64)
        total = np.maximum(ordered.sum(axis=1, keepdims=True), 1)
        kept = np.concatenate((np.zeros((len(ordered), 1)), np.cumsum(ordered, axis=1)), axis=1)
        shares: FloatArray = 1 - kept / total
        return shares


def survey(trace: Path, share: Share | None = None, limit: int | None = None) -> Survey:
    """Read a trace once. Raises TraceError for what cannot be read."""
    with TraceReader(trace, Inputs().columns()) as reader:
        meta = reader.meta
        uses = np.zeros(meta.layers * meta.experts, np.int64)
        shapes = []
        for index, rows in enumerate(islice(requests_of(reader, share), limit)):
            check_request(rows, meta, trace)
            work = prepare(index, rows, meta, Inputs())
            uses += _uses(work, meta)
            shapes.append(_shape(work))
    prompts, decodes, contexts, widest = np.array(shapes, np.float64).reshape(-1, 4).T
    return Survey(
        top_k=meta.top_k,
        requests=len(shapes),
        uses=uses.reshape(meta.layers, meta.experts),
        mean_prompt=float(prompts.mean()),
        mean_decodes=float(decodes.mean()),
        mean_context=float((contexts * decodes).sum() / max(1, decodes.sum())),
        longest=int((prompts + decodes).max()),
        widest=int(widest.max()),
    )


def _uses(work: Work, meta: TraceMeta) -> IntArray:
    rows = work.rows
    experts = rows.experts.astype(np.int64)
    ids = rows.layer.astype(np.int64)[:, None] * meta.experts + experts
    return np.bincount(ids[experts != DROPPED], minlength=meta.layers * meta.experts)


def _shape(work: Work) -> tuple[int, int, float, int]:
    """(prompt tokens, decoding passes, mean context of those, tokens of the widest pass)."""
    prompt = decodes = 0
    for number in range(work.iterations):
        if work.phase(number) == Phase.PREFILL:
            prompt += work.tokens(number)
        else:
            decodes += work.tokens(number)
    prompt = prompt or work.rows.facts.prompt_tokens or 0
    return prompt, decodes, prompt + (decodes + 1) / 2, max(work.pass_tokens)
