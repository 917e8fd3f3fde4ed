"""In ``flat`` mode moesim is a generic cache simulator, and counts what libCacheSim counts.

LRU, FIFO, LFU in-cache and MIN forced against libCacheSim's LRU, FIFO, LFU and Belady. Its licence
keeps it in an environment of its own. Counts that it made on small streams are stored in
``data/libcachesim.json`` and compared everywhere. Where ``MOESIM_LIBCACHESIM_PYTHON`` names an
interpreter that has it, it also runs here, on larger streams and on recorded routing.

The stored counts are made anew only by

    PYTHONPATH=. python tests/test_libcachesim.py --write PYTHON

where PYTHON is an interpreter that has libCacheSim.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moesim.engine.setup import Options
from moesim.profile import ModelProfile, load_hardware
from moesim.replays import Request, replay
from moesim.traces.convert import convert
from moesim.traces.head import head
from moesim.traces.reader import Columns, TraceReader
from moesim.traces.synth import Synth, synthesise

HERE = Path(__file__).parent
SCRIPT = HERE / "libcachesim_counts.py"
STORED = HERE / "data" / "libcachesim.json"
VARIABLE = "MOESIM_LIBCACHESIM_PYTHON"
COMMAND = "PYTHONPATH=. python tests/test_libcachesim.py --write PYTHON"

TWINS = {"lru": "LRU", "fifo": "FIFO", "lfu-incache": "LFU", "min": "Belady"}
"""moesim's name -> libCacheSim's."""

DROPPED = 65535
Array = npt.NDArray[Any]
Counted = Mapping[str, Any]


# ---- streams -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """Routing as arrays, and the capacities to count it at.

    choices : uint16 [tokens, layers, k]. lengths : tokens of each sequence.
    whole : capacities of one cache for all layers, in experts. each : of one cache a layer.
    """

    name: str
    choices: Array
    experts: int
    lengths: tuple[int, ...]
    phase: str
    whole: tuple[int, ...]
    each: tuple[int, ...]

    @property
    def layers(self) -> int:
        return self.choices.shape[1]

    def stream(self, layer: int | None = None) -> Array:
        """Expert ids in the order of access, int64: of one layer, or of all."""
        ids = self.choices.astype(np.int64)
        kept = ids != DROPPED
        ids += np.arange(self.layers)[:, None] * self.experts
        if self.phase == "decode":
            order = [(ids[t], kept[t]) for t in range(len(ids))]
        else:
            bounds = pairwise(np.cumsum([0, *self.lengths]).tolist())
            order = [(ids[a:b].swapaxes(0, 1), kept[a:b].swapaxes(0, 1)) for a, b in bounds]
        stream = np.concatenate([i[k] for i, k in order])
        return stream if layer is None else stream[stream // self.experts == layer]

    def jobs(self) -> dict[str, tuple[Array, tuple[int, ...]]]:
        """Name of a stream -> the stream, its capacities."""
        jobs = {self.name: (self.stream(), self.whole)} if self.whole else {}
        for layer in range(self.layers if self.each else 0):
            jobs[f"{self.name}-layer{layer}"] = (self.stream(layer), self.each)
        return jobs

    def trace(self, folder: Path) -> Path:
        source, target = folder / f"{self.name}.npz", folder / f"{self.name}.parquet"
        offsets = np.cumsum([0, *self.lengths])
        np.savez(source, experts=self.choices, seq_offsets=offsets)
        model = ModelProfile.generic(self.layers, self.experts, self.choices.shape[2])
        convert(source, target, model=model, phase=self.phase)
        return target


def drawn(seed: int, tokens: int, layers: int, top_k: int, weights: Array) -> Array:
    """The k smallest of random whole number times weight; ``weights`` [.., experts] broadcast."""
    shape = (tokens, layers, weights.shape[-1])
    # Raw bits and whole numbers only: every NumPy on every machine draws the same.
    bits = np.random.Philox(key=seed).random_raw(int(np.prod(shape))).reshape(shape) >> np.uint64(
        16
    )
    scores = bits * weights.astype(np.uint64)
    return np.argsort(scores, axis=-1, kind="stable")[..., :top_k].astype(np.uint16)


def skewed() -> Routing:
    """A few experts do most of the work."""
    rank = (np.arange(12) * 5 + 3 * np.arange(3)[:, None]) % 12
    choices = drawn(1, 80, 3, 2, rank + 1)
    return Routing("skewed", choices, 12, (80,), "decode", (1, 2, 7, 18, 36), (1, 2, 5, 12))


def uniform() -> Routing:
    """No structure, one layer of many experts."""
    choices = drawn(2, 100, 1, 4, np.ones(64))
    return Routing("uniform", choices, 64, (60, 40), "decode", (1, 4, 16, 63, 64), (16,))


def cyclic() -> Routing:
    """Round and round: LRU and FIFO hit nothing below the whole circle."""
    token, layer, rank = np.ogrid[:60, :2, :3]
    choices = ((3 * token + rank + layer) % 9).astype(np.uint16)
    return Routing("cyclic", choices, 9, (60,), "decode", (1, 6, 17, 18), (1, 3, 8, 9))


def shifting() -> Routing:
    """Popularity moves on, so old counts mislead."""
    era = np.arange(120)[:, None, None] // 30
    rank = (np.arange(16) + 5 * era + np.arange(2)[:, None]) % 16
    choices = drawn(3, 120, 2, 2, (rank + 1) ** 2)
    return Routing("shifting", choices, 16, (70, 50), "decode", (3, 8, 20), (2, 4, 10))


def sticky() -> Routing:
    """A token mostly takes the expert of the one before."""
    choices = drawn(4, 100, 4, 1, np.ones(8))
    stays = np.random.Philox(key=5).random_raw(400).reshape(100, 4, 1) % 3 > 0
    for token in range(1, 100):
        choices[token] = np.where(stays[token], choices[token - 1], choices[token])
    return Routing("sticky", choices, 8, (100,), "decode", (2, 4, 9, 31, 32), (1, 2, 4))


def prompts() -> Routing:
    """Prefills: all tokens of a prompt in a layer, then the next layer."""
    rank = (np.arange(16) * 7 + np.arange(2)[:, None]) % 16
    choices = drawn(6, 50, 2, 4, rank + 1)
    return Routing("prompts", choices, 16, (20, 1, 29), "prefill", (1, 6, 16, 32), (2, 4, 9, 16))


SHAPES = {r.name: r for r in (skewed(), uniform(), cyclic(), shifting(), sticky(), prompts())}


# ---- both sides ----------------------------------------------------------------------------------


def flat(trace: Path, policies: Sequence[str], scope: str, capacities: Sequence[str]) -> list[Any]:
    """The runs of one replay, every access on its own."""
    answer = replay(
        Request(
            trace=trace,
            hardware=load_hardware("rtx4090"),
            policies=policies,
            capacities=capacities,
            scope=scope,
            options=Options(flat=True, check=True),
        )
    )
    runs: list[Any] = answer["runs"]
    return runs


def counts_of(run: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return run["accesses"], run["hits"], run["misses"], run["loads"]


def as_run(accesses: int, hits: int) -> tuple[int, int, int, int]:
    """Every miss is admitted, so it is a load."""
    return accesses, hits, accesses - hits, accesses - hits


def compare(routing: Routing, trace: Path, counted: Counted, policies: Sequence[str]) -> None:
    """Every capacity of the routing, one cache for all layers and one a layer."""
    if routing.whole:
        expected = counted[routing.name]
        runs = flat(trace, policies, "global", [str(c) for c in routing.whole])
        for run in runs:
            hits = expected["hits"][TWINS[run["policy"]]][run["capacity"]]
            assert counts_of(run) == as_run(expected["accesses"], hits), (
                run["policy"],
                run["capacity"],
            )
        assert len(runs) == len(policies) * len(routing.whole)
    if routing.each:
        parts = [counted[f"{routing.name}-layer{layer}"] for layer in range(routing.layers)]
        runs = flat(trace, policies, "layer", [str(c * routing.layers) for c in routing.each])
        for run in runs:
            own = str(int(run["capacity"]) // routing.layers)
            hits = sum(part["hits"][TWINS[run["policy"]]][own] for part in parts)
            accesses = sum(part["accesses"] for part in parts)
            assert counts_of(run) == as_run(accesses, hits), (run["policy"], f"{own}/layer")
        assert len(runs) == len(policies) * len(routing.each)


def count_live(
    python: str,
    jobs: Mapping[str, tuple[Array, Sequence[int]]],
    folder: Path,
    policies: Sequence[str] = tuple(TWINS.values()),
) -> dict[str, Any]:
    """What libCacheSim counts now."""
    arguments = []
    for name, (stream, capacities) in jobs.items():
        path = folder / f"{name}.npy"
        np.save(path, stream)
        arguments.append(f"{path}={','.join(map(str, capacities))}")
    command = [python, str(SCRIPT), "--policies", ",".join(policies), *arguments]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    counted: dict[str, Any] = json.loads(answer.stdout)
    return counted


# ---- everywhere: stored counts -------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored() -> Counted:
    streams: Counted = json.loads(STORED.read_text())["streams"]
    return streams


@pytest.mark.parametrize("name", SHAPES)
def test_the_streams_are_those_that_were_counted(name: str, stored: Counted) -> None:
    for stream, (ids, capacities) in SHAPES[name].jobs().items():
        assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == stored[stream]["sha256"]
        for twin in TWINS.values():
            assert list(stored[stream]["hits"][twin]) == [str(c) for c in capacities]


@pytest.mark.parametrize("policy", TWINS)
@pytest.mark.parametrize("name", SHAPES)
def test_flat_replay_equals_stored_counts(
    name: str, policy: str, stored: Counted, tmp_path: Path
) -> None:
    routing = SHAPES[name]
    compare(routing, routing.trace(tmp_path), stored, [policy])


@pytest.mark.parametrize("layer", range(3))
def test_a_layer_alone_equals_stored_counts(layer: int, stored: Counted, tmp_path: Path) -> None:
    whole = SHAPES["skewed"]
    only = whole.choices[:, layer : layer + 1]
    alone = Routing("alone", only, whole.experts, whole.lengths, whole.phase, whole.each[1:3], ())
    counted = {"alone": stored[f"skewed-layer{layer}"]}
    compare(alone, alone.trace(tmp_path), counted, list(TWINS))


def test_dropped_slots_are_no_accesses(tmp_path: Path) -> None:
    """A third of the slots dropped: what remains is counted as if it had come alone."""
    routing = SHAPES["uniform"]
    choices = routing.choices.copy()
    choices[::2, :, 3] = DROPPED
    choices[5:9] = DROPPED
    some = Routing("dropped", choices, 64, (100,), "decode", (4, 16), ())
    stream = some.stream()
    assert len(stream) < 350
    single = stream.astype(np.uint16)[:, None, None]
    same = Routing("single", single, 64, (len(stream),), "decode", (4, 16), ())
    runs = [
        flat(r.trace(tmp_path), list(TWINS), "global", [str(c) for c in r.whole])
        for r in (some, same)
    ]
    assert [counts_of(run) for run in runs[0]] == [counts_of(run) for run in runs[1]]
    assert runs[0][0]["accesses"] == len(stream)


# ---- where libCacheSim is ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter with libCacheSim."""
    named = os.environ.get(VARIABLE)
    if not named:
        pytest.skip(f"{VARIABLE} names no interpreter with libcachesim")
    return named


