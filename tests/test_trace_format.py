"""The trace format: what is written is what is read, whatever the batches, groups and codecs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import UsageError
from moesim.profile import ModelProfile, Stack
from moesim.traces import schema
from moesim.traces.check import CheckReport, check_file
from moesim.traces.digest import TraceDigest
from moesim.traces.head import head
from moesim.traces.reader import (
    Columns,
    RequestFacts,
    RequestRows,
    TraceReader,
    gate_probabilities,
    iteration_starts,
)
from moesim.traces.schema import DROPPED, FACT_COLUMNS, TraceMeta, arrow_schema
from moesim.traces.writer import TraceWriter

EVERY = Columns()
IN_A_FOLDER = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def model(stacks: Sequence[tuple[str, int]], experts: int, top_k: int) -> ModelProfile:
    layers = sum(size for _, size in stacks)
    plain = ModelProfile.generic(layers, experts, top_k)
    return replace(plain, stacks=tuple(Stack(name, size) for name, size in stacks))


def keys_of(meta: TraceMeta, prompt: int, output: int) -> tuple[np.ndarray, ...]:
    """Return iteration, layer, position of a request: prefill of `prompt`, then `output` steps."""
    events = []
    ranges = meta.stack_ranges()
    if prompt:
        for index, (_, first, end) in enumerate(ranges):
            last = index == len(ranges) - 1
            positions = range(prompt) if last or len(ranges) == 1 else range(prompt + 2)
            events += [(0, layer, at) for layer in range(first, end) for at in positions]
    _, first, end = ranges[-1]
    for step in range(1, output + 1):
        events += [(step, layer, prompt + step - 1) for layer in range(first, end)]
    table = np.array(events)
    return table[:, 0].astype(np.int32), table[:, 1].astype(np.int16), table[:, 2].astype(np.int32)


def distinct(rng: np.random.Generator, rows: int, experts: int, width: int) -> np.ndarray:
    return np.argsort(rng.random((rows, experts)), axis=1)[:, :width].astype(np.uint16)


def make_rows(
    meta: TraceMeta, rng: np.random.Generator, request: int, prompt: int, output: int
) -> RequestRows:
    iteration, layer, position = keys_of(meta, prompt, output)
    starts = iteration_starts(iteration)
    rows, experts, top_k = len(layer), meta.experts, meta.top_k
    chosen = distinct(rng, rows, experts, top_k)
    chosen[rng.random((rows, top_k)) < 0.02] = DROPPED
    vectors = {
        int(iteration[row]): rng.normal(size=3).astype(np.float16)
        for row in starts[:-1]
        if rng.random() < 0.7
    }
    some = rng.random() < 0.6
    facts = RequestFacts(
        arrival_ns=int(rng.integers(1 << 60)) if some else None,
        prompt_tokens=prompt,
        output_tokens=output if some else None,
        topic="maths" if some else None,
        split="",
        prompt_digest="ab" * 8,
        prompt_embedding=rng.normal(size=int(rng.integers(4))).astype(np.float16),
        text="zwölf\n日本" if some else None,
    )
    return RequestRows(
        request=request,
        starts=starts,
        iteration=iteration,
        position=position,
        layer=layer,
        phase=(iteration > 0).astype(np.uint8),
        experts=chosen,
        weights=-np.sort(-rng.random((rows, top_k))).astype(np.float16)
        if meta.has_weights
        else None,
        gate=rng.normal(size=(rows, experts)).astype(np.float16) if meta.has_gate else None,
        ahead={d: distinct(rng, rows, experts, m) for d, m in meta.ahead.items()},
        input_norm=rng.random(rows).astype(np.float16) if meta.has_norms else None,
        token=np.where(layer == 0, position, -1).astype(np.int32) if meta.has_tokens else None,
        embedding=vectors if meta.embedding == "iteration" else {},
        facts=facts,
    )


@st.composite
def traces(draw: st.DrawFn) -> tuple[TraceMeta, list[RequestRows]]:
    stacks = draw(
        st.sampled_from([[("decoder", 3)], [("decoder", 1)], [("encoder", 2), ("decoder", 2)]])
    )
    experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(experts, 4)))
    flags = st.booleans()
    meta = TraceMeta(
        model=model(stacks, experts, top_k),
        rank_order="weight",
        ahead=draw(st.dictionaries(st.integers(1, 12), st.integers(1, experts), max_size=2)),
        has_weights=draw(flags),
        has_gate=draw(flags),
        has_norms=draw(flags),
        has_tokens=draw(flags),
        embedding=draw(st.sampled_from(["none", "prompt", "iteration"])),
        expert_norms=tuple((1.5,) * experts for _ in range(sum(n for _, n in stacks))),
        notes=("made by a test",),
        seed=3,
        versions={"numpy": np.__version__},
    )
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    prefill = draw(flags)
    sizes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=6))
    requests = [
        make_rows(meta, rng, 3 * index, prompt if prefill else 0, output)
        for index, (prompt, output) in enumerate(sizes)
    ]
    return meta, requests


def write(path: Path, meta: TraceMeta, requests: Sequence[RequestRows], **kw: Any) -> TraceMeta:
    with TraceWriter(path, meta, **kw) as writer:
        for rows in requests:
            writer.write_request(rows)
    return writer.meta


def read(path: Path, columns: Columns = EVERY, batch_rows: int = 65536) -> list[RequestRows]:
    with TraceReader(path, columns, batch_rows) as reader:
        return list(reader.requests())


def assert_same(one: Any, other: Any) -> None:
    """Compare rows, facts, mappings and arrays; types and shapes included."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.tobytes() == other.tobytes()
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, RequestRows | RequestFacts):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other


