"""Law (b) on what models really chose: heads of every recorded trace, in both engines.

Whatever a run says of itself is compared: counts, times, both digests of its log. The aggregates
of OLMoE and Mixtral are no traces, and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from moesim.degrade import parse_allowed
from moesim.profile import load_hardware, load_model
from moesim.replays import Request, replay
from moesim.traces.convert import convert
from moesim.traces.head import head
from moesim.traces.reader import TraceReader
from tests.strategies import LOSSLESS


class Source(NamedTuple):
    """A recorded trace. ``phase``: what its tokens are read as."""

    path: str
    model: str | None = None
    phase: str = "as-is"


SOURCES = {
    "gpt-oss": Source("gpt-oss-20b/decode.npz", "gpt-oss-20b"),
    "gpt-oss-exact": Source("gpt-oss-20b/decode_exact_weights_40.npz", "gpt-oss-20b", "decode"),
    "intent": Source("esft-deepseek-v2-lite/intent.npz", "deepseek-v2-lite", "decode"),
    "law": Source("esft-deepseek-v2-lite/law.npz", "deepseek-v2-lite", "decode"),
    "summary": Source("esft-deepseek-v2-lite/summary.npz", "deepseek-v2-lite", "prefill"),
    "translation": Source("esft-deepseek-v2-lite/translation.npz", "deepseek-v2-lite", "decode"),
    "puffin": Source("moe-beyond-deepseek-v2-lite/puffin.npz", "deepseek-v2-lite"),
    "test": Source("moe-beyond-deepseek-v2-lite/test.npz", "deepseek-v2-lite", "decode"),
    "flame": Source("flame-moe-290m/prefill_8x256.npz", None, "decode"),
    "switch": Source("switch-base-8", "switch-base-8"),
    "vllm": Source("raw-samples/vllm-jsonl_qwen1.5-moe_layer0.excerpt.jsonl", None, "decode"),
}
SEQUENCES, TOKENS = 5, 40
"""Of a head: so many sequences, so many tokens of each."""

OF_SEQUENCES, OF_TOKENS = ("seq_index", "first_position", "prompt_id"), ("experts", "weights")

PLAIN = "moesim.bench.plain:PlainLRU"
SWIFT = [*(name for name in LOSSLESS if name not in ("next-gate", "streaming")), PLAIN]
"""What the traces share out among them; prefetching whole layers takes the reference long."""


def cut(source: Path, target: Path) -> None:
    """The beginnings of the first sequences of an arrays file, as such a file."""
    with np.load(source) as arrays:
        bounds = arrays["seq_offsets"][: SEQUENCES + 1].tolist()
        spans = [(a, min(b, a + TOKENS)) for a, b in pairwise(bounds)]
        rows = np.concatenate([np.arange(a, b) for a, b in spans])
        kept = {"seq_offsets": np.cumsum([0, *(b - a for a, b in spans)])}
        for name in arrays.files:
            if name.startswith(OF_TOKENS):
                kept[name] = arrays[name][: rows[-1] + 1][rows]
            elif name in OF_SEQUENCES:
                kept[name] = arrays[name][: len(spans)]
    np.savez(target, **kept)


@pytest.fixture(scope="module")
def head_of(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A trace's name -> its head, converted once."""
    folder = tmp_path_factory.mktemp("heads")

    def made(name: str) -> Path:
        path = folder / f"{name}.parquet"
        if path.exists():
            return path
        source = SOURCES[name]
        found = shared / "data" / "traces" / source.path
        if found.suffix == ".npz":
            cut(found, folder / f"{name}.npz")
            found = folder / f"{name}.npz"
        model = load_model(source.model) if source.model else None
        whole = folder / f"{name}-whole.parquet"
        convert(found, whole, model=model, phase=source.phase)
        head(whole, path, tokens=SEQUENCES * TOKENS)
        return path

    return made


def assert_equal(
    path: Path, policies: Sequence[str], capacities: Sequence[str], batch: int
) -> None:
    """Both engines tell the same of every run."""
    request = Request(
        trace=path,
        hardware=load_hardware("rtx4090"),
        policies=policies,
        capacities=capacities,
        allowed=parse_allowed(["ahead=recall:0.8@1"]),
        batch=batch,
        chunk_tokens=16 if batch > 1 else 0,
    )
    told = [replay(replace(request, engine=name))["runs"] for name in ("fast", "reference")]
    for fast, reference in zip(*told, strict=True):
        assert (fast.pop("engine"), reference.pop("engine")) == ("fast", "reference")
        assert fast["log_digest"] and fast["decision_digest"] and fast["time_ns"]
        differ = {key: (fast[key], value) for key, value in reference.items() if fast[key] != value}
        assert not differ, (fast["policy"], fast["capacity"])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SOURCES)
def test_b_the_engines_agree_on_a_recorded_head(
    name: str, batch: int, head_of: Callable[[str], Path]
) -> None:
    path = head_of(name)
    turn = 2 * list(SOURCES).index(name) + (batch > 1)
    capacity = "25%" if batch == 1 else f"{top_k(path)}/layer"
    assert_equal(path, ["next-gate", SWIFT[turn % len(SWIFT)]], [capacity], batch)


@pytest.mark.whole
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SOURCES)
def test_b_every_preset_on_a_recorded_head(
    name: str, batch: int, head_of: Callable[[str], Path]
) -> None:
    path = head_of(name)
    assert_equal(path, [*LOSSLESS, PLAIN], ["25%", f"{top_k(path)}/layer"], batch)


def top_k(path: Path) -> int:
    """Experts that a token chooses."""
    with TraceReader(path) as reader:
        return reader.meta.top_k