def test_live_counts_equal_stored_counts(python: str, stored: Counted, tmp_path: Path) -> None:
    jobs = {name: job for r in SHAPES.values() for name, job in r.jobs().items()}
    assert count_live(python, jobs, tmp_path)["streams"] == stored


def agree_live(routing: Routing, trace: Path, python: str, folder: Path) -> None:
    counted = count_live(python, routing.jobs(), folder)["streams"]
    compare(routing, trace, counted, list(TWINS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_flat_replay_equals_live_counts_on_synthetic_traces(
    seed: int, python: str, tmp_path: Path
) -> None:
    model = ModelProfile.generic(layers=4, experts=32, top_k=4)
    options = Synth(
        model=model,
        requests=5,
        prompt_tokens=0,
        output_tokens=50,
        skew=(0.0, 1.2)[seed],
        overlap=0.7,
        topics=4,
        topic_strength=1.0,
        seed=seed,
    )
    trace = tmp_path / "synth.parquet"
    synthesise(trace, options)
    with TraceReader(trace, Columns.experts_only()) as reader:
        choices = np.concatenate([r.experts for r in reader.requests()]).reshape(-1, 4, 4)
    routing = Routing("synth", choices, 32, (50,) * 5, "decode", (9, 40, 127), (3, 8))
    agree_live(routing, trace, python, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "experts", "tokens", "whole", "each"),
    [
        ("gpt-oss-20b/decode.npz", 32, 120, (192,), (8,)),
        ("esft-deepseek-v2-lite/law.npz", 64, 80, (416,), (16,)),
    ],
    ids=["gpt-oss", "esft-law"],
)
def test_flat_replay_equals_live_counts_on_recorded_routing(
    file: str,
    experts: int,
    tokens: int,
    whole: tuple[int, ...],
    each: tuple[int, ...],
    python: str,
    shared: Path,
    tmp_path: Path,
) -> None:
    source = shared / "data/traces" / file
    convert(source, tmp_path / "all.parquet", phase="decode", experts=experts)
    head(tmp_path / "all.parquet", tmp_path / "head.parquet", tokens=tokens)
    with np.load(source) as arrays:
        choices = arrays["experts"][:tokens].astype(np.uint16)
        if "weights_1e4" in arrays:  # the other file comes sorted
            order = np.argsort(-arrays["weights_1e4"][:tokens].astype(int), axis=-1, kind="stable")
            choices = np.take_along_axis(choices, order, axis=-1)
    routing = Routing("recorded", choices, experts, (tokens,), "decode", whole, each)
    agree_live(routing, tmp_path / "head.parquet", python, tmp_path)


@pytest.mark.slow
def test_live_lru_of_the_whole_gpt_oss_file(python: str, shared: Path, tmp_path: Path) -> None:
    """The published count of flat LRU, without moesim: 8 experts a layer, 189,976 tokens."""
    with np.load(shared / "data/traces/gpt-oss-20b/decode.npz") as arrays:
        experts = arrays["experts"]
    jobs = {f"layer{n}": (experts[:, n].reshape(-1).astype(np.int64), (8,)) for n in range(24)}
    streams = count_live(python, jobs, tmp_path, ["LRU"])["streams"]
    assert sum(s["accesses"] for s in streams.values()) == 18_237_696
    assert sum(s["hits"]["LRU"]["8"] for s in streams.values()) == 11_326_102


# ---- making the stored counts anew ---------------------------------------------------------------


def write(python: str) -> None:
    """Count the small streams with libCacheSim and store what it counts."""
    import tempfile

    jobs = {name: job for r in SHAPES.values() for name, job in r.jobs().items()}
    with tempfile.TemporaryDirectory() as folder:
        counted = count_live(python, jobs, Path(folder))
    whole = {"command": COMMAND, "libcachesim": counted["libcachesim"]}
    text = json.dumps(whole, indent=1)[:-2] + ',\n "streams": {\n'
    lines = [f"  {json.dumps(n)}: {json.dumps(s)}" for n, s in counted["streams"].items()]
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(text + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--write":
        sys.exit(f"usage: {COMMAND}")
    write(sys.argv[2])
