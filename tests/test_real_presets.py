"""Laws (a), (c) and (d) for every preset in the executor, lossy ones too."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from moesim import log
from moesim.configuration import Configuration, Request
from moesim.errors import MoesimError
from moesim.factlog import CAME, DID, FACTS, FactReader
from moesim.follow import follow, refeed
from moesim.policies.presets import PRESETS
from moesim.profile import ModelProfile, load_hardware
from moesim.real.run import RealRequest, execute
from moesim.rehearsal import simulated
from moesim.replays import Request as ReplayRequest
from moesim.replays import replay
from moesim.traces.head import head
from moesim.traces.samples import trace_path
from moesim.types import Serve
from tests.strategies import small_model

DEMAND_ONLY = [name for name, preset in PRESETS.items() if preset.prefetch == "none"]
"""Of these nothing that is decided depends on what anything took."""

EQUAL = (
    "decision_digest", "hits", "late_hits", "misses", "loads", "bytes_loaded", "evictions",
    "served", "overflows", "layer_events", "quality",
)  # fmt: skip


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the shipped sample."""
    path = tmp_path_factory.mktemp("sample") / "t.parquet"
    head(trace_path("demo"), path, tokens=24)
    return path


def tiny(sample: Path) -> ModelProfile:
    """The sample's shape with experts of 96 bytes, or 48 in low precision, and a cache of 16 bytes
    a position."""
    what = Request(trace=sample, hardware=load_hardware("rtx4090"))
    model = Configuration(what).model
    made = small_model(model.layers, model.experts, model.top_k, [96] * model.layers)
    made = replace(made, precisions=("bf16", "low"), expert_bytes=(96, 48))
    return replace(made, hidden=4, dense_bytes=256, head_bytes=64, kv_bytes_per_token_per_layer=16)


def asked(sample: Path, name: str) -> Request:
    """One request of the sample in chunks, under a capacity of a quarter."""
    return Request(
        trace=sample, hardware=load_hardware("rtx4090"), policy=name, costs=tiny(sample), limit=2,
        batch=2, chunk_tokens=5,
    )  # fmt: skip


def replayed(what: Request, engine: str) -> dict[str, Any]:
    """What an engine says of the same."""
    request = ReplayRequest(
        trace=what.trace,
        hardware=what.hardware,
        policies=[what.policy],
        capacities=[what.capacity],
        costs=what.costs,
        limit=what.limit,
        batch=what.batch,
        chunk_tokens=what.chunk_tokens,
        engine=engine,
    )
    request = replace(request, options=replace(request.options, allocator="slots"))
    run: dict[str, Any] = replay(request)["runs"][0]
    return run


def is_computed(folder: Path) -> None:
    """Of every layer event: what its gate asks for, but for what is skipped, is computed."""
    wanted: set[int] = set()
    events = 0
    for kind, *words in FactReader(folder / FACTS):
        if kind == CAME and words[0] in ("expert", "host"):
            wanted.remove(words[1])
        elif kind == DID and words[0] == log.GATE:
            wanted = {word // 4 for word in words[6:]}
        elif kind == DID and words[0] == log.SERVED and words[3] == Serve.SKIP:
            wanted.remove(words[2])
        elif kind == DID and words[0] == log.END:
            assert not wanted
            events += 1
    assert events > 0


@pytest.mark.parametrize("name", PRESETS)
def test_laws_a_c_and_d(name: str, sample: Path, tmp_path: Path) -> None:
    what = asked(sample, name)
    request = RealRequest(what, out=tmp_path / "runs", threads=1, verify=True, watchdog_s=60)
    there: dict[str, Any] = {}
    try:
        there = replayed(what, "reference")
    except MoesimError as error:
        there = {"not_run": str(error)}
    if "not_run" in there:
        # What a replay refuses, the executor refuses, and leaves nothing.
        with pytest.raises(MoesimError) as refused:
            execute(request)
        assert str(refused.value) == there["not_run"]
        assert not list(tmp_path.glob("runs/*"))
        return
    told = execute(request, simulate=partial(simulated))["runs"][0]
    if name in DEMAND_ONLY:
        for run in (there, replayed(what, "fast")):
            assert {key: told[key] for key in EQUAL} == {key: run[key] for key in EQUAL}
    folder = Path(told["run_dir"])
    is_computed(folder)
    assert follow(folder)["equal"]
    assert refeed(folder) > 0
    share = told["simulated"]["overlap"]["mean"]
    assert share is None or 0 <= share <= 1
    if told["lossy"]:
        kept = told["quality"]
        assert 0 < kept["chosen"] == there["quality"]["chosen"]
        assert kept["agreed"] <= kept["chosen"] and kept["gate_mass_kept"] > 0
    else:
        assert told["quality"] is None
