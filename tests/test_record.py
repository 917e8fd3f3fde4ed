"""`moesim record`: whole recordings, stopped and resumed ones, and everything that can go wrong."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from moesim.cli import main
from moesim.cli.record import _Rate
from moesim.errors import UsageError
from moesim.traces import parts as parts_module
from moesim.traces.batches import BatchRecorder, Encoded, Generation
from moesim.traces.check import check_file
from moesim.traces.gate_taps import Wanted
from moesim.traces.gates import find_gates
from moesim.traces.import_arrays import prompt_digest
from moesim.traces.prompt_sources import open_prompts
from moesim.traces.reader import RequestFacts, RequestRows, TraceReader
from moesim.traces.record import Recording, Silence, record
from moesim.traces.record_model import Loaded
from tests import tiny_moe

NEW = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer on disk."""
    return tiny_moe.save("olmoe", tmp_path_factory.mktemp("model") / "tiny-olmoe")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Loaded:
    return Loaded("tiny-olmoe", "", tiny_moe.build("olmoe"), tiny_moe.tokenizer())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short prompts of two topics."""
    path = tmp_path_factory.mktemp("prompts") / "short.jsonl"
    lines = [
        json.dumps({"text": f"prompt {'x' * (n * 3 % 11)} {n}", "topic": "ab"[n % 2]})
        for n in range(20)
    ]
    path.write_text("\n".join(lines))
    return path


def options(prompts: Path, out: Path, **more: Any) -> Recording:
    generation = more.pop("generation", Generation(max_new_tokens=NEW))
    return Recording(
        **{
            "model": "tiny",
            "out": out,
            "prompts": str(prompts),
            "generation": generation,
            "batch_size": 3,
            "ahead": (1, 2),
            **more,
        }
    )


def rows_of(path: Path) -> list[RequestRows]:
    with TraceReader(path) as reader:
        return list(reader.requests())


class Said(Silence):
    """Keeps what the user would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[tuple[int, int | None]] = []
        self.count = 0

    def say(self, line: str) -> None:
        self.lines.append(line)

    def requests(self, done: int, total: int | None) -> None:
        self.done.append((done, total))

    def tokens(self, count: int) -> None:
        self.count += count


# ---- a whole recording ---------------------------------------------------------------------------


