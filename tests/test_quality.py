"""Quality measured on the model itself: laws, oracles, texts, files, the command."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import moesim.real
from moesim.capacity import Capacity
from moesim.cli import main
from moesim.errors import UsageError
from moesim.planning.file import Planned, load_plan
from moesim.real.offload_bank import SlotBank
from moesim.real.offload_options import Options
from moesim.real.quality import Bench, Judged, judge
from moesim.real.quality_rouge import Words
from moesim.real.quality_runs import Losses
from moesim.real.quality_text import Wanted, read_text
from moesim.traces import demo_pairs
from moesim.traces.record_model import Loaded
from moesim.traces.samples import trace_path
from tests import tiny_moe
from tests.test_offload import eager, one_thread

__all__ = ["one_thread"]

PROMPTS = [
    {"topic": "code", "text": "def shortest(graph, source): return [node for node in graph]"},
    {"topic": "code", "text": "import os, sys; print(os.environ.get('HOME', 'nowhere'))"},
    {"topic": "prose", "text": "The old house at the end of the lane had been empty for years."},
    {"topic": "prose", "text": "Nobody who lived there remembered who had planted the tree."},
]
SHORT = Wanted(tokens=4000, length=24)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in PROMPTS))
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_moe.save("olmoe", tmp_path / "tiny")


@pytest.fixture
def bench(tiny: Path, prompts: Path) -> Iterator[Bench]:
    with Bench(str(tiny), replace(SHORT, source=str(prompts)), "fp32") as made:
        yield made


def masked(capacity: str = "6/layer") -> Options:
    """SwapMoE, its sets swapped after every input, all layers at once."""
    return Options(policy="swapmoe", capacity=capacity, settings=("prefetch.layers=0",))


# ---- laws and oracles ----------------------------------------------------------------------------


def test_a_lossless_policy_is_the_full_model_bit_for_bit(bench: Bench) -> None:
    full = bench.perplexity("full", None)
    for policy, capacity in (("lru", "20%"), ("next-gate", "30%"), ("prune-magnitude", "100%")):
        row = bench.perplexity(policy, Options(policy=policy, capacity=capacity))
        assert row["loss_by_input"] == full["loss_by_input"]
        assert (row["kl_nats"], row["top1_agreement"], row["top5_agreement"]) == (0.0, 1.0, 1.0)
        assert row["gate_mass_kept"] == row["experts_agreement"] == 1.0


def test_perplexity_is_what_the_library_computes(bench: Bench) -> None:
    """The loss of a model that is not offloaded, on the same tokens."""
    plain = eager("olmoe")
    total = weight = 0.0
    with torch.no_grad():
        for one in bench.text.inputs:
            ids = one.arguments["input_ids"]
            total += float(plain(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            weight += ids.shape[1] - 1
    row = bench.perplexity("full", None)
    assert weight == bench.text.tokens
    assert row["loss_nats"] == pytest.approx(total / weight, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(total / weight), rel=1e-5)


def test_divergence_and_agreement_by_hand(bench: Bench) -> None:
    """From both models' logits, in float64."""
    row = bench.perplexity("swapmoe", masked("5/layer"))
    bench.handle.change(policy="swapmoe", capacity="5/layer", settings=("prefetch.layers=0",))
    plain, seen = eager("olmoe"), []
    with torch.no_grad():
        for one in bench.text.inputs:
            ours = bench.model(**one.arguments).logits[0, :-1].double().log_softmax(-1)
            full = plain(**one.arguments).logits[0, :-1].double().log_softmax(-1)
            seen.append(((full.exp() * (full - ours)).sum(-1), ours.argmax(-1) == full.argmax(-1)))
    bench.handle.finish()
    kl, first = (torch.cat(x).double().mean() for x in zip(*seen, strict=True))
    assert row["kl_nats"] == pytest.approx(float(kl), rel=1e-4)
    assert row["kl_nats"] > 0.01
    assert row["top1_agreement"] == float(first) < 1