def rewrite(source: Path, target: Path, **options: Any) -> None:
    """Write the file again with other cuts and codecs, as any tool might."""
    stored = pq.ParquetFile(source)
    table = stored.read().replace_schema_metadata(
        {schema.METADATA_KEY: stored.metadata.metadata[schema.METADATA_KEY]}
    )
    pq.write_table(table, target, **options)


@IN_A_FOLDER
@given(
    trace=traces(),
    group=st.integers(1, 60),
    batch=st.integers(1, 60),
    cut=st.integers(1, 60),
    codec=st.sampled_from(["none", "snappy", "gzip", "zstd"]),
)
def test_what_is_written_is_read(
    tmp_path: Path,
    trace: tuple[TraceMeta, list[RequestRows]],
    group: int,
    batch: int,
    cut: int,
    codec: str,
) -> None:
    meta, requests = trace
    path, again = tmp_path / "t.parquet", tmp_path / "again.parquet"
    done = write(path, meta, requests, row_group_rows=group)
    rewrite(path, again, compression=codec, row_group_size=cut)
    for file in (path, again):
        got = read(file, batch_rows=batch)
        assert len(got) == len(requests)
        for one, other in zip(got, requests, strict=True):
            assert_same(one, other)
        report = check_file(file, batch_rows=batch)
        assert report.meta == done
        assert report.meta.digest == done.digest
    assert done.requests == len(requests)
    assert done.rows == sum(rows.rows for rows in requests)
    assert TraceMeta.from_json(done.to_json()) == done


def test_row_groups_end_where_requests_end(tmp_path: Path) -> None:
    meta = TraceMeta(model=model([("decoder", 3)], 8, 2))
    rng = np.random.default_rng(0)
    requests = [make_rows(meta, rng, index, 0, 2 + index) for index in range(8)]
    write(tmp_path / "t.parquet", meta, requests, row_group_rows=20)
    file = pq.ParquetFile(tmp_path / "t.parquet")
    groups = [
        file.read_row_group(index)["request"].to_pylist() for index in range(file.num_row_groups)
    ]
    assert len(groups) > 2
    seen = [set(group) for group in groups]
    assert sum(map(len, seen)) == len(requests) == len(set().union(*seen))
    assert all(len(group) >= 20 for group in groups[:-1])


def test_file_is_as_the_manual_says(tmp_path: Path) -> None:
    meta = TraceMeta(
        model=model([("decoder", 3)], 8, 2),
        has_weights=True,
        has_gate=True,
        has_norms=True,
        has_tokens=True,
        ahead={2: 3, 1: 4},
        embedding="iteration",
    )
    requests = [make_rows(meta, np.random.default_rng(1), 0, 2, 2)]
    write(tmp_path / "t.parquet", meta, requests)
    file = pq.ParquetFile(tmp_path / "t.parquet")
    names = file.schema_arrow.names
    assert names[:6] == ["request", "iteration", "position", "layer", "phase", "experts"]
    assert names[6:11] == ["weights", "gate", "ahead1", "ahead2", "input_norm"]
    assert names[11:] == ["token", "embedding", *FACT_COLUMNS]
    assert file.schema_arrow.equals(arrow_schema(meta))
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    order = [names[key.column_index] for key in file.metadata.row_group(0).sorting_columns]
    assert order == ["request", "iteration", "layer", "position"]
    assert set(file.metadata.metadata) == {b"moesim", b"ARROW:schema"}
    assert json.loads(file.metadata.metadata[b"moesim"])["schema"] == schema.SCHEMA_VERSION
    manual = Path(schema.__file__).resolve().with_name("README.md").read_text(encoding="utf-8")
    for name in [*arrow_schema(meta).names, *(field.name for field in fields(TraceMeta))]:
        assert f"`{name}`" in manual, f"the manual does not name {name}"


