"""Every command: what it prints, and one clear line with code 2 for every mistake."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moesim.cli import main
from moesim.cli.interrupt import heard
from moesim.cli.progress import requests_progress
from moesim.policies import SEATS
from moesim.policies.presets import PRESETS
from moesim.traces.schema import METADATA_KEY

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
FILES = {"manifest.json", "summary.json", "requests.parquet", "host.json"}

PHASE_KEYS = {"accesses", "hits", "late_hits", "misses", "loads", "bytes_loaded"}
FATES = {"used", "late", "wasted", "cancelled", "unused_at_end"}
SPREAD = {"mean", "p50", "p90", "p99"}


def run_cli(*words: object) -> subprocess.CompletedProcess[str]:
    """A real process in the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "moesim", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def code_of(*words: object) -> int:
    """The exit code in this process; argparse leaves by an exception."""
    try:
        return main([str(word) for word in words])
    except SystemExit as left:
        return int(left.code or 0)


Refused = Callable[..., str]
Answer = Callable[..., dict[str, Any]]


def one_line(err: str) -> str:
    """The error, if it is a single clear line."""
    err = unannounced(err)
    assert err.startswith("moesim: error: "), err
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err.removeprefix("moesim: error: ").rstrip("\n")


def unannounced(err: str) -> str:
    """What was told on stderr, but for what a first run tells of compiling."""
    announced = ("moesim: compiling the fast engine", "moesim: waiting for another process")
    return "".join(line for line in err.splitlines(True) if not line.startswith(announced))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused with one line and code 2; the line."""

    def run(*words: object) -> str:
        capsys.readouterr()
        code = code_of(*words)
        out, err = capsys.readouterr()
        line = one_line(err)
        assert (code, out) == (2, "")
        return line

    return run


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """Runs a command with --json; the one object that it prints."""

    def run(*words: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert code_of(*words, "--json") == code
        out, err = capsys.readouterr()
        assert unannounced(err) == ""
        assert out.count("\n") == 1 and out.endswith("\n")
        found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert isinstance(found, dict)
        return found

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 requests of 4 + 6 tokens, 3 layers of 8 experts, top 2, one layer ahead."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.parquet"
    shape = ("--layers", 3, "--experts", 8, "--top-k", 2, "--ahead", 1)
    assert code_of("trace", "synth", path, "--requests", 4, *TOKENS, *shape, "--seed", 3) == 0
    return path


TOKENS = ("--prompt-tokens", 4, "--output-tokens", 6)


# ---- replay: what it answers ---------------------------------------------------------------------


def test_json_is_one_object_with_the_fixed_keys(tiny: Path, answer: Answer) -> None:
    found = answer(
        *("replay", "--trace", tiny, "--policy", "lru,next-gate", "--policy", "min"),
        *("--capacity", "3/layer,50%", "--capacity", "9"),
    )
    assert found["schema"] == 1
    assert found["trace"]["requests"] == 4
    typed = [(run["policy"], run["capacity"]) for run in found["runs"]]
    names = ("lru", "next-gate", "min")
    assert typed == [(name, size) for name in names for size in ("3/layer", "50%", "9")]
    for run in found["runs"]:
        assert run.keys() >= PHASE_KEYS
        assert run["prefill"].keys() >= PHASE_KEYS
        assert run["decode"].keys() >= PHASE_KEYS
        assert {"issued", *FATES} <= run["prefetch"].keys()
        assert run["ttft_ns"].keys() == SPREAD == run["tpot_ns"].keys()
        assert run["scope"] == ("layer" if "/layer" in run["capacity"] else "global")
        assert (run["engine"], run["lossy"], run["allowed"]) == ("fast", False, [])
        assert run["oracle"] == (run["policy"] == "min")
        assert run["run_dir"] is None
        for key in ("time_ns", "stall_ns", "peak_bytes"):
            assert isinstance(run[key], int)
        assert re.fullmatch(r"[0-9a-f]{16,}", run["log_digest"])
        assert run["accesses"] == run["hits"] + run["late_hits"] + run["misses"]
        for key in PHASE_KEYS:
            assert run[key] == run["prefill"][key] + run["decode"][key]
        assert run["prefetch"]["issued"] == sum(run["prefetch"][fate] for fate in FATES)


def test_defaults_are_those_promised(tiny: Path, answer: Answer) -> None:
    bare = answer("replay", "--trace", tiny, "--policy", "lru")
    told = answer(
        *("replay", "--trace", tiny, "--policy", "lru", "--capacity", "25%"),
        *("--scope", "global", "--hardware", "rtx4090", "--engine", "fast"),
    )
    assert bare == told
    assert bare["hardware"] == "rtx4090"


def test_repeating_and_commas_mean_the_same(tiny: Path, answer: Answer) -> None:
    commas = answer("replay", "--trace", tiny, "--policy", "lru, lfu,lru", "--capacity", "9,50%")
    repeated = answer(
        *("replay", "--trace", tiny, "--policy", "lru", "--policy", "lfu"),
        *("--capacity", "9", "--capacity", "50%"),
    )
    assert commas == repeated


def test_the_table_shows_every_run_and_warns_before_it(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--policy", "lru,min", "--capacity", "2,50%", "--ladder")
    assert code_of("replay", "--trace", tiny, *words) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith((" lru ", " min (bound) "))]
    assert len(rows) == 4
    assert out.index("flood cliff") < out.index(rows[0])
    assert "(synthetic)" in out
    assert "oracle ladder" in out
    assert "never ranked" in out


def test_a_policy_that_lacks_its_input_is_listed_as_not_run(
    tmp_path: Path, answer: Answer, refused: Refused
) -> None:
    plain = tmp_path / "plain.parquet"
    shape = ("--layers", 2, "--experts", 4, "--top-k", 1)
    assert code_of("trace", "synth", plain, "--requests", 2, *TOKENS, *shape) == 0
    runs = answer("replay", "--trace", plain, "--policy", "lru,next-gate")["runs"]
    assert "not_run" not in runs[0]
    assert "needs AHEAD" in runs[1]["not_run"]
    assert "--allow ahead=recall" in refused("replay", "--trace", plain, "--policy", "next-gate")
    allowed = "ahead=recall:0.8@1"
    (run,) = answer("replay", "--trace", plain, "--policy", "next-gate", "--allow", allowed)["runs"]
    assert run["allowed"] == [allowed]


# ---- replay: what is refused ---------------------------------------------------------------------

REFUSALS = {
    "unknown policy": (["--policy", "lrx"], "did you mean lru"),
    "unlike any policy": (["--policy", "zzzzzz"], "known: lru"),
    "one unknown of several": (["--policy", "lru,leats-stale"], "least-stale"),
    "policy module": (["--policy", "no_such_module:Class"], "no module no_such_module"),
    "policy class": (["--policy", "json:Nothing"], "json has no Nothing"),
    "policy without module": (["--policy", ":"], "module:Class"),
    "policy without class": (["--policy", "json:"], "module:Class"),
    "unknown seat kind": (["--set", "kep=lfu"], "prefetch, keep, miss, route"),
    "unknown seat": (["--set", "keep=lfx"], "did you mean lfu"),
    "setting without value": (["--set", "keep="], "seat=name"),
    "setting without sign": (["--set", "keep"], "seat=name"),
    "unknown parameter": (["--policy", "lfu-decay", "--set", "keep.gama=0.5"], "gamma"),
    "parameter of no seat": (["--set", "keep.gamma=0.5"], "no such parameter"),
    "parameter of a wrong type": (
        ["--policy", "lfu-decay", "--set", "keep.gamma=much"],
        "must be a number",
    ),
    "parameter out of range": (["--policy", "lfu-decay", "--set", "keep.gamma=7"], "gamma"),
    "parameter that is no number": (["--policy", "lfu-decay", "--set", "keep.gamma=nan"], "gamma"),
    "capacity 0": (["--capacity", "0"], "at least one expert"),
    "capacity 0%": (["--capacity", "0%"], "at least one expert"),
    "capacity 0/layer": (["--capacity", "0/layer"], "at least one expert"),
    "capacity 0GiB": (["--capacity", "0GiB"], "at least one expert"),
    "capacity in bytes below one expert": (["--capacity", "12582911B"], "at least one expert"),
    "capacity share below one expert": (["--capacity", "1%"], "at least one expert"),
    "capacity share of a layer below one": (
        ["--capacity", "12%", "--scope", "layer"],
        "at least one expert",
    ),
    "capacity count below one a layer": (
        ["--capacity", "2", "--scope", "layer"],
        "at least one expert",
    ),
    "one capacity of several": (["--capacity", "50%,0"], "--capacity 0"),
    "capacity beyond all": (["--capacity", "101%"], "100%"),
    "capacity negative": (["--capacity=-3"], "write 24GiB"),
    "capacity in words": (["--capacity", "much"], "write 24GiB"),
    "capacity in unknown units": (["--capacity", "3parsecs"], "24GiB"),
    "capacity not a number": (["--capacity", "nan%"], "write 24GiB"),
    "unknown scope": (["--scope", "galaxy"], "layer"),
    "unknown mode": (["--mode", "grp"], "group"),
    "unknown engine": (["--engine", "warp"], "reference"),
    "unknown option": (["--polcy", "lru"], "--polcy"),
    "unknown hardware": (["--hardware", "rtx409"], "rtx4090"),
    "hardware file that is not there": (["--hardware", "none.toml"], "none.toml"),
    "unknown costs": (["--costs", "mixtral-8x7"], "mixtral-8x7b"),
    "unknown degradation": (["--allow", "gate=guess"], "gate=topk"),
    "impossible recall": (["--allow", "ahead=recall:1.5"], "between 0 and 1"),
    "bandwidth 0": (["--bandwidth", "0"], "--bandwidth"),
    "bandwidth in words": (["--bandwidth", "quick"], "--bandwidth"),
    "initial file that is not there": (["--initial", "none.json"], "none.json"),
    "timeline without out": (["--timeline"], "--out"),
    "limit 0": (["--limit", "0"], "at least 1"),
    "batch in words": (["--batch", "two"], "at least 1"),
    "seed in words": (["--seed", "x"], "--seed"),
    "seed beyond 64 bits": (["--policy", "random", "--seed", "9" * 30], "--seed"),
    "arrivals that were not recorded": (["--arrivals", "recorded"], "arrival_ns"),
    "unknown arrivals": (["--arrivals", "sometimes"], "poisson:RATE"),
    "a rate that is none": (["--arrivals", "poisson", "--rate", "fast"], "--rate"),
    "a rate of nothing": (["--rate", "2"], "--rate: back-to-back"),
    "poisson without a rate": (["--arrivals", "poisson"], "poisson:2.91"),
    "a log that is none": (["--arrivals", __file__], "first line must be"),
    "limits that are none": (["--slo", "speed=2s"], "--slo"),
    "a time that is none": (["--until", "soon"], "--until"),
    "a budget of a static batch": (["--token-budget", "9"], "--scheduler"),
    "turns that are none": (["--turns", "1"], "--turns"),
    "turns of no log": (["--turns", "log"], "--turns log"),
    "an order that is none": (["--shift", "mood:3"], "--shift"),
    "a future that arrivals hide": (["--arrivals", "poisson:2", "--policy", "min"], "--arrivals"),
    "a ladder beside arrivals": (["--arrivals", "poisson:2", "--ladder"], "--ladder"),
    "calibration that is not there": (["--calibration", "none.parquet"], "none.parquet"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_wrong_option_is_one_clear_line(case: str, tiny: Path, refused: Refused) -> None:
    words, told = REFUSALS[case]
    assert told in refused("replay", "--trace", tiny, *words)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1, 1]", "[1.5]", "[true]", "[99]", "[-1]"])
def test_a_wrong_initial_file_is_one_clear_line(
    text: str, tiny: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "initial.json"
    path.write_text(text)
    assert "--initial" in refused("replay", "--trace", tiny, "--initial", path)


COMMANDS = {
    "no command": [],
    "unknown command": ["repaly"],
    "no trace": ["replay"],
    "no trace command": ["trace"],
    "no such profile": ["profiles", "rtx409"],
    "a run that is none": ["diff", "none", "none"],
    "info of nothing": ["trace", "info", "none.parquet"],
    "check of nothing": ["trace", "check", "none.parquet"],
    "head of nothing": ["trace", "head", "none.parquet", "x.parquet", "--tokens", "1"],
    "convert nothing": ["trace", "convert", "none.npz", "x.parquet"],
    "synth of nothing": ["trace", "synth", "x.parquet"],
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command_is_one_clear_line(
    case: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(*COMMANDS[case])
    assert list(tmp_path.iterdir()) == []


# ---- replay: bad traces --------------------------------------------------------------------------


def table_of(path: Path) -> pa.Table:
    """The rows, with the trace's metadata (which a plain read leaves behind)."""
    kept = {METADATA_KEY: pq.read_metadata(path).metadata[METADATA_KEY]}
    return pq.read_table(path).replace_schema_metadata(kept)


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with one column in the place of another, metadata kept."""
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), values)


def changed_lists(table: pa.Table, name: str, change: Callable[[Any], None]) -> pa.Table:
    """The table with a fixed-list column changed in place."""
    column = table.column(name).combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False).copy()
    rows = values.reshape(len(column), -1)
    change(rows)
    made = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    return with_column(table, name, made.cast(table.schema.field(name).type))


def out_of_range(rows: Any) -> None:
    rows[5, 0] = 8


def duplicated(rows: Any) -> None:
    rows[5, 1] = rows[5, 0]


def not_a_number(rows: Any) -> None:
    rows[5, 0] = np.nan


def newer(table: pa.Table) -> pa.Table:
    meta = json.loads(table.schema.metadata[METADATA_KEY])
    return table.replace_schema_metadata({METADATA_KEY: json.dumps({**meta, "schema": 99})})


def without_a_layer(table: pa.Table) -> pa.Table:
    kept = (table["layer"].to_numpy() != 1) | (table["iteration"].to_numpy() != 2)
    meta = json.loads(table.schema.metadata[METADATA_KEY])
    text = json.dumps({**meta, "rows": int(kept.sum())})
    return table.filter(kept).replace_schema_metadata({METADATA_KEY: text})


BROKEN: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "without metadata": (lambda t: t.replace_schema_metadata(None), "moesim"),
    "without experts": (lambda t: t.drop_columns(["experts"]), "experts"),
    "experts of a wrong type": (
        lambda t: t.set_column(
            t.schema.get_field_index("experts"), "experts", pa.array(["x"] * len(t))
        ),
        "experts",
    ),
    "newer schema": (newer, "99"),
    "unsorted": (lambda t: t.take([1, 0, *range(2, len(t))]), "request 0"),
    "out of range": (lambda t: changed_lists(t, "experts", out_of_range), "out of range"),
    "duplicate expert": (lambda t: changed_lists(t, "experts", duplicated), "twice"),
    "missing layer": (without_a_layer, "layer 1"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("command", ["replay", "check", "head"])
def test_a_broken_trace_is_one_clear_line(
    case: str, command: str, tiny: Path, tmp_path: Path, refused: Refused
) -> None:
    change, told = BROKEN[case]
    path = tmp_path / "broken.parquet"
    pq.write_table(change(table_of(tiny)), path)
    line = refused(*command_on(command, path))
    assert told in line
    assert str(path) in line, "a line about a file must name it"
    assert list(tmp_path.iterdir()) == [path]


def command_on(command: str, path: Path) -> list[object]:
    """A command that reads a whole trace."""
    return {
        "replay": ["replay", "--trace", path, "--out", path.parent],
        "check": ["trace", "check", path],
        "head": ["trace", "head", path, path.parent / "head.parquet", "--requests", 99],
    }[command]


@pytest.mark.parametrize("command", ["replay", "check", "head"])
@pytest.mark.parametrize("case", ["empty", "text", "truncated", "no footer", "folder", "nothing"])
def test_a_file_that_is_no_trace_is_one_clear_line(
    case: str, command: str, tiny: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "broken.parquet"
    whole = tiny.read_bytes()
    contents = {
        "empty": b"",
        "text": b"request,layer\n0,0\n",
        "truncated": whole[: len(whole) // 2],
        "no footer": whole[:-8],
    }
    if case in contents:
        path.write_bytes(contents[case])
    elif case == "folder":
        path.mkdir()
    before = set(tmp_path.iterdir())
    assert str(path) in refused(*command_on(command, path))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["replay", "check"])
def test_a_trace_with_a_weight_that_is_not_a_number_is_refused(
    command: str, tiny: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "nan.parquet"
    pq.write_table(changed_lists(table_of(tiny), "weights", not_a_number), path)
    assert "weight" in refused(*command_on(command, path)).replace(str(path), "")


# ---- replay: policies that break the protocol ----------------------------------------------------

BREACHES = {
    "NamesPinned": "pinned",
    "NamesAbsent": "absent",
    "NamesNobody": "free too little",
    "NamesTwice": "twice",
    "NamesNoId": "no expert id",
    "NamesBeyond": "no expert id",
    "NamesNone": "",
    "AnswersNothing": "not a Plan",
    "AnswersList": "not a Plan",
    "ScoresFloats": "int64",
    "ScoresTooFew": "int64",
    "ScoresText": "int64",
    "PrefetchesBeyond": "1000000000",
    "PrefetchesNegative": "-1",
    "PrefetchesText": "",
    "PrefetchesPrecision": "precision 9",
    "PrefetchesBareIds": "",
    "CancelsBeyond": "1000000000",
    "SkipsUndeclared": "lossy",
    "ServesNonsense": "",
    "WritesStates": "read-only",
    "NeedsArguments": "size",
    "NoPolicy": "NoPolicy",
}
SEAT_BREACHES = {
    "keep=broken_policies:KeepNothing": "int64",
    "keep=broken_policies:NoPolicy": "no keep seat",
    "keep=broken_policies:PlansNothing": "no keep seat",
    "keep=json:loads": "",
    "prefetch=broken_policies:PlansNothing": "",
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_policy_that_breaks_the_protocol_is_one_clear_line(
    name: str, tiny: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DATA))
    line = refused(
        *("replay", "--trace", tiny, "--policy", f"broken_policies:{name}"),
        *("--capacity", "3/layer", "--out", tmp_path),
    )
    assert BREACHES[name] in line
    assert name in line, "a line about one of several policies must name it"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", SEAT_BREACHES)
def test_a_seat_that_breaks_the_protocol_is_one_clear_line(
    setting: str, tiny: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DATA))
    line = refused("replay", "--trace", tiny, "--capacity", "3/layer", "--set", setting)
    assert SEAT_BREACHES[setting] in line


# ---- run folders ---------------------------------------------------------------------------------


def only_run(found: dict[str, Any]) -> Path:
    (run,) = found["runs"]
    return Path(run["run_dir"])


def contents(folder: Path) -> dict[str, bytes]:
    """What must be equal between equal runs."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "host.json"}


