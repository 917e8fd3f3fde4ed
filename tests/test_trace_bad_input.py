"""Whatever a trace file holds: it is read, or refused with one line. Nothing half-written stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import TraceError, UsageError
from moesim.profile import ModelProfile, Stack
from moesim.traces.check import check_file, check_request
from moesim.traces.reader import RequestFacts, RequestRows, TraceReader, iteration_starts
from moesim.traces.schema import DROPPED, METADATA_KEY, TraceMeta
from moesim.traces.writer import TraceWriter

LAYERS, EXPERTS, TOP_K, PROMPT, OUTPUT = 3, 8, 2, 3, 2
META = TraceMeta(
    model=ModelProfile.generic(LAYERS, EXPERTS, TOP_K),
    has_weights=True,
    has_gate=True,
    has_norms=True,
    has_tokens=True,
    ahead={1: 3},
    embedding="iteration",
)
TWO_STACKS = TraceMeta(
    model=replace(
        ModelProfile.generic(4, EXPERTS, TOP_K), stacks=(Stack("encoder", 2), Stack("decoder", 2))
    )
)


def make_rows(request: int, seed: int = 0) -> RequestRows:
    """Return a request with a prefill of 3 tokens and 2 decoded ones: 9 + 6 rows."""
    rng = np.random.default_rng(seed + request)
    prefill = [(0, layer, at) for layer in range(LAYERS) for at in range(PROMPT)]
    decode = [(1 + i, layer, PROMPT + i) for i in range(OUTPUT) for layer in range(LAYERS)]
    iteration, layer, position = np.array(prefill + decode).T
    rows = len(layer)
    chosen = np.argsort(rng.random((rows, EXPERTS)), axis=1).astype(np.uint16)
    return RequestRows(
        request=request,
        starts=iteration_starts(iteration.astype(np.int32)),
        iteration=iteration.astype(np.int32),
        position=position.astype(np.int32),
        layer=layer.astype(np.int16),
        phase=(iteration > 0).astype(np.uint8),
        experts=chosen[:, :TOP_K].copy(),
        weights=-np.sort(-rng.random((rows, TOP_K))).astype(np.float16),
        gate=rng.normal(size=(rows, EXPERTS)).astype(np.float16),
        ahead={1: chosen[:, 3:6].copy()},
        input_norm=rng.random(rows).astype(np.float16),
        token=np.where(layer == 0, 7, -1).astype(np.int32),
        embedding={0: np.ones(4, np.float16)},
        facts=RequestFacts(arrival_ns=5, prompt_tokens=PROMPT, topic="law", text="é"),
    )


def write(path: Path, *requests: RequestRows, meta: TraceMeta = META, check: bool = True) -> Path:
    with TraceWriter(path, meta, row_group_rows=20, check=check) as writer:
        for rows in requests:
            writer.write_request(rows)
    return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sample") / "t.parquet"
    return write(path, *map(make_rows, range(4))).read_bytes()


def refusal(path: Path) -> str:
    """Return the one line with which the file is refused."""
    with pytest.raises(TraceError) as caught:
        check_file(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def table_of(path: Path) -> tuple[pa.Table, bytes]:
    file = pq.ParquetFile(path)
    return file.read(), file.metadata.metadata[METADATA_KEY]


def rewrite(path: Path, table: pa.Table, metadata: bytes | None) -> None:
    kept = {METADATA_KEY: metadata} if metadata is not None else None
    pq.write_table(table.replace_schema_metadata(kept), path)


# --- the file as a whole


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.parquet")
    assert "folder" in refusal(tmp_path)
    (tmp_path / "empty").touch()
    assert "empty" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"x", b"PAR", b"request,layer\n1,2\n", b"\x93NUMPY" * 40])
def test_not_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    assert "not a Parquet file" in refusal(tmp_path / "t")


def test_parquet_but_no_trace(tmp_path: Path) -> None:
    rewrite(tmp_path / "t", pa.table({"a": [1]}), None)
    assert "convert" in refusal(tmp_path / "t")


def test_truncated_anywhere(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "t"
    footer = int.from_bytes(sample[-8:-4], "little") + 8
    offsets = {*range(24), *range(len(sample) - 24, len(sample)), *range(24, len(sample), 199)}
    offsets |= {len(sample) - footer + shift for shift in range(-14, 3)}
    for offset in sorted(offsets):
        path.write_bytes(sample[:offset])
        refusal(path)


def test_unreadable(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(sample)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "permission" in refusal(path)


def test_every_footer_byte_is_sealed(tmp_path: Path, sample: bytes) -> None:
    path = tmp_path / "t"
    start = len(sample) - 8 - int.from_bytes(sample[-8:-4], "little")
    for offset in range(start, len(sample) - 8, 61):
        broken = bytearray(sample)
        broken[offset] ^= 16
        path.write_bytes(broken)
        assert "footer" in refusal(path)


@settings(
    deadline=None,
    max_examples=250,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_fuzzed_bytes_are_read_or_refused(
    tmp_path: Path, sample: bytes, data: st.DataObject
) -> None:
    broken = bytearray(sample)
    pages = len(broken) - int.from_bytes(broken[-8:-4], "little") - 20
    if data.draw(st.booleans(), label="without seal"):
        broken[pages : pages + 8] = b"unsealed"
    for _ in range(data.draw(st.integers(1, 4), label="flips")):
        region = data.draw(st.sampled_from([(0, pages), (0, len(broken)), (pages, len(broken))]))
        at = data.draw(st.integers(region[0], region[1] - 1), label="at")
        broken[at] = data.draw(st.integers(0, 255), label="byte")
    if data.draw(st.integers(0, 9), label="cut") == 0:
        first = data.draw(st.integers(0, len(broken)))
        del broken[first : first + data.draw(st.integers(1, 50))]
    path = tmp_path / "t"
    path.write_bytes(broken)
    try:
        check_file(path)
    except TraceError as error:
        assert "\n" not in str(error)


# --- metadata


def with_metadata(path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    table, text = table_of(write(path, make_rows(0)))
    plain = json.loads(text)
    change(plain)
    rewrite(path, table, json.dumps(plain).encode())
    return refusal(path)


def test_newer_schema_is_refused_by_name(tmp_path: Path) -> None:
    text = with_metadata(tmp_path / "t", lambda plain: plain.update(schema=2))
    assert "schema 2" in text and "newer moesim" in text


def test_unknown_older_schema(tmp_path: Path) -> None:
    assert "schema 0" in with_metadata(tmp_path / "t", lambda plain: plain.update(schema=0))


@pytest.mark.parametrize(
    "key", ["schema", "model", "phases", "requests", "tokens", "rows", "digest"]
)
def test_missing_key(tmp_path: Path, key: str) -> None:
    assert key in with_metadata(tmp_path / "t", lambda plain: plain.pop(key))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", "1"),
        ("schema", True),
        ("model", []),
        ("model", {}),
        ("ahead", {"0": 3}),
        ("ahead", {"x": 3}),
        ("ahead", {"1": 0}),
        ("ahead", {"1": 9}),
        ("rank_order", "any"),
        ("embedding", "maybe"),
        ("has_gate", 1),
        ("seed", 0.5),
        ("versions", {"a": 1}),
        ("notes", "text"),
        ("expert_norms", [[1.0]]),
        ("expert_norms", [["x"]]),
        ("phases", ["other"]),
        ("phases", ["decode"]),
        ("requests", 2),
        ("tokens", 4),
        ("rows", 14),
        ("rows", -1),
        ("digest", "0" * 64),
        ("digest", None),
    ],
)
def test_wrong_value(tmp_path: Path, key: str, value: object) -> None:
    with_metadata(tmp_path / "t", lambda plain: plain.update({key: value}))


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_fuzzed_metadata_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    )
    plain = json.loads(
        META.with_counts(
            phases=("decode",), requests=1, tokens=1, rows=3, digest="0" * 64
        ).to_json()
    )
    place = plain["model"] if data.draw(st.booleans()) else plain
    key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(values)
    try:
        TraceMeta.from_json(json.dumps(plain))
    except TraceError as error:
        assert "\n" not in str(error)


def test_metadata_that_is_not_json(tmp_path: Path) -> None:
    table, text = table_of(write(tmp_path / "t", make_rows(0)))
    for broken in (b"", b"\xff\xfe", text[:-1], b"[]", b"[" * 100_000, b'{"schema":1e999}'):
        rewrite(tmp_path / "t", table, broken)
        refusal(tmp_path / "t")


# --- columns


@pytest.mark.parametrize(
    "name", ["request", "layer", "phase", "experts", "gate", "ahead1", "topic"]
)
def test_missing_column(tmp_path: Path, name: str) -> None:
    table, text = table_of(write(tmp_path / "t", make_rows(0)))
    rewrite(tmp_path / "t", table.drop_columns([name]), text)
    assert repr(name) in refusal(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("request", pa.int64()),
        ("layer", pa.int32()),
        ("phase", pa.string()),
        ("experts", pa.list_(pa.uint16())),
        ("experts", pa.list_(pa.int32(), TOP_K)),
        ("weights", pa.list_(pa.float32(), TOP_K)),
        ("input_norm", pa.float32()),
        ("token", pa.int64()),
        ("text", pa.large_string()),
    ],
)
def test_wrong_column_type(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    table, text = table_of(write(tmp_path / "t", make_rows(0)))
    place = table.schema.get_field_index(name)
    column = table[name].cast(kind)
    rewrite(tmp_path / "t", table.set_column(place, name, column), text)
    assert repr(name) in refusal(tmp_path / "t")


@pytest.mark.parametrize(
    "name", ["request", "position", "phase", "experts", "weights", "input_norm"]
)
def test_null_where_a_value_belongs(tmp_path: Path, name: str) -> None:
    table, text = table_of(write(tmp_path / "t", make_rows(0)))
    place = table.schema.get_field_index(name)
    kind = table.schema.field(name).type
    column = pa.array([*table[name].to_pylist()[:-1], None], kind)
    rewrite(tmp_path / "t", table.set_column(place, pa.field(name, kind), column), text)
    assert repr(name) in refusal(tmp_path / "t")


@pytest.mark.parametrize(("name", "value"), [("topic", "law"), ("embedding", [1.0])])
def test_fact_on_another_row(tmp_path: Path, name: str, value: object) -> None:
    table, text = table_of(write(tmp_path / "t", make_rows(0)))
    place = table.schema.get_field_index(name)
    column = table[name].to_pylist()
    column[1] = value
    array = pa.array(column, table.schema.field(name).type)
    rewrite(tmp_path / "t", table.set_column(place, name, array), text)
    assert repr(name) in refusal(tmp_path / "t")


def test_unknown_phase(tmp_path: Path) -> None:
    table, text = table_of(write(tmp_path / "t", make_rows(0)))
    place = table.schema.get_field_index("phase")
    words = pa.array(["other"] * table.num_rows).dictionary_encode()
    rewrite(tmp_path / "t", table.set_column(place, "phase", words), text)
    assert "'other'" in refusal(tmp_path / "t")


def test_further_columns_do_no_harm(tmp_path: Path) -> None:
    table, text = table_of(write(tmp_path / "t", make_rows(0)))
    rewrite(tmp_path / "t", table.append_column("mine", pa.array(range(table.num_rows))), text)
    assert check_file(tmp_path / "t").meta.requests == 1


# --- rows


def changed(name: str, row: int, value: object) -> RequestRows:
    rows = make_rows(0)
    column = getattr(rows, name).copy()
    column[row] = value
    return replace(rows, **{name: column})


def permuted(order: list[int]) -> RequestRows:
    rows = make_rows(0)
    names = ("iteration", "position", "layer", "phase", "experts", "weights")
    moved = {name: getattr(rows, name)[order] for name in names}
    return replace(rows, **moved, starts=iteration_starts(moved["iteration"]))


def without(keep: Callable[[RequestRows], Any]) -> RequestRows:
    return permuted(np.flatnonzero(keep(make_rows(0))).tolist())


NAN = np.float16("nan")
BROKEN_ROWS: list[tuple[str, RequestRows]] = [
    ("out of order", permuted([1, 0, *range(2, 15)])),
    ("out of order", permuted([*range(3, 9), *range(3), *range(9, 15)])),
    ("out of order", permuted([*range(9), 12, 13, 14, 9, 10, 11])),
    ("repeated", permuted([0, 0, *range(1, 15)])),
    ("layer 1 is missing", without(lambda r: r.layer != 1)),
    ("layer 0 is missing", without(lambda r: (r.layer != 0) | (r.iteration < 2))),
    ("layer 2 is missing", without(lambda r: (r.layer != 2) | (r.iteration > 0))),
    ("tokens", without(lambda r: np.arange(15) != 4)),
    ("tokens", without(lambda r: np.arange(15) != 0)),
    ("position differs", changed("position", 10, 4)),
    ("position differs", changed("position", 8, 5)),
    ("position is negative", changed("position", 0, -1)),
    ("layer is out of range", changed("layer", 14, 3)),
    ("layer is out of range", changed("layer", 0, -1)),
    ("prefill", changed("phase", 0, 1)),
    ("prefill", changed("phase", 14, 0)),
    ("expert is out of range 0..7", changed("experts", 5, [1, 8])),
    ("expert is out of range 0..7", changed("experts", 5, [65534, 1])),
    ("expert occurs twice", changed("experts", 5, [3, 3])),
    ("NaN", changed("weights", 5, [0.5, NAN])),
    ("negative", changed("weights", 5, [0.5, -0.25])),
    ("infinite", changed("weights", 5, [np.inf, 0.25])),
    ("descend", changed("weights", 5, [0.25, 0.5])),
    ("logit", changed("gate", 5, NAN)),
    ("logit", changed("gate", 5, np.inf)),
    ("input_norm", changed("input_norm", 5, NAN)),
    ("input_norm", changed("input_norm", 5, -1)),
    ("token id", changed("token", 5, -2)),
    ("ahead1", replace(make_rows(0), ahead={1: np.full((15, 3), 8, np.uint16)})),
    ("ahead1", replace(make_rows(0), ahead={1: np.full((15, 3), 7, np.uint16)})),
    ("arrival_ns", replace(make_rows(0), facts=RequestFacts(arrival_ns=-1))),
    ("embedding", replace(make_rows(0), embedding={0: np.array([np.nan], np.float16)})),
]


@pytest.mark.parametrize(("words", "rows"), BROKEN_ROWS, ids=[words for words, _ in BROKEN_ROWS])
def test_broken_rows_are_refused(tmp_path: Path, words: str, rows: RequestRows) -> None:
    with pytest.raises(TraceError, match="request 0") as caught:
        check_request(rows, META)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    if len(rows.layer) == 15:  # the columns not permuted still fit
        path = write(tmp_path / "t", rows, check=False)
        assert words.split()[0] in refusal(path)
        with pytest.raises(TraceError):
            write(tmp_path / "u", rows)
        assert not (tmp_path / "u").exists()


def test_allowed_rows_pass() -> None:
    for rows in (
        changed("experts", 5, [DROPPED, DROPPED]),
        changed("experts", 5, [DROPPED, 1]),
        changed("weights", 5, [0.5, 0.5]),
        changed("weights", 5, [0.0, -0.0]),
        changed("gate", 5, -np.inf),
        replace(make_rows(0), ahead={1: np.full((15, 3), DROPPED, np.uint16)}),
    ):
        check_request(rows, META)
    dropped_first = changed("experts", 5, [DROPPED, 1])
    weights = dropped_first.weights.copy()
    weights[5] = [0.0, 0.5]
    check_request(replace(dropped_first, weights=weights), META)
    rising = changed("weights", 5, [0.25, 0.5])
    check_request(rising, replace(META, rank_order="source"))


def two_stack_rows(request: int, events: list[tuple[int, int, int]]) -> RequestRows:
    iteration, layer, position = np.array(events).T
    experts = np.tile(np.arange(TOP_K, dtype=np.uint16), (len(layer), 1))
    return RequestRows(
        request,
        iteration_starts(iteration.astype(np.int32)),
        iteration.astype(np.int32),
        position.astype(np.int32),
        layer.astype(np.int16),
        (iteration > 0).astype(np.uint8),
        experts,
    )


ENCODER = [(0, layer, at) for layer in (0, 1) for at in range(4)]
DECODER = [(0, layer, 0) for layer in (2, 3)]
STEPS = [(step, layer, step) for step in (1, 2) for layer in (2, 3)]


def test_stacks_of_a_phase(tmp_path: Path) -> None:
    whole = two_stack_rows(0, ENCODER + DECODER + STEPS)
    write(tmp_path / "t", whole, replace(whole, request=1), meta=TWO_STACKS)
    assert check_file(tmp_path / "t").meta.tokens == 2 * (4 + 1 + 2)
    lacking = two_stack_rows(1, DECODER + STEPS)
    path = write(tmp_path / "u", whole, lacking, meta=TWO_STACKS, check=False)
    assert "layers are missing" in refusal(path)
    mixed = two_stack_rows(0, ENCODER + DECODER + STEPS + [(3, 0, 9), (3, 1, 9)])
    with pytest.raises(TraceError, match="stack"):
        check_request(mixed, TWO_STACKS)


def test_requests_must_ascend(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="ascend"):
        write(tmp_path / "t", make_rows(1), make_rows(0))
    assert list(tmp_path.iterdir()) == []
    table, text = table_of(write(tmp_path / "t", make_rows(0), make_rows(1)))
    rewrite(tmp_path / "t", pa.concat_tables([table[15:], table[:15]]), text)
    assert "sorted" in refusal(tmp_path / "t")
    with TraceReader(tmp_path / "t") as reader, pytest.raises(TraceError, match="sorted"):
        list(reader.requests())


def test_wrong_digest(tmp_path: Path) -> None:
    table, text = table_of(write(tmp_path / "t", make_rows(0)))
    place = table.schema.get_field_index("topic")
    topics = ["war", *[None] * (table.num_rows - 1)]
    rewrite(tmp_path / "t", table.set_column(place, "topic", pa.array(topics)), text)
    assert "digest" in refusal(tmp_path / "t")


# --- writing


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    rows = make_rows(0)
    for wrong in (
        replace(rows, experts=rows.experts[:, :1]),
        replace(rows, experts=rows.experts.astype(np.int64)),
        replace(rows, weights=None),
        replace(rows, ahead={}),
        replace(rows, position=rows.position[1:]),
        replace(rows, request=-1),
        replace(rows, request=1 << 31),
    ):
        with pytest.raises(TraceError):
            write(tmp_path / "t", wrong)
        assert list(tmp_path.iterdir()) == []


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no rows"):
        write(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "none" / "t", tmp_path / "file" / "t", Path("/proc/t")):
        with pytest.raises(UsageError, match=str(place)) as caught:
            write(place, make_rows(0))
        assert "\n" not in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / f".t.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="No space left") as caught:
        write(tmp_path / "t", *map(make_rows, range(4)))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failure_in_the_middle_leaves_the_old_file(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "t").write_text("old")
    with pytest.raises(error), TraceWriter(tmp_path / "t", META, row_group_rows=1) as writer:
        writer.write_request(make_rows(0))
        raise error
    assert [one.name for one in tmp_path.iterdir()] == ["t"]
    assert (tmp_path / "t").read_text() == "old"


ENDLESS = """
import sys
from dataclasses import replace
from moesim.traces.reader import TraceReader
from moesim.traces.writer import TraceWriter
with TraceReader(sys.argv[1]) as reader:
    rows = next(reader.requests())
    with TraceWriter(sys.argv[2], reader.meta, row_group_rows=50) as writer:
        for request in range(1 << 30):
            writer.write_request(replace(rows, request=request))
"""


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "source", make_rows(0))
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-c", ENDLESS, str(source), str(folder / "t")]
    running = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).resolve().parent.parent,
        # Where tests run in the background, Ctrl-C may be ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 60
        while not any(one.stat().st_size for one in folder.iterdir()):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, text = running.communicate(timeout=60)
    finally:
        running.kill()
        running.wait()
    assert b"KeyboardInterrupt" in text
    assert list(folder.iterdir()) == []
