"""Exact counts: unique experts per layer event, cold start, no prefetch, equal and not close.

The toy and the heads of recorded traces go through the command line, as a user's would. What is
expected of the toy and of whole files is written down; of heads, a second model below counts it,
which shares no line with the engine and is held to the published counts itself. Recorded traces
are read as decode, in the order of the file, with the cache kept across sequences. Whole files
take minutes each: ``-m whole`` runs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

ROOT = Path(__file__).resolve().parents[1]
NEVER = 1 << 60

Array = npt.NDArray[Any]
Event = tuple[int, list[int]]
"""Layer, experts in demand order."""


class Row(NamedTuple):
    """One published count. ``tokens``: of the file's head, 0 for all of it."""

    trace: str
    tokens: int
    capacity: str
    policy: str
    mode: str
    hits: int
    accesses: int

    def __str__(self) -> str:
        return f"{self.trace}-{self.capacity.replace('/', '-')}-{self.policy}-{self.mode}"


class Source(NamedTuple):
    """A recorded trace: its file, model profile, shape, and the order of a token's experts."""

    file: str
    model: str
    experts: int
    head: int
    weights: str


SOURCES = {
    "gpt-oss": Source("gpt-oss-20b/decode.npz", "gpt-oss-20b", 32, 160, "weights_u8"),
    "law": Source("esft-deepseek-v2-lite/law.npz", "deepseek-v2-lite", 64, 230, "weights_1e4"),
}
"""``head``: tokens that a test without a mark replays; those of the law cross into its second
sequence."""

GPT, LAW, HEAD = 18_237_696, 1_299_012, 1_920_000
ROWS = [
    Row("gpt-oss", 0, "8/layer", "lru", "group", 11_833_869, GPT),
    Row("gpt-oss", 0, "8/layer", "lru", "flat", 11_326_102, GPT),
    Row("gpt-oss", 0, "8/layer", "lfu", "group", 11_310_688, GPT),
    Row("gpt-oss", 0, "192", "lru", "group", 11_068_927, GPT),
    Row("gpt-oss", 0, "16/layer", "lru", "group", 16_325_048, GPT),
    Row("gpt-oss", 0, "16/layer", "lfu", "group", 15_652_882, GPT),
    Row("gpt-oss", 0, "384", "lru", "group", 16_547_471, GPT),
    Row("gpt-oss", 20_000, "8/layer", "min-bypass", "group", 1_568_229, HEAD),
    Row("gpt-oss", 20_000, "8/layer", "min", "group", 1_503_153, HEAD),
    Row("law", 0, "16/layer", "lru", "group", 643_367, LAW),
    Row("law", 0, "16/layer", "lfu", "group", 654_848, LAW),
    Row("law", 0, "16/layer", "min-bypass", "group", 924_215, LAW),
    Row("law", 0, "16/layer", "min", "group", 883_017, LAW),
    Row("law", 0, "16/layer", "lru", "flat", 614_559, LAW),
]


# ---- the command line ----------------------------------------------------------------------------