def test_digest_sees_every_column(tmp_path: Path) -> None:
    meta = TraceMeta(
        model=model([("decoder", 2)], 8, 2),
        has_weights=True,
        has_gate=True,
        has_norms=True,
        has_tokens=True,
        ahead={1: 2},
        embedding="iteration",
    )
    rows = make_rows(meta, np.random.default_rng(2), 0, 2, 3)
    rows = replace(rows, embedding={0: np.ones(2, np.float16)}, facts=RequestFacts(split="a"))

    def digest(given: RequestRows) -> str:
        found = TraceDigest(meta)
        found.update(given)
        return found.hexdigest()

    def changed(array: np.ndarray) -> np.ndarray:
        other = array.copy()
        other.reshape(-1).view(np.uint8)[-1] ^= 1
        return other

    arrays = ("iteration", "position", "layer", "phase", "experts", "weights", "gate")
    others = [
        replace(rows, **{name: changed(getattr(rows, name))})
        for name in (*arrays, "input_norm", "token")
    ]
    others.append(replace(rows, request=1))
    others.append(replace(rows, ahead={1: changed(rows.ahead[1])}))
    others.append(replace(rows, embedding={1: np.ones(2, np.float16)}))
    others.append(replace(rows, embedding={0: np.zeros(2, np.float16)}))
    others.append(replace(rows, embedding={0: np.ones(2, np.float16), 1: np.ones(0, np.float16)}))
    others.append(replace(rows, facts=RequestFacts(topic="a")))
    others.append(replace(rows, facts=RequestFacts(split="a", arrival_ns=0)))
    others.append(replace(rows, facts=RequestFacts(split="a", text="")))
    digests = [digest(rows), *map(digest, others)]
    assert len(set(digests)) == len(digests)


def test_projection_leaves_the_rest_out(tmp_path: Path) -> None:
    meta = TraceMeta(
        model=model([("decoder", 3)], 8, 2), has_weights=True, has_gate=True, ahead={1: 2}
    )
    whole = [make_rows(meta, np.random.default_rng(3), index, 2, 3) for index in range(3)]
    write(tmp_path / "t.parquet", meta, whole)
    for got, made in zip(read(tmp_path / "t.parquet", Columns.experts_only()), whole, strict=True):
        for name in ("iteration", "position", "layer", "phase", "experts", "starts"):
            assert_same(getattr(got, name), getattr(made, name))
        assert got.weights is None and got.gate is None and not got.ahead
        assert_same(got.facts, RequestFacts())
    short = read(tmp_path / "t.parquet", replace(Columns.experts_only(), facts=True))
    assert short[0].facts.prompt_tokens == 2
    assert short[0].facts.text is None and short[0].facts.prompt_embedding is None


def test_reading_holds_one_batch_not_the_file(tmp_path: Path) -> None:
    meta = TraceMeta(model=model([("decoder", 4)], 64, 8), has_gate=True)
    rng = np.random.default_rng(4)
    one = make_rows(meta, rng, 0, 0, 500)
    write(tmp_path / "t.parquet", meta, [replace(one, request=index) for index in range(60)])
    stored = 60 * one.rows * (64 + 8) * 2
    before, most = pa.total_allocated_bytes(), 0
    with TraceReader(tmp_path / "t.parquet", batch_rows=1000) as reader:
        for _ in reader.requests():
            most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < stored / 3


def test_the_writer_copies_what_it_is_given(tmp_path: Path) -> None:
    meta = TraceMeta(model=model([("decoder", 3)], 8, 2))
    rows = make_rows(meta, np.random.default_rng(5), 0, 0, 3)
    with TraceWriter(tmp_path / "t.parquet", meta) as writer:
        writer.write_request(rows)
        kept = rows.experts.copy()
        rows.experts[:] = 0
    check_file(tmp_path / "t.parquet")
    assert_same(read(tmp_path / "t.parquet")[0].experts, kept)