def test_the_fewer_experts_the_worse(bench: Bench) -> None:
    rows = [bench.perplexity(c, masked(c)) for c in ("5/layer", "9/layer", "15/layer", "100%")]
    for key, sign in (("kl_nats", -1), ("gate_mass_kept", 1), ("experts_agreement", 1)):
        values = [sign * row[key] for row in rows]
        assert values == sorted(values) and len(set(values)) == 4
    assert rows[-1]["kl_nats"] == 0.0


def slow(seed: int) -> Any:
    """Slots into which copies take as long as chance has it."""
    draw = random.Random(seed)

    def opened(*args: Any) -> SlotBank:
        bank = SlotBank(*args)
        inner = bank.copy

        def copy(*where: int) -> None:
            time.sleep(draw.choice((0, 0, 0.002, 0.01)))
            inner(*where)

        bank.copy = copy  # type: ignore[method-assign]
        return bank

    return opened


@pytest.mark.parametrize(
    "options",
    [
        masked(),
        replace(masked("7/layer"), settings=()),
        Options(policy="next-gate", capacity="30%"),
    ],
    ids=["all layers", "a layer a pass", "prefetching"],
)
def test_a_steady_run_does_not_depend_on_time(bench: Bench, options: Options) -> None:
    found = []
    for opened in (SlotBank, slow(1), slow(2)):
        bench.handle.open_bank, bench.handle.slots = opened, None
        loss = bench.loss(options)
        found.append((loss.by_input.tolist(), loss.run["decision_digest"], loss.run["loads"]))
    assert found[0] == found[1] == found[2]
    assert found[0][2] > 0


def test_swaps_happen_from_input_to_input(bench: Bench) -> None:
    """The same first set for good, and one that follows, differ; both start alike."""
    moving = bench.loss(masked())
    still = bench.loss(replace(masked(), settings=("prefetch.period=0",)))
    assert moving.run["evictions"] > 0 and still.run["evictions"] == 0
    assert moving.by_input[0] == still.by_input[0]
    assert (moving.by_input[2:] != still.by_input[2:]).any()


def test_a_steady_run_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--out: a steady run has no order of reports to follow"):
        moesim.real.offload(tiny_moe.build("olmoe"), steady=True, out=tmp_path)


def test_judging_gives_the_rows_asked_for(tiny: Path, prompts: Path) -> None:
    done: list[tuple[int, int]] = []
    runs = (("a", masked()), ("b", Options(policy="lru", capacity="40%", paced=True)))
    text = replace(SHORT, source=str(prompts))
    asked = Judged(str(tiny), runs, text=text, dtype="fp32", latency_inputs=2, new_tokens=3)
    answer = judge(asked, lambda at, total: done.append((at, total)))
    assert [row["name"] for row in answer["rows"]] == ["full", "a", "b"]
    assert all(row["tpot_ns"] > 0 and row["peak_bytes"] > 0 for row in answer["rows"])
    inputs = answer["text"]["inputs"]
    assert done[-1] == (3 * inputs, 3 * inputs)
    assert list(answer["rows"][1]["by_topic"]) == ["code", "prose"] == answer["text"]["topics"]
    json.dumps(answer, allow_nan=False)


# ---- Rouge ---------------------------------------------------------------------------------------