def test_a_recording_checks_and_replays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.parquet"
    words = ["record", "--model", str(folder), "--out", str(out), "--limit", "8", "--norms"]
    words += ["--max-new-tokens", str(NEW), "--embeddings", "iteration", "--split", "7:3"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["requests"] == 8 and told["model"]["layers"] == 4
    assert check_file(out).warnings == ()
    assert not (tmp_path / "x.parts").exists()
    assert main(["replay", "--trace", str(out), "--policy", "lru,next-gate", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "not run" not in json.dumps(told)


def test_the_metadata_is_complete(tiny: Loaded, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    meta = record(
        options(prompts, out, norms=True, embeddings="prompt", split=(7, 3), keep_text=True),
        loaded=tiny,
    )
    with TraceReader(out) as reader:
        assert reader.meta == meta
    assert (meta.model.name, meta.model.layers, meta.experts, meta.top_k) == (
        "tiny-olmoe",
        4,
        16,
        4,
    )
    assert meta.score == meta.model.score == "softmax" and meta.rank_order == "weight"
    assert (meta.dtype, meta.device, meta.dataset) == ("fp32", "cpu", prompts.name)
    assert {"torch", "transformers", "tokenizers", "moesim"} == set(meta.versions)
    assert meta.ahead == {1: 4, 2: 4} and meta.embedding == "prompt"
    assert meta.has_weights and meta.has_gate and meta.has_norms and meta.has_tokens
    assert meta.split == "7:3 train:test"
    norms = np.array(meta.expert_norms)
    bank = tiny.model.model.layers[2].mlp.experts
    squares = sum(p.detach().double().flatten(1).pow(2).sum(1) for p in bank.parameters())
    np.testing.assert_allclose(norms[2], squares.sqrt().numpy(), rtol=1e-5)
    texts = [prompt.text for prompt in open_prompts(str(prompts)).prompts()]
    for text, one in zip(texts, rows_of(out), strict=True):
        assert one.facts.text == text and one.facts.prompt_digest == prompt_digest(text)
        assert one.facts.topic in ("a", "b") and one.facts.split in ("train", "test")
        assert one.facts.prompt_tokens == len(text.encode())
        table = tiny.model.get_input_embeddings().weight.detach().numpy()
        mean = table[tiny.tokenizer(text)["input_ids"]].mean(axis=0)
        assert one.facts.prompt_embedding is not None and not one.embedding
        np.testing.assert_allclose(one.facts.prompt_embedding, mean, atol=1e-3)


def test_top_k_only(tiny: Loaded, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    meta = record(options(prompts, out, gate="topk", ahead=(), limit=3), loaded=tiny)
    assert not meta.has_gate and not meta.ahead and not meta.has_norms and meta.has_weights
    full = record(options(prompts, tmp_path / "y.parquet", limit=3), loaded=tiny)
    assert full.has_gate
    for one, other in zip(rows_of(out), rows_of(tmp_path / "y.parquet"), strict=True):
        np.testing.assert_array_equal(one.experts, other.experts)
        assert one.facts.text is None


@pytest.mark.parametrize("split", [(7, 3), (1, 1), (9, 1)])
def test_the_split_holds_within_each_topic_and_in_all(split: tuple[int, int]) -> None:
    from moesim.traces.record import _Splits

    splits = _Splits(split)
    dealt: dict[str, list[str | None]] = {}
    for prompt in open_prompts("builtin").prompts():
        dealt.setdefault(str(prompt.topic), []).append(splits.next(prompt.topic))
    share = split[0] / sum(split)
    for found in dealt.values():
        assert abs(found.count("train") - share * len(found)) < 1
    everything = [one for found in dealt.values() for one in found]
    assert abs(everything.count("train") - share * len(everything)) <= 2
    assert len(everything) >= 84


def test_a_chat_template_is_used_where_there_is_one(
    tiny: Loaded, prompts: Path, tmp_path: Path
) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    chatting = Loaded(tiny.name, "", tiny.model, tokenizer)
    meta = record(options(prompts, tmp_path / "x.parquet", limit=2), loaded=chatting)
    (one, _) = rows_of(tmp_path / "x.parquet")
    assert one.token is not None
    tokens = one.token[(one.layer == 0) & (one.iteration == 0)]
    assert tokenizer.decode(tokens.tolist()) == "[prompt  0]>"
    assert any("chat template" in note for note in meta.notes)


def test_encoder_and_decoder_in_one_trace(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    meta = record(options(prompts, out, limit=4), loaded=tiny_moe.loaded("switch"))
    assert [(s.name, s.layers) for s in meta.model.stacks] == [("encoder", 2), ("decoder", 2)]
    assert check_file(out).warnings == ()


# ---- ends and draws ------------------------------------------------------------------------------


def encoded(texts: list[str], tiny: Loaded) -> list[Encoded]:
    return [
        Encoded(n, np.array(tiny.tokenizer(t)["input_ids"], dtype=np.int32), RequestFacts())
        for n, t in enumerate(texts)
    ]


def recorder(tiny: Loaded, generation: Generation) -> BatchRecorder:
    gates = find_gates(tiny.model, [5, 6, 7])
    return BatchRecorder(tiny, gates, Wanted(ahead=(1,)), generation)


def test_nothing_is_recorded_after_the_end_token(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = encoded(["to be", "or not", "that is the question"], tiny)
    generation = Generation(max_new_tokens=12)
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [tiny_moe.VOCABULARY])
    with recorder(tiny, generation) as unended:
        before = unended.record(batch)
    assert all(one.facts.output_tokens == 12 for one in before)
    first = before[0].token
    assert first is not None
    outputs = first[(first >= 0) & (before[0].iteration > 0)]
    end = int(outputs[3])  # what the first sequence says as its fourth token
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [end])
    with recorder(tiny, generation) as ended:
        after = ended.record(batch)
    for one, other in zip(before, after, strict=True):
        tokens = one.token
        assert tokens is not None
        said = tokens[(tokens >= 0) & (one.iteration > 0)].tolist()
        length = said.index(end) + 1 if end in said else 12
        assert other.facts.output_tokens == length
        kept = one.iteration < length
        np.testing.assert_array_equal(one.experts[kept], other.experts)
    assert after[0].facts.output_tokens == outputs.tolist().index(end) + 1


def test_sampling_depends_on_the_seed_alone(tiny: Loaded) -> None:
    def drawn(seed: int, batches: list[list[Encoded]]) -> list[list[int]]:
        generation = Generation(max_new_tokens=8, sample=True, seed=seed, temperature=3.0)
        with recorder(tiny, generation) as one:
            rows = [rows for batch in batches for rows in one.record(batch)]
        return [r.token[r.layer == 0].tolist() for r in rows if r.token is not None]

    batch = encoded(["to be", "or not"], tiny)
    other = [Encoded(7, batch[0].tokens, RequestFacts())]
    assert drawn(1, [batch]) == drawn(1, [other, batch])[1:]
    assert drawn(1, [batch]) != drawn(2, [batch])
    assert drawn(1, [batch])[0] != drawn(1, [other])[0]


def test_a_models_own_sampling_settings_do_not_bend_greedy(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = encoded(["to be", "or not"], tiny)
    with recorder(tiny, Generation(max_new_tokens=8)) as plain:
        before = plain.record(batch)
    for name, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0}.items():
        monkeypatch.setattr(tiny.model.generation_config, name, value)
    with recorder(tiny, Generation(max_new_tokens=8)) as bent:
        after = bent.record(batch)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.token, other.token)


# ---- stopping and going on -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: Loaded, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, bytes]:
    """The files of whole recordings: greedy and sampled."""
    made = {}
    for sample in (False, True):
        out = tmp_path_factory.mktemp("whole") / "x.parquet"
        generation = Generation(max_new_tokens=NEW, sample=sample, seed=3)
        record(options(prompts, out, generation=generation), loaded=tiny)
        made[sample] = out.read_bytes()
    return made


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("at", [0, 1, 7, 19])
def test_an_interrupted_recording_goes_on_to_the_same_bytes(
    tiny: Loaded,
    prompts: Path,
    tmp_path: Path,
    uninterrupted: dict[bool, bytes],
    at: int,
    sample: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "x.parquet"
    generation = Generation(max_new_tokens=NEW, sample=sample, seed=3)
    begun = options(prompts, out, generation=generation)
    written: list[int] = []
    write = parts_module.Parts.write

    def breaking(self: Any, rows: RequestRows) -> None:
        if len(written) == at:
            raise KeyboardInterrupt
        written.append(rows.request)
        write(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(parts_module.Parts, "write", breaking)
        with pytest.raises(KeyboardInterrupt):
            record(begun, loaded=tiny)
    assert not out.exists() and (tmp_path / "x.parts").exists() == (at > 0)
    record(options(prompts, out, generation=generation, resume=True), loaded=tiny)
    assert out.read_bytes() == uninterrupted[sample]
    assert list(tmp_path.iterdir()) == [out]


def test_kill_9_loses_and_doubles_nothing(folder: Path, prompts: Path, tmp_path: Path) -> None:
    words = ["record", "--model", str(folder), "--prompts", str(prompts), "--batch-size", "2"]
    words += ["--max-new-tokens", "16", "--sample", "--seed", "9", "--out"]
    out, whole = tmp_path / "x.parquet", tmp_path / "whole.parquet"
    process = subprocess.Popen(
        [sys.executable, "-m", "moesim", *words, str(out)],
        cwd=Path(__file__).parents[1],
        # As many threads as here: the order of sums, so their last bit, depends on it.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    parts = tmp_path / "x.parts"
    until = time.monotonic() + 120
    while len(list(parts.glob("*.npz"))) < 3 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.read_bytes() for path in parts.glob("*.npz")}
    assert 3 <= len(kept) < 20 and not out.exists()
    assert main([*words, str(whole)]) == 0
    assert main([*words, str(out)]) == 2  # not without --resume
    assert {path.name: path.read_bytes() for path in parts.glob("*.npz")} == kept
    assert main([*words, str(out), "--resume"]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert [one.request for one in rows_of(out)] == list(range(20))
    assert not parts.exists()


def test_resuming_what_is_complete_says_so(tiny: Loaded, prompts: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "x.parquet", Said()
    meta = record(options(prompts, out, limit=2), loaded=tiny)
    assert record(options(prompts, out, limit=2, resume=True), loaded=tiny, watch=said) == meta
    assert said.lines == [f"{out}: is complete already; nothing to resume"]


@pytest.fixture
def stopped(tiny: Loaded, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recording that stopped after six requests."""
    out = tmp_path / "x.parquet"
    record_batch = BatchRecorder.record

    def breaking(self: BatchRecorder, batch: list[Encoded]) -> list[RequestRows]:
        if batch[0].request >= 6:
            raise KeyboardInterrupt
        return record_batch(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(BatchRecorder, "record", breaking)
        with pytest.raises(KeyboardInterrupt):
            record(options(prompts, out), loaded=tiny)
    return out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate": "topk"}, "gate"),
        ({"batch_size": 2}, "batch_size"),
        ({"generation": Generation(max_new_tokens=9)}, "generation"),
        ({"ahead": (1,)}, "ahead"),
        ({"resume": False}, "--resume"),
    ],
)
def test_going_on_with_something_else_is_refused(
    tiny: Loaded, prompts: Path, stopped: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        record(options(prompts, stopped, **{"resume": True, **change}), loaded=tiny)
    assert len(list((stopped.parent / "x.parts").glob("*.npz"))) == 6


def test_other_prompts_are_refused(tiny: Loaded, stopped: Path, prompts: Path) -> None:
    lines = prompts.read_text().split("\n")
    other = stopped.parent / prompts.name
    other.write_text("\n".join(["changed", *lines[1:]]).replace("changed", json.dumps("changed")))
    plan = json.loads((stopped.parent / "x.parts" / "recording.json").read_text())
    plan["prompts"] = str(other)
    (stopped.parent / "x.parts" / "recording.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match="prompt 0 is not the one that was recorded"):
        record(options(other, stopped, resume=True), loaded=tiny)


def test_a_damaged_part_is_recorded_again(
    tiny: Loaded, prompts: Path, stopped: Path, uninterrupted: dict[bool, bytes]
) -> None:
    part = stopped.parent / "x.parts" / "000000004.npz"
    part.write_bytes(part.read_bytes()[:100])
    generation = Generation(max_new_tokens=NEW)
    record(options(prompts, stopped, resume=True, generation=generation), loaded=tiny)
    assert stopped.read_bytes() == uninterrupted_greedy(tiny, prompts, stopped.parent)


def uninterrupted_greedy(tiny: Loaded, prompts: Path, folder: Path) -> bytes:
    out = folder / "again.parquet"
    record(options(prompts, out), loaded=tiny)
    return out.read_bytes()


def test_two_recordings_do_not_write_to_one_folder(tmp_path: Path) -> None:
    plan = {"model": "x"}
    with parts_module.Parts(tmp_path / "x.parquet", plan, resume=False):
        other = parts_module.Parts(tmp_path / "x.parquet", plan, resume=True)
        with pytest.raises(UsageError, match="another recording"):
            other.__enter__()


# ---- memory --------------------------------------------------------------------------------------


def test_memory_does_not_grow(tiny: Loaded, prompts: Path, tmp_path: Path) -> None:
    """Between batches nothing but the model is held."""
    held: list[int] = []

    class Counting(Silence):
        def requests(self, done: int, total: int | None) -> None:
            gc.collect()
            held.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    record(options(prompts, tmp_path / "x.parquet", norms=True), loaded=tiny, watch=Counting())
    assert len(held) >= 7 and max(held[2:]) <= held[1]


def oom_above(size: int) -> Any:
    record_batch = BatchRecorder.record

    def recording(self: BatchRecorder, batch: list[Encoded]) -> list[RequestRows]:
        if len(batch) > size:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return record_batch(self, batch)

    return recording


def test_out_of_gpu_memory_halves_the_batch(
    tiny: Loaded, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchRecorder, "record", oom_above(2))
    said = Said()
    out = tmp_path / "x.parquet"
    meta = record(options(prompts, out, batch_size=8), loaded=tiny, watch=said)
    assert said.lines == [
        "out of GPU memory with a batch of 8: on with 4",
        "out of GPU memory with a batch of 4: on with 2",
    ]
    assert meta.requests == 20 and said.done[-1] == (20, 20)
    assert [one.request for one in rows_of(out)] == list(range(20))


def test_one_prompt_too_large_for_the_gpu_ends_it(
    tiny: Loaded, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchRecorder, "record", oom_above(0))
    with pytest.raises(UsageError, match=r"one prompt of \d+ tokens.*--dtype bfloat16"):
        record(options(prompts, tmp_path / "x.parquet"), loaded=tiny)


# ---- bad input -----------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail with one line; the line."""
    assert main(["record", *words]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    errors = [line for line in lines if line.startswith("moesim: error: ")]
    assert errors == lines[-1:], lines
    return errors[0]


@pytest.mark.parametrize("where", ["parts", "trace"])
def test_a_full_disk_loses_nothing_that_was_finished(
    tiny: Loaded, prompts: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.parquet"
    full = OSError(errno.ENOSPC, "No space left on device")
    calls = 0
    savez = np.savez

    def failing(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if where == "trace" or calls > 9:
            raise full
        savez(*args, **kwargs)

    with monkeypatch.context() as patch:
        if where == "parts":
            patch.setattr(np, "savez", failing)
        else:
            patch.setattr("pyarrow.parquet.ParquetWriter.write_table", failing)
        with pytest.raises(UsageError, match=r"No space left on device.*--resume"):
            record(options(prompts, out), loaded=tiny)
    kept = sorted((tmp_path / "x.parts").glob("*"))
    assert len([p for p in kept if p.suffix == ".npz"]) == (9 if where == "parts" else 20)
    assert not any("tmp" in path.name for path in (*kept, *tmp_path.iterdir()))
    record(options(prompts, out, resume=True), loaded=tiny)
    assert check_file(out).meta.requests == 20


def test_a_model_that_is_not_moe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tiny_moe.save("llama", tmp_path / "dense")
    line = refused(capsys, "--model", str(dense), "--out", str(tmp_path / "x.parquet"))
    assert "LlamaForCausalLM is not a Mixture-of-Experts model" in line
    assert not (tmp_path / "x.parts").exists()


def test_a_missing_tokenizer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    tiny_moe.build("olmoe").save_pretrained(bare)
    out = str(tmp_path / "x.parquet")
    line = refused(capsys, "--model", str(bare), "--out", out)
    assert "no tokenizer" in line and "--tokenizer" in line
    words = ["--tokenizer", str(folder), "--limit", "1", "--max-new-tokens", "1", "--out", out]
    assert main(["record", "--model", str(bare), *words]) == 0


def test_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, "--model", "./nowhere")
    assert "config.json" in refused(capsys, "--model", str(tmp_path))


def test_an_unreachable_hub_says_what_needs_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LocalEntryNotFoundError(OSError):
        """As huggingface_hub names it."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        try:
            raise LocalEntryNotFoundError("no connection")
        except LocalEntryNotFoundError as error:
            raise OSError("We couldn't connect to 'https://huggingface.co'\nto load") from error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    line = refused(capsys, "--model", "some/model", "--out", str(tmp_path / "x.parquet"))
    assert "the hub is not in reach" in line and "--model" in line and "folder" in line


def test_prompts_that_do_not_fit_are_skipped_and_told(tiny: Loaded, tmp_path: Path) -> None:
    path, said = tmp_path / "p.txt", Said()
    long = "x" * (tiny_moe.CONTEXT - NEW + 1)
    path.write_text("\n".join(["short", long, "brief", long[:-1]]))
    out = tmp_path / "x.parquet"
    meta = record(options(path, out), loaded=tiny, watch=said)
    assert [one.request for one in rows_of(out)] == [0, 2, 3] and meta.requests == 3
    assert said.lines == [
        f"prompt 1 has {len(long)} tokens and {NEW} new ones; the model's context is "
        f"{tiny_moe.CONTEXT}: skipped"
    ]
    assert said.done[-1] == (4, 4)
    path.write_text(long)
    with pytest.raises(UsageError, match="no prompt fits"):
        record(options(path, out), loaded=tiny)
    assert check_file(out).meta.requests == 3


def test_a_missing_column(folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(folder), "--prompts", str(prompts), "--out", "never.parquet"]
    line = refused(capsys, *words, "--column", "body")
    assert "no column 'body'; it has text, topic" in line
    assert "no column 'kind'" in refused(capsys, *words, "--topic-column", "kind")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ahead", "near"], "--ahead near"),
        (["--ahead", "0"], "--ahead: distances"),
        (["--split", "7"], "--split 7"),
        (["--split", "0:0"], "--split"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--limit", "0"], "--limit 0"),
        (["--top-p", "0"], "--top-p"),
        (["--temperature", "0"], "--temperature"),
        (["--out", "."], "is a folder"),
        (["--out", "nowhere/x.parquet"], "there is no folder nowhere"),
        (["--prompts", "nothing.jsonl"], "no such file"),
    ],
)
def test_bad_options_are_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, "--model", "demo", *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_no_gpu(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(folder), "--device", "cuda", "--out", str(tmp_path / "x.parquet")]
    assert "no CUDA GPU" in refused(capsys, *words)


def test_gates_that_give_nan(tiny: Loaded, prompts: Path, tmp_path: Path) -> None:
    sick = Loaded("sick", "", tiny_moe.build("olmoe"), tiny.tokenizer)
    sick.model.model.layers[1].self_attn.v_proj.weight.data[:] = float("nan")
    with pytest.raises(Exception, match=r"request 0: the model's gates gave NaN"):
        record(options(prompts, tmp_path / "x.parquet"), loaded=sick)


# ---- lightness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import moesim.traces, moesim.traces.reader, moesim.traces.parts",
        "from moesim.cli import main\ntry: main(['record', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_torch_loads_only_when_recording(code: str) -> None:
    check = "\nimport sys\nassert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code + check],
        check=False,
        capture_output=True,
        cwd=Path(__file__).parents[1],
    )
    assert ended.returncode == 0, ended.stderr


def test_what_recording_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("moesim.traces.record")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refused(capsys, "--model", "demo")
    assert "torch" in line and "pip install '.[record]'" in line


def test_progress_tells_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rate = _Rate()
    rate.requests(30, 100)  # recorded before
    assert rate.in_words() == "30/100 requests"
    rate.tokens(500)
    now[0] += 5
    rate.tokens(1000)
    rate.requests(40, 100)
    assert rate.in_words() == "40/100 requests, 200 tokens/s, 30 s left"