def moesim(*arguments: object) -> Any:
    """Run a command with ``--json``; what it prints."""
    command = [sys.executable, "-m", "moesim", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def replayed(trace: Path, policies: str, capacities: str, mode: str = "group") -> list[Any]:
    answer = moesim(
        "replay", "--trace", trace, "--policy", policies, "--capacity", capacities, "--mode", mode
    )
    runs: list[Any] = answer["runs"]
    return runs


def assert_counts(run: Any, hits: int, accesses: int) -> None:
    """All of it is decode, every miss a load."""
    misses = accesses - hits
    expected = {"accesses": accesses, "hits": hits, "late_hits": 0, "misses": misses}
    for part in (run, run["decode"]):
        assert {name: part[name] for name in expected} == expected
    assert run["prefill"]["accesses"] == 0
    assert run["loads"] == misses


# ---- the second model ----------------------------------------------------------------------------


def grouped(choices: Array, experts: int) -> Iterator[Event]:
    """A token's experts in a layer together."""
    for token in choices.astype(np.int64):
        for layer, row in enumerate(token):
            yield layer, (layer * experts + row).tolist()


def single(choices: Array, experts: int) -> Iterator[Event]:
    """Each on its own."""
    for layer, row in grouped(choices, experts):
        for expert in row:
            yield layer, [expert]


def caches_of(events: list[Event], capacity: str) -> Iterator[tuple[int, list[list[int]]]]:
    """The demands that each cache sees and its capacity in experts."""
    if not capacity.endswith("/layer"):
        yield int(capacity), [demand for _, demand in events]
        return
    by_layer: dict[int, list[list[int]]] = defaultdict(list)
    for layer, demand in events:
        by_layer[layer].append(demand)
    for demands in by_layer.values():
        yield int(capacity.removesuffix("/layer")), demands


def lru(demands: list[list[int]], capacity: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for demand in demands:
        hits += sum(expert in held for expert in demand)
        for expert in demand:
            held[expert] = None
            held.move_to_end(expert)
        while len(held) > capacity:
            held.popitem(last=False)
    return hits


def lfu(demands: list[list[int]], capacity: int) -> int:
    """Counts survive eviction; equal counts go by the oldest touch."""
    count: dict[int, int] = defaultdict(int)
    touched: dict[int, int] = {}
    held: set[int] = set()
    hits = clock = 0
    for demand in demands:
        hits += sum(expert in held for expert in demand)
        for expert in demand:
            clock += 1
            count[expert] += 1
            touched[expert] = clock
        held.update(demand)
        for _ in range(len(held) - capacity):
            held.remove(min(held.difference(demand), key=lambda e: (count[e], touched[e])))
    return hits


def next_uses(demands: list[list[int]]) -> list[dict[int, int]]:
    """For each demand: its experts -> the next demand that names them."""
    following: list[dict[int, int]] = []
    ahead: dict[int, int] = {}
    for index in reversed(range(len(demands))):
        following.append({expert: ahead.get(expert, NEVER) for expert in demands[index]})
        ahead.update(dict.fromkeys(demands[index], index))
    return following[::-1]


def min_forced(demands: list[list[int]], capacity: int) -> int:
    held: dict[int, int] = {}
    hits = 0
    for demand, following in zip(demands, next_uses(demands), strict=True):
        hits += sum(expert in held for expert in demand)
        held.update(following)
        for _ in range(len(held) - capacity):
            del held[max(held.keys() - following.keys(), key=lambda e: held[e])]
    return hits


def min_bypass(demands: list[list[int]], capacity: int) -> int:
    held: dict[int, int] = {}
    hits = 0
    for demand, following in zip(demands, next_uses(demands), strict=True):
        hits += sum(expert in held for expert in demand)
        held.update(following)
        nearest = sorted(held, key=lambda e: held[e])[:capacity]
        held = {expert: held[expert] for expert in nearest}
    return hits


MODELS: dict[str, Callable[[list[list[int]], int], int]] = {
    "lru": lru,
    "lfu": lfu,
    "min": min_forced,
    "min-bypass": min_bypass,
}


def counted(choices: Array, experts: int, policy: str, capacity: str, mode: str) -> int:
    """Hits by the second model. Needs capacities of at least k experts."""
    cut = single if mode == "flat" else grouped
    caches = caches_of(list(cut(choices, experts)), capacity)
    return sum(MODELS[policy](demands, size) for size, demands in caches)


# ---- the toy -------------------------------------------------------------------------------------

TOY = np.array([[[0, 1]] * 3, [[0, 2]] * 3, [[0, 1]] * 3, [[0, 3]] * 3, [[0, 1]] * 3], np.uint8)
TOY_HITS = {"lru": 12, "lfu": 12, "min": 12, "min-bypass": 18}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    np.savez(folder / "toy.npz", experts=TOY)
    moesim("trace", "convert", folder / "toy.npz", folder / "toy.parquet", "--phase", "decode")
    return folder / "toy.parquet"


def test_toy(toy: Path) -> None:
    runs = replayed(toy, ",".join(TOY_HITS), "2/layer")
    assert [run["policy"] for run in runs] == list(TOY_HITS)
    for run in runs:
        assert_counts(run, TOY_HITS[run["policy"]], 30)
        assert run["oracle"] == run["policy"].startswith("min")


@pytest.mark.parametrize("policy", TOY_HITS)
def test_the_second_model_agrees_on_the_toy(policy: str) -> None:
    assert counted(TOY, 4, policy, "2/layer", "group") == TOY_HITS[policy]


# ---- recorded traces -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """(name, tokens) -> the converted file, or its head; each is made once."""
    folder = tmp_path_factory.mktemp("traces")

    def made(name: str, tokens: int) -> Path:
        path = folder / f"{name}-{tokens}.parquet"
        if path.exists():
            return path
        if tokens:
            moesim("trace", "head", made(name, 0), path, "--tokens", tokens)
        else:
            source = SOURCES[name]
            file = shared / "data/traces" / source.file
            options = ("--model", source.model, "--phase", "decode")
            moesim("trace", "convert", file, path, *options)
        return path

    return made


def by_weight(path: Path, key: str, tokens: int) -> Array:
    """Expert ids [tokens, layers, k] by descending weight, equal weights as in the file."""
    with np.load(path) as arrays:
        experts, weights = arrays["experts"][:tokens], arrays[key][:tokens].astype(np.int64)
    return np.take_along_axis(experts, np.argsort(-weights, axis=-1, kind="stable"), axis=-1)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_head(row: Row, trace: Callable[[str, int], Path], shared: Path) -> None:
    source = SOURCES[row.trace]
    choices = by_weight(shared / "data/traces" / source.file, source.weights, source.head)
    hits = counted(choices, source.experts, row.policy, row.capacity, row.mode)
    path = trace(row.trace, source.head)
    (run,) = replayed(path, row.policy, row.capacity, row.mode)
    assert_counts(run, hits, choices.size)


@pytest.mark.whole
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_whole(row: Row, trace: Callable[[str, int], Path]) -> None:
    path = trace(row.trace, row.tokens)
    (run,) = replayed(path, row.policy, row.capacity, row.mode)
    assert_counts(run, row.hits, row.accesses)


@pytest.mark.whole
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_second_model_agrees_on_whole_files(row: Row, shared: Path) -> None:
    source = SOURCES[row.trace]
    choices = by_weight(shared / "data/traces" / source.file, source.weights, row.tokens or GPT)
    assert choices.size == row.accesses
    hits = counted(choices, source.experts, row.policy, row.capacity, row.mode)
    assert hits == row.hits