def test_equal_inputs_give_equal_bytes_in_any_process(
    tiny: Path, tmp_path: Path, answer: Answer
) -> None:
    words = ("replay", "--trace", tiny, "--policy", "next-gate", "--timeline", "--out")
    here = only_run(answer(*words, tmp_path / "a"))
    assert {p.name for p in here.iterdir()} == {*FILES, "timeline.json"}
    there = run_cli(*words, tmp_path / "b", "--json", "--policy", "lru", "--capacity", "25%,50%")
    assert there.returncode == 0
    folders = [Path(run["run_dir"]) for run in json.loads(there.stdout)["runs"]]
    same = [folder for folder in folders if folder.name == here.name]
    assert len(folders) == 4 and len(same) == 1
    assert contents(same[0]) == contents(here)


def test_a_finished_run_is_not_made_again(
    tiny: Path, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("replay", "--trace", tiny, "--policy", "lru", "--out", tmp_path)
    first = answer(*words)
    monkeypatch.setattr("moesim.replays.ReferenceEngine", lambda setup: pytest.fail("ran again"))
    assert answer(*words) == first


CHANGES = (
    ["--capacity", "50%"],
    ["--scope", "layer"],
    ["--hardware", "h100"],
    ["--bandwidth", "4GB/s"],
    ["--costs", "mixtral-8x7b"],
    ["--order", "barrier"],
    ["--allocator", "slots"],
    ["--kv", "share"],
    ["--mode", "flat"],
    ["--batch", "2"],
    ["--chunk-tokens", "2"],
    ["--limit", "2"],
    ["--seed", "1"],
    ["--initial", "static"],
    ["--set", "prefetch=previous-token"],
    ["--set", "miss=cpu"],
    ["--policy", "fifo"],
)


def test_whatever_determines_a_run_names_its_folder(
    tiny: Path, tmp_path: Path, answer: Answer
) -> None:
    base = ("replay", "--trace", tiny, "--out", tmp_path)
    names = [only_run(answer(*base, *change)).name for change in ([], *CHANGES)]
    assert len(set(names)) == 1 + len(CHANGES)
    assert {p.name for p in tmp_path.iterdir()} == set(names)


@pytest.mark.parametrize("lost", sorted(FILES - {"host.json"}))
def test_a_folder_that_lacks_a_file_is_not_taken_for_a_finished_run(
    lost: str, tiny: Path, tmp_path: Path, answer: Answer
) -> None:
    words = ("replay", "--trace", tiny, "--policy", "lru", "--out", tmp_path)
    first = answer(*words)
    folder = only_run(first)
    before = contents(folder)
    (folder / lost).unlink()
    assert answer(*words) == first
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["summary.json", "manifest.json"])
def test_a_folder_with_a_damaged_file_is_not_taken_for_a_finished_run(
    name: str, tiny: Path, tmp_path: Path, answer: Answer
) -> None:
    words = ("replay", "--trace", tiny, "--policy", "lru", "--out", tmp_path)
    first = answer(*words)
    path = only_run(first) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert answer(*words) == first
    assert path.read_bytes() == whole