def test_older_schemas_are_upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = TraceMeta(model=model([("decoder", 3)], 8, 2)).with_counts(
        phases=("decode",), requests=1, tokens=1, rows=3, digest="0" * 64
    )
    old = json.loads(meta.to_json())
    old["schema"] = 0
    old["order"] = old.pop("rank_order")
    monkeypatch.setitem(schema.UPGRADES, 0, lambda plain: {**plain, "rank_order": plain["order"]})
    assert TraceMeta.from_json(json.dumps(old)) == meta


@pytest.mark.parametrize("score", ["softmax", "softmax-topk", "sigmoid-bias-scale"])
def test_gate_probabilities(score: str) -> None:
    meta = TraceMeta(model=model([("decoder", 1)], 32, 4), score=score)
    gate = (10 * np.random.default_rng(6).normal(size=(200, 32))).astype(np.float16)
    got = gate_probabilities(gate, meta)
    exact = gate.astype(np.float64)
    scores = 1 / (1 + np.exp(-exact)) if score.startswith("sigmoid") else np.exp(exact)
    assert got.dtype == np.float32
    np.testing.assert_allclose(
        got, scores / scores.sum(axis=1, keepdims=True), rtol=2e-4, atol=1e-7
    )
    extreme = np.array([[-65504, 65504] * 16, [-65504] * 32], dtype=np.float16)
    np.testing.assert_allclose(gate_probabilities(extreme, meta).sum(axis=1), 1, rtol=1e-5)


@IN_A_FOLDER
@given(trace=traces(), more=st.integers(1, 40), fewer=st.integers(1, 40))
def test_head_takes_the_first_tokens(
    tmp_path: Path, trace: tuple[TraceMeta, list[RequestRows]], more: int, fewer: int
) -> None:
    meta, requests = trace
    one_stack = len(meta.model.stacks) == 1
    source = tmp_path / "t.parquet"
    whole = write(source, meta, requests)
    more, fewer = max(more, fewer), min(more, fewer)
    if not one_stack:  # the first iteration runs through two stacks and is not split
        first = requests[0]
        least = int(np.isin(first.layer[: first.starts[1]], (0, 2)).sum())
        fewer, more = max(fewer, least), max(more, least)
    cut = head(source, tmp_path / "more.parquet", tokens=more)
    assert cut.tokens == min(more, whole.tokens) or not one_stack
    assert cut.tokens <= more
    check_file(tmp_path / "more.parquet")
    direct = head(source, tmp_path / "fewer.parquet", tokens=fewer)
    twice = head(tmp_path / "more.parquet", tmp_path / "twice.parquet", tokens=fewer)
    assert direct.tokens == twice.tokens
    for got, made in zip(read(tmp_path / "fewer.parquet"), requests, strict=False):
        _assert_start_of(got, made)


def _assert_start_of(got: RequestRows, made: RequestRows) -> None:
    """Every (iteration, layer) of `got` begins as in `made`; all but the last are whole."""
    last = int(got.iteration[-1])
    for iteration in np.unique(got.iteration):
        for layer in np.unique(made.layer[made.iteration == iteration]):
            mine = (got.iteration == iteration) & (got.layer == layer)
            theirs = (made.iteration == iteration) & (made.layer == layer)
            count = int(mine.sum())
            assert count == theirs.sum() if iteration != last else 1 <= count <= theirs.sum()
            assert_same(got.experts[mine], made.experts[theirs][:count])
            assert_same(got.position[mine], made.position[theirs][:count])


def test_head_takes_the_first_requests(tmp_path: Path) -> None:
    meta = TraceMeta(model=model([("decoder", 3)], 8, 2), has_weights=True)
    requests = [make_rows(meta, np.random.default_rng(7), index, 2, 3) for index in range(5)]
    write(tmp_path / "t.parquet", meta, requests)
    cut = head(tmp_path / "t.parquet", tmp_path / "h.parquet", requests=2)
    assert (cut.requests, cut.tokens) == (2, 10)
    for got, made in zip(read(tmp_path / "h.parquet"), requests[:2], strict=True):
        assert_same(got, made)
    assert head(tmp_path / "t.parquet", tmp_path / "h.parquet", requests=9).requests == 5


