"""The fact log of an offloaded model: whole, and written while the clock stands still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import moesim.real
from moesim import factlog
from moesim.factlog import FACTS, PAST, FactLog, FactReader, restored
from moesim.follow import FollowError, refeed
from moesim.past import past_facts
from moesim.traces.reader import TraceReader
from moesim.types import Gate, Needs
from moesim.workload import Inputs, prepare
from tests import tiny_moe
from tests.test_offload import generated, one_thread, spoken

__all__ = ["one_thread"]


@pytest.fixture
def past(tmp_path: Path) -> Path:
    """A trace of the tiny model to learn from, with all that a policy may ask for."""
    from moesim.traces.record import Recording, record

    (tmp_path / "prompts.txt").write_text("one\nanother\nthe third\n")
    saved = tiny_moe.save("olmoe", tmp_path / "recorded")
    asked = Recording(
        model=str(saved),
        out=tmp_path / "past.parquet",
        prompts=str(tmp_path / "prompts.txt"),
        norms=True,
        ahead=(1,),
        embeddings="iteration",
        generation=_short(),
        dtype="float32",
        device="cpu",
    )
    record(asked)
    return tmp_path / "past.parquet"


def _short() -> Any:
    from moesim.traces.batches import Generation

    return Generation(max_new_tokens=4)


@pytest.mark.parametrize(
    ("policy", "capacity"), [("swapmoe", "8/layer"), ("finemoe", "40%"), ("prune-magnitude", "50%")]
)
def test_a_policy_that_learned_can_be_begun_from_its_log_alone(
    policy: str, capacity: str, past: Path, tmp_path: Path
) -> None:
    """Norms and past are in it; the trace that it learned from may be gone."""
    model = moesim.real.offload(
        tiny_moe.build("olmoe"),
        policy,
        capacity,
        scope="layer",
        calibration=past,
        out=tmp_path / "runs",
    )
    for _ in range(3):
        generated(model, new=6)
    folder = Path(model.moesim.finish()["run_dir"])
    past.unlink()
    assert refeed(folder) > 100


def test_the_past_is_told_as_it_was(past: Path, tmp_path: Path) -> None:
    """Fact by fact, with the columns that the policy declares and no more."""
    model = moesim.real.offload(
        tiny_moe.build("olmoe"), "swapmoe", "8/layer", calibration=past, out=tmp_path / "runs"
    )
    generated(model)
    folder = Path(model.moesim.finish()["run_dir"])
    reader = FactReader(folder / FACTS)
    kept = [restored(record[1]) for record in reader if record[0] == PAST]
    inputs = Inputs(Needs.WEIGHTS | Needs.NORMS | Needs.GATE)
    with TraceReader(past, inputs.columns()) as trace:
        works = [prepare(i, r, trace.meta, inputs) for i, r in enumerate(trace.requests())]
    told = list(past_facts(works, 16))
    assert [type(fact) for fact in kept] == [type(fact) for fact in told]
    for one, other in zip(kept, told, strict=True):
        if isinstance(one, Gate) and isinstance(other, Gate):
            assert one.source.token_experts.tolist() == other.source.token_experts.tolist()
            assert one.source.norms is not None and other.source.norms is not None
            assert one.source.norms.tolist() == other.source.norms.tolist()
    assert reader.header["world"]["expert_norms"] is not None


def test_a_log_that_lost_its_past_is_found_out(past: Path, tmp_path: Path) -> None:
    """The first answers differ: what is in the log is needed."""
    model = moesim.real.offload(
        tiny_moe.build("olmoe"), "finemoe", "40%", calibration=past, out=tmp_path / "runs"
    )
    generated(model, new=8)
    generated(model, new=8)
    folder = Path(model.moesim.finish()["run_dir"])
    records = list(FactReader(folder / FACTS))
    header = FactReader(folder / FACTS).header
    log = FactLog(folder / FACTS)
    log._write(header)
    for record in records:
        if record[0] != PAST:
            log._write(record)
    log.close()
    with pytest.raises(FollowError, match="and now"):
        refeed(folder)


def test_a_long_request_is_written_between_passes_with_the_clock_at_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never while it serves."""
    monkeypatch.setattr(factlog, "_FULL", 40)
    states: list[tuple[bool, int]] = []
    flush = FactLog.flush

    def watched(log: FactLog) -> None:
        run = model.moesim.run
        if run is not None:
            states.append((run.lanes.clock._rested_at is not None, len(log._pending)))
        flush(log)

    monkeypatch.setattr(FactLog, "flush", watched)
    model = moesim.real.offload(tiny_moe.build("olmoe"), "lru", "20%", out=tmp_path / "runs")
    generated(model, new=12)
    # After each of eleven passes, and at the end of the batch.
    assert len(states) == 12 and all(resting for resting, _ in states)
    model.moesim.finish()


def test_writing_in_between_changes_nothing_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for full in (20_000, 10):
        monkeypatch.setattr(factlog, "_FULL", full)
        folder = tmp_path / str(full)
        folder.mkdir()
        run = spoken("olmoe", folder, 2, "lru")[0]["runs"][0]
        records = [r for r in FactReader(Path(run["run_dir"]) / FACTS) if r[0] == "on"]
        found.append((run["decision_digest"], run["misses"], records))
    assert found[0] == found[1]


def test_logs_of_before_are_read(tmp_path: Path) -> None:
    run = spoken("olmoe", tmp_path, 1, "lru")[0]["runs"][0]
    folder = Path(run["run_dir"])
    records, header = list(FactReader(folder / FACTS)), FactReader(folder / FACTS).header
    log = FactLog(folder / FACTS)
    world = {k: v for k, v in header["world"].items() if k != "expert_norms"}
    log._write({"schema": 1, "world": world})
    for record in records:
        log._write(record)
    log.close()
    assert refeed(folder) > 0