def test_what_a_killed_run_left_beside_does_no_harm(
    tiny: Path, tmp_path: Path, answer: Answer
) -> None:
    words = ("replay", "--trace", tiny, "--policy", "lru", "--out", tmp_path)
    folder = only_run(answer(*words))
    left = tmp_path / f".{folder.name}.tmp-{os.getpid()}"
    shutil.rmtree(folder)
    left.mkdir()
    (left / "summary.json").write_text("{}")
    assert contents(only_run(answer(*words)))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_timeline_is_chrome_trace_events(tiny: Path, tmp_path: Path, answer: Answer) -> None:
    words = ("--policy", "next-gate", "--capacity", "3/layer", "--timeline", "--out", tmp_path)
    found = answer("replay", "--trace", tiny, *words)
    events = json.loads((only_run(found) / "timeline.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {"dense", "expert", "stall", "demand", "prefetch"} == {s["cat"] for s in spans}
    stalls = sum(round(1000 * s["dur"]) for s in spans if s["cat"] == "stall")
    assert stalls == found["runs"][0]["stall_ns"]
    for track in {s["tid"] for s in spans}:
        ends = 0.0
        for span in (s for s in spans if s["tid"] == track):
            assert span["ts"] >= ends - 1e-6, "a lane does one thing at a time"
            ends = span["ts"] + span["dur"]


# ---- output that cannot be written ---------------------------------------------------------------


def test_an_output_that_cannot_be_written_is_one_clear_line(
    tiny: Path, tmp_path: Path, refused: Refused
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for out in (blocked, blocked / "below", Path("/dev/null/below")):
        assert str(out) in refused("replay", "--trace", tiny, "--out", out)
    for command in (("head", tiny), ("synth",)):
        target = blocked / "t.parquet"
        more = ["--tokens", 1] if command[0] == "head" else ["--requests", 1, *TOKENS]
        shape = [] if command[0] == "head" else ["--layers", 1, "--experts", 2, "--top-k", 1]
        assert str(target) in refused("trace", *command, target, *more, *shape)
    assert blocked.read_text() == "in the way"


def limited(blocks: int, *words: object) -> subprocess.CompletedProcess[str]:
    """A process that may write files of so many KiB at most: what a full disk does."""
    command = ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "-", sys.executable, "-B"]
    return subprocess.run(
        [*command, "-m", "moesim", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_disk_that_fills_up_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    ended = limited(1, "replay", "--trace", tiny, "--policy", "lru", "--out", tmp_path, "--json")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert str(tmp_path) in one_line(ended.stderr)
    assert list(tmp_path.iterdir()) == []
    target = tmp_path / "t.parquet"
    made = ("trace", "synth", target, "--requests", 400, "--prompt-tokens", 64, *SHAPE)
    ended = limited(64, *made, "--output-tokens", 32)
    assert ended.returncode == 2
    assert str(target) in one_line(ended.stderr)
    assert list(tmp_path.iterdir()) == []


SHAPE = ("--layers", 6, "--experts", 32, "--top-k", 4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_clear_line(tiny: Path) -> None:
    for words in (["--json"], []):
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run(
                [sys.executable, "-m", "moesim", "replay", "--trace", tiny, *words],
                cwd=ROOT,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=120,
                check=False,
            )
        assert ended.returncode == 2
        assert "No space left" in one_line(ended.stderr)


def test_a_reader_that_leaves_is_no_error(tiny: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "moesim", "policies", "--json"],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


# ---- Ctrl-C --------------------------------------------------------------------------------------


def interrupted(ready: Callable[[], bool], *words: object) -> None:
    """Start a command, press Ctrl-C when it is ready; it must leave in order."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moesim", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where tests run in the background, Ctrl-C may be ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 60
        while not ready():
            assert process.poll() is None, "it ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert err.startswith("moesim: interrupted") and err.count("\n") == 1, err


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace whose replay takes half a minute."""
    path = tmp_path_factory.mktemp("big") / "big.parquet"
    size = ("--requests", 60, "--prompt-tokens", 0, "--output-tokens", 200)
    assert code_of("trace", "synth", path, *size, *SHAPE) == 0
    return path


def test_ctrl_c_in_a_replay_leaves_no_run_behind(big: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    # The fast engine might be done before the key is pressed.
    words = ("--trace", big, "--policy", "lru", "--engine", "reference", "--out", out, "--json")
    interrupted(out.exists, "replay", *words)
    assert list(out.iterdir()) == []


def test_ctrl_c_in_a_conversion_leaves_no_file_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "big.npy", tmp_path / "big.parquet"
    # One long sequence of distinct experts: nothing is written before the end, all of it is read.
    first = np.arange(600_000 * 8, dtype=np.uint32).reshape(-1, 8, 1)
    np.save(source, ((first + np.arange(4)) % 32).astype(np.uint8))

    def begun() -> bool:
        return any(path.name.startswith(".big.parquet.tmp") for path in tmp_path.iterdir())

    words = ("--experts", 32, "--phase", "decode")
    interrupted(begun, "trace", "convert", source, target, *words)
    assert list(tmp_path.iterdir()) == [source]


def test_ctrl_c_while_results_are_written_leaves_no_run_behind(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moesim.result._write_requests", interrupt)
    assert code_of("replay", "--trace", tiny, "--out", tmp_path) == 130
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


# ---- the other commands --------------------------------------------------------------------------


def test_policies_lists_every_preset_and_seat(
    answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer("policies")
    assert {p["name"] for p in found["policies"]} >= set(PRESETS)
    assert {f"{s['kind']}.{s['name']}" for s in found["seats"]} >= set(SEATS)
    assert code_of("policies") == 0
    out = capsys.readouterr().out
    for name in (*PRESETS, *(ref.partition(".")[2] for ref in SEATS)):
        assert re.search(rf"(^|\s){re.escape(name)}(\s|$)", out, re.MULTILINE), name


def test_profiles_prints_a_file_that_can_be_used(
    tiny: Path, tmp_path: Path, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = answer("profiles")
    assert "rtx4090" in {machine["name"] for machine in listed["hardware"]}
    assert code_of("profiles") == 0
    assert "rtx4090" in capsys.readouterr().out
    assert code_of("profiles", "rtx4090") == 0
    copy = tmp_path / "mine.toml"
    copy.write_text(capsys.readouterr().out)
    mine = answer("replay", "--trace", tiny, "--hardware", copy)
    assert mine == answer("replay", "--trace", tiny, "--hardware", "rtx4090")


def test_diff_tells_inputs_from_results(
    tiny: Path, tmp_path: Path, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("replay", "--trace", tiny, "--out", tmp_path)
    a = only_run(answer(*base))
    b = only_run(answer(*base, "--capacity", "50%"))
    same = answer("diff", a, a)
    assert same == {"schema": 1, "inputs": {}, "results": {}}
    found = answer("diff", a, b, code=1)
    assert found["inputs"]["capacity_as_typed"] == {"a": "25%", "b": "50%"}
    assert found["results"]["time_ns"]["ratio"] < 1
    assert not {key for key in found["inputs"] if not key.startswith("capacity")}
    assert code_of("diff", a, a) == 0
    assert "results: equal" in capsys.readouterr().out
    assert code_of("diff", a, b) == 1
    assert "time_ns" in capsys.readouterr().out


def test_diff_refuses_what_is_no_run(
    tiny: Path, tmp_path: Path, answer: Answer, refused: Refused
) -> None:
    a = only_run(answer("replay", "--trace", tiny, "--out", tmp_path))
    assert str(tmp_path) in refused("diff", a, tmp_path)
    (a / "summary.json").write_text("{")
    assert str(a) in refused("diff", a, a)
    (a / "summary.json").write_text("[]")
    assert str(a) in refused("diff", a, a)


def test_the_trace_commands_speak_json(tiny: Path, tmp_path: Path, answer: Answer) -> None:
    info, check = answer("trace", "info", tiny), answer("trace", "check", tiny)
    assert (info["meta"]["requests"], check["ok"], check["warnings"]) == (4, True, [])
    cut = answer("trace", "head", tiny, tmp_path / "head.parquet", "--requests", 2)
    assert cut["requests"] == 2
    again = ("trace", "synth", tmp_path / "again.parquet", "--requests", 2, *TOKENS)
    shape = ("--layers", 3, "--experts", 8, "--top-k", 2, "--ahead", 1, "--seed", 3)
    assert answer(*again, *shape)["digest"] == cut["digest"]


def test_help_and_version_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["replay", "--help"], ["trace", "convert", "--help"], ["--version"]):
        assert code_of(*words) == 0
        out, err = capsys.readouterr()
        assert "moesim" in out
        assert err == ""


def test_a_real_process_agrees(tiny: Path, answer: Answer) -> None:
    ended = run_cli("replay", "--trace", tiny, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout) == answer("replay", "--trace", tiny)
    ended = run_cli("replay", "--trace", tiny, "--policy", "lrx")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "did you mean lru" in one_line(ended.stderr)


def test_a_ctrl_c_that_a_library_swallows_ends_the_command_all_the_same() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with heard(), requests_progress("work") as progress:
            progress(1, 3)
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                progress(2, 3)
        with heard(), requests_progress("work") as progress:
            progress(1, 3)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_replay_does_not_wait_for_pandas() -> None:
    code = (
        "import sys; from moesim.cli import main; main(sys.argv[1:]); "
        "assert not {'pandas', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    words = ["replay", "--trace", "demo", "--limit", "1", "--engine", "reference", "--json"]
    ended = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True)
    assert ended.returncode == 0, ended.stderr