def test_rouge_knows_words_of_any_language() -> None:
    pytest.importorskip("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    from moesim.real.quality_rouge import Rouge

    said = {
        "the cat sat on the mat": "a cat sat on a mat, the end",
        "программа читает файл и пишет": "программа читает файл, а не пишет",
        "列表中的条目": "列表的条目",
        "x = y_1 + 2": "x = y_1 - 2",
        "nothing": "",
    }
    rouge = Rouge()
    for meant, ours in said.items():
        assert rouge(meant, ours) == pytest.approx(demo_pairs.rouge2(ours, meant))
    assert rouge("программа читает файл", "программа читает файл") == 1.0
    plain = RougeScorer(["rouge2"])
    for meant, ours in list(said.items())[:1]:
        assert rouge(meant, ours) == pytest.approx(plain.score(meant, ours)["rouge2"].fmeasure)
    assert Words().tokenize("Ab_c 中文") == ["ab", "c", "中", "文"]


def test_summaries_of_the_switch_demo() -> None:
    """Lossless: the full model's words. With half of the experts: others."""
    pytest.importorskip("rouge_score")
    runs = (
        ("lru", Options(policy="lru", capacity="30%")),
        ("masked", Options(policy="prune-magnitude", capacity="4/layer")),
    )
    full, same, bent = judge(
        Judged("demo-switch", runs, task="rouge", text=Wanted(tokens=150), dtype="fp32")
    )["rows"]
    assert same["same_summaries"] == same["rouge2_to_full"] == 1.0
    assert same["rouge2"] == full["rouge2"] > 0.05
    assert bent["same_summaries"] < 1.0 and bent["experts_agreement"] < 1.0


# ---- the text ------------------------------------------------------------------------------------


def demo() -> Loaded:
    from moesim.traces.record_model import load

    return load("demo", device="cpu", dtype="fp32")


def test_halves_are_apart_and_make_the_whole() -> None:
    loaded = demo()
    parts = []
    for half in (0, 1, 2):
        text = read_text(Wanted(tokens=10**6, length=16, half=half), loaded)
        parts.append({one.arguments["input_ids"].numpy().tobytes() for one in text.inputs})
    assert not parts[1] & parts[2] and parts[1] | parts[2] == parts[0]


def test_topics_come_one_after_the_other_or_shuffled() -> None:
    loaded = demo()
    one = read_text(Wanted(tokens=1500, length=32), loaded)
    topics = [x.topic for x in one.inputs]
    assert topics == sorted(topics) and one.topics == sorted(set(topics))
    other = read_text(Wanted(tokens=1500, length=32, order="shuffled"), loaded)
    assert [x.topic for x in other.inputs] != topics and sorted(
        x.topic for x in other.inputs
    ) == topics
    assert one.digest != other.digest and one.tokens == other.tokens
    assert "no demo model saw it" in one.held
    assert abs(one.tokens - 1500) < 400


def test_labels_are_the_next_tokens() -> None:
    for one in read_text(Wanted(tokens=300), demo()).inputs:
        ids = one.arguments["input_ids"][0]
        assert one.labels[:-1].tolist() == ids[1:].tolist()
        assert int(one.targets.sum()) == len(ids) - 1


def test_only_the_corpus_of_a_model_says_what_was_held_out(tmp_path: Path) -> None:
    other = tmp_path / "tokens.safetensors"
    other.write_bytes(b"another corpus")
    with pytest.raises(UsageError, match="is not what demo was trained on, so nobody knows"):
        read_text(Wanted(source=str(other)), demo())
    with pytest.raises(UsageError, match="no such file; `python -m moesim"):
        read_text(Wanted(source=str(tmp_path / "gone.safetensors")), demo())


@pytest.mark.parametrize(
    ("more", "says"),
    [({"length": 4}, "--length 4: give at least 8"), ({"order": "any"}, "--order any: must be")],
)
def test_a_text_that_cannot_be_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Wanted(**more)


# ---- runs that are kept --------------------------------------------------------------------------


def planned(*counts: int) -> Planned:
    sizes = tuple(6144 * n for n in counts)
    text = ":".join(map(str, counts)) + "/layer"
    starts = tuple(16 * layer + e for layer, n in enumerate(counts) for e in range(n - 1))
    return Planned("swapmoe", ("prefetch.period=1",), Capacity(text, "layer", sizes, starts))


def test_runs_are_gone_on_with(bench: Bench, tmp_path: Path) -> None:
    file, told = tmp_path / "runs.jsonl", []
    runs = [planned(6, 6, 6, 6), planned(9, 5, 5, 5), planned(5, 5, 5, 12)]
    first = Losses(bench, file, lambda done, total: told.append((done, total)))
    values = first(runs[:2])
    assert first.measured == 2 and told == [(1, 2), (2, 2)]
    # A kill in the middle of a line.
    file.write_text(file.read_text() + '{"key":"half')
    again = Losses(bench, file, lambda done, total: None)
    assert again(runs).tolist()[:2] == values.tolist() and again.measured == 1
    assert len(file.read_text().splitlines()) == 4
    assert (
        again(runs[:1])[0]
        == -bench.loss(
            Options(policy="swapmoe", capacity=runs[0].capacity, settings=runs[0].settings)
        ).nats
    )


def test_a_file_of_other_runs_is_refused(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    Losses(bench, file, lambda done, total: None)
    header = json.loads(file.read_text())
    for other in ({"dtype": "bf16"}, {"device": "cuda"}):
        file.write_text(json.dumps({**header, **other}) + "\n")
        with pytest.raises(UsageError, match="of another model, text, dtype or device"):
            Losses(bench, file, lambda done, total: None)
    # Before files said so, there was no other.
    assert header.pop("device") == "cpu"
    file.write_text(json.dumps(header) + "\n")
    Losses(bench, file, lambda done, total: None)
    file.write_text("no JSON\n")
    with pytest.raises(UsageError, match="not lines of JSON; name another file"):
        Losses(bench, file, lambda done, total: None)


# ---- plans ---------------------------------------------------------------------------------------


class Plan:
    """What `moesim plan` decided for the tiny model."""

    def run(self, layers: int, experts: int, expert_bytes: Any) -> Planned:
        if (layers, experts) != (4, 16):
            raise UsageError(f"--plan: made for 4 layers of 16 experts, not {layers} of {experts}")
        assert list(expert_bytes) == [6144] * 4
        return planned(9, 5, 6, 7)


def test_an_offloaded_model_takes_a_plan() -> None:
    model = moesim.real.offload(tiny_moe.build("olmoe"), plan=Plan())
    ids = torch.tensor([[5, 9, 80, 33, 21]])
    with torch.no_grad():
        model(input_ids=ids)
    held = model.moesim.run.ledger.state.reshape(4, 16) == 3
    assert held.sum(axis=1).tolist() == [8, 4, 5, 6]
    run = model.moesim.finish()
    assert (run["policy"], run["capacity"], run["initial"]) == ("swapmoe", "9:5:6:7/layer", "file")
    assert run["initial_bytes"] == 0 or run["times_ns"]["initial"] == 0
    model.moesim.change(seed=1)
    assert model.moesim.asked.capacity.text == "9:5:6:7/layer"
    model.moesim.change(policy="lru", capacity="50%")
    assert model.moesim.asked.capacity.text == "50%" and model.moesim.asked.name == "lru"


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="made for 4 layers of 16 experts, not"):
        moesim.real.offload(tiny_moe.build("mixtral"), plan=Plan())


# ---- the commands --------------------------------------------------------------------------------

QUALITY = ("real", "quality", "--model", "demo", "--tokens", "200", "--threads", "1")


def test_the_command_prints_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--policy", "prune-magnitude,lru", "--capacity", "25%", "--scope", "layer"]
    assert main([*QUALITY, *words]) == 0
    out = capsys.readouterr().out
    assert "prune-magnitude 25%" in out and "lru 25%" in out and "perplexity" in out
    assert main([*QUALITY, *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["loss_nats"] == rows[2]["loss_nats"] < rows[1]["loss_nats"]
    assert rows[1]["peak_bytes"] == rows[2]["peak_bytes"] == rows[0]["peak_bytes"] // 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--policy", "nonesuch"), "--policy nonesuch: unknown"),
        (("--task", "rouge"), "olmoe is a decoder; use --task perplexity"),
        (("--rivals",), "--rivals: needs --plan"),
        (("--plan", "gone.toml"), "No such file"),
        (("--plan", "gone.toml", "--policy", "lru"), "--policy: the plan decides it"),
        (("--text", "gone.jsonl"), "no such file"),
        (("--length", "3"), "--length 3: give at least 8"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUALITY, *words]) == 2
    told = [at for at in capsys.readouterr().err.splitlines() if at.startswith("moesim: error: ")]
    assert len(told) == 1 and says in told[0]


PLAN = ("plan", "--trace", "demo", "--runs", "real", "--limit", "1", "--checks", "2")


@pytest.mark.slow
def test_a_plan_is_made_on_the_model_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fitted on measured losses, for two budgets, and measured once more on rivals."""
    out, runs, text = tmp_path / "plan.toml", tmp_path / "runs.jsonl", tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(one) + "\n" for one in PROMPTS[1:3]))
    model = ["--model", "demo", "--dtype", "fp32", "--text", str(text), "--threads", "1"]
    more = ["--budget", "25%,50%", "--configs", "10", "--period", "1", "--runs-file", str(runs)]
    assert main([*PLAN, *model, *more, "--out", str(out), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["plans"]
    lines = [json.loads(line) for line in runs.read_text().splitlines()[1:]]
    measured = {line["capacity"]: line["loss_nats"] for line in lines}
    for answer, share in zip(answers, ("25pct", "50pct"), strict=True):
        plan = load_plan(tmp_path / f"plan-{share}.toml")
        assert answer["file"] == str(tmp_path / f"plan-{share}.toml")
        assert answer["fit"]["runs"] == "real" and plan.facts["quality"]["kind"] == "loss"
        for one in plan.alternatives:
            assert one.replayed is not None
            room = ":".join(str(min(32, n + 1)) for n in one.slots) + "/layer"
            assert one.replayed.quality == -measured[room]
            assert one.replayed.memory_bytes <= plan.budget_bytes
    file = tmp_path / "plan-25pct.toml"
    against = ["--plan", str(file), "--rivals", "--calibration", str(trace_path("demo"))]
    assert main(["real", "quality", *model, *against, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    names = [row["name"] for row in rows]
    assert names[:2] == ["full", "genetic (the plan)"] and names[-1] == "on demand"
    assert {"prune-importance", "prune-magnitude", "prune-random"} <= set(names)
    plan = load_plan(file)
    assert max(row["peak_bytes"] for row in rows[1:]) <= plan.budget_bytes - plan.fixed_bytes
    assert rows[-1]["kl_nats"] == 0.0 < rows[1]["kl_nats"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--budget", "50%"), "--runs real: name the model that is run with --model"),
        (("--budget", "50%,15MB", "--model", "demo"), "write sizes, or shares of at most 100%"),
        (("--budget", "50%", "--model", "demo", "--quality", "mass"), "--runs real measures loss"),
        (("--budget", "50%", "--model", "demo-mixtral"), "has 8 layers of 8 experts"),
        (("--budget", "50%", "--model", "demo", "--dtype", "bf16"), "or the --dtype that it was"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PLAN, *words]) == 2
    told = [at for at in capsys.readouterr().err.splitlines() if at.startswith("moesim: error: ")]
    assert len(told) == 1 and says in told[0]


def test_runs_are_kept_of_real_ones_only(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--trace", "demo", "--budget", "50%", "--runs-file", "x.jsonl"]
    assert main(words) == 2
    assert "only --runs real keeps its runs" in capsys.readouterr().err


def test_a_generation_takes_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ["plan", "--trace", "demo", "--policy", "lru", "--quality", "hits", "--limit", "2"]
    out = tmp_path / "p.toml"
    assert main([*made, "--budget", "15MB", "--configs", "10", "--out", str(out)]) == 0
    capsys.readouterr()
    words = ["real", "generate", "--model", "demo", "--dtype", "fp32", "--prompts", "import os"]
    more = ["--max-new-tokens", "3", "--threads", "1", "--json"]
    assert main([*words, *more, "--plan", str(out)]) == 0
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert run["capacity"] == ":".join(map(str, load_plan(out).slots)) + "/layer"
    assert main([*words, *more]) == 0
    plain = json.loads(capsys.readouterr().out)["runs"][0]
    assert plain["policy"] == "lru" and plain["capacity"] == "25%"
    assert main([*words, *more, "--plan", str(out), "--capacity", "10%"]) == 2
    assert "--capacity: the plan decides it" in capsys.readouterr().err


def test_means_by_topic_weigh_tokens(bench: Bench) -> None:
    row = bench.perplexity("full", None)
    tokens = np.array([int(one.targets.sum()) for one in bench.text.inputs])
    topics = np.array([one.topic for one in bench.text.inputs])
    mean = sum(row["by_topic"][t] * tokens[topics == t].sum() for t in row["by_topic"])
    assert mean / tokens.sum() == pytest.approx(row["loss_nats"])