def test_head_does_not_write_over_what_it_reads(tmp_path: Path) -> None:
    meta = TraceMeta(model=model([("decoder", 1)], 8, 2), has_weights=True)
    path = tmp_path / "t.parquet"
    write(path, meta, [make_rows(meta, np.random.default_rng(7), 0, 2, 3)])
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is the trace that is read"):
        head(path, tmp_path / "." / "t.parquet", requests=1)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "size", [{}, {"tokens": 0}, {"requests": -1}, {"tokens": 1, "requests": 1}]
)
def test_head_refuses_impossible_sizes(tmp_path: Path, size: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        head(tmp_path / "t.parquet", tmp_path / "h.parquet", **size)


def local_experts(rng: np.random.Generator, tokens: int, layers: int, k: int = 4) -> np.ndarray:
    """Return [tokens, layers, k] where each token keeps about half of its predecessor's experts."""
    scores = rng.normal(size=(tokens, layers, 32))
    for token in range(1, tokens):
        scores[token] = 0.8 * scores[token - 1] + 0.6 * scores[token]
    return np.argsort(-scores, axis=2)[:, :, :k].astype(np.uint16)


def report_on(path: Path, sequences: Sequence[np.ndarray]) -> CheckReport:
    _, layers, top_k = sequences[0].shape
    meta = TraceMeta(model=model([("decoder", layers)], 64, top_k), rank_order="unknown")
    made = []
    for index, experts in enumerate(sequences):
        iteration, layer, position = keys_of(meta, 0, len(experts))
        phase = np.ones(len(layer), np.uint8)
        flat = experts.reshape(-1, top_k).astype(np.uint16)
        starts = iteration_starts(iteration)
        made.append(RequestRows(index, starts, iteration, position, layer, phase, flat))
    write(path, meta, made)
    return check_file(path)


def interleaved(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sequences token by token in turn, as a badly cut batch has them."""
    shortest = min(map(len, sequences))
    return np.stack([one[:shortest] for one in sequences], axis=1).reshape(
        -1, *sequences[0].shape[1:]
    )


def test_overlap_must_peak_at_lag_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    sequences = [local_experts(rng, 120, 3) for _ in range(5)]
    assert report_on(tmp_path / "a.parquet", sequences).warnings == ()
    (warning,) = report_on(tmp_path / "b.parquet", [interleaved(sequences)]).warnings
    assert "5 sequences" in warning
    noise = [distinct(rng, 360, 32, 4).reshape(120, 3, 4) for _ in range(5)]
    assert report_on(tmp_path / "c.parquet", noise).warnings == ()
    assert report_on(tmp_path / "d.parquet", [interleaved(sequences)[:30]]).warnings == ()


def test_copied_layers_are_noticed(tmp_path: Path) -> None:
    experts = local_experts(np.random.default_rng(9), 200, 4)
    experts[:, 3] = experts[:, 1]
    (warning,) = report_on(tmp_path / "t.parquet", [experts]).warnings
    assert "layers 1, 3" in warning


def test_real_traces_pass_and_their_known_fault_is_found(tmp_path: Path, shared: Path) -> None:
    folder = shared / "data" / "traces"
    for name in ("gpt-oss-20b/decode", "esft-deepseek-v2-lite/law", "flame-moe-290m/prefill_8x256"):
        with np.load(folder / f"{name}.npz") as file:
            sequences = np.split(file["experts"], file["seq_offsets"][1:-1])[:40]
        assert report_on(tmp_path / "t.parquet", sequences).warnings == (), name
    (warning,) = report_on(tmp_path / "t.parquet", [interleaved(sequences)]).warnings
    assert "8 sequences" in warning


def run_trace(*words: str) -> int:
    from moesim.cli import trace

    parser = argparse.ArgumentParser()
    trace.add_parser(parser.add_subparsers())
    return trace.run(parser.parse_args(["trace", *words]))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = TraceMeta(model=model([("decoder", 3)], 8, 2), has_weights=True, notes=("a note",))
    requests = [make_rows(meta, np.random.default_rng(10), index, 2, 3) for index in range(5)]
    source, target = str(tmp_path / "t.parquet"), str(tmp_path / "h.parquet")
    done = write(Path(source), meta, requests)

    assert run_trace("info", source, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == 1 and told["meta"]["digest"] == done.digest
    assert run_trace("check", source, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True and told["warnings"] == [] and told["rows"] == done.rows
    assert run_trace("head", source, target, "--tokens", "7", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 7
    for words in (("info", target), ("check", target), ("head", source, target, "--requests", "2")):
        assert run_trace(*words) == 0
        told = capsys.readouterr()
        assert told.out and not told.err
