"""Evaluate a demo model: the numbers as JSON and the model card, both in the model's folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np

from moesim.errors import UsageError
from moesim.traces import demo_pairs, demo_tokens
from moesim.traces.demo_measure import LENGTH, ROWS, Layer, Measured, measure
from moesim.traces.demo_models import check_losses
from moesim.traces.demo_overview import REPORT
from moesim.traces.demo_overview import markdown as _markdown
from moesim.traces.demo_shapes import SHAPES, Shape, build
from moesim.traces.demo_tokens import write_json

LEAST_TOPIC_GAIN: Final = 1.5
LEAST_BETWEEN_TO_WITHIN: Final = 10.0
MOST_LOAD: Final = 6.0
PAIRS: Final = ROWS * LENGTH // demo_pairs.TEXT_TOKENS
"""Of each topic at most: as many tokens as there are of running text."""
LEAST_ROUGE_GAIN: Final = 0.05
ROUGE_PAIRS: Final = 24
"""Summaries written for each topic."""


def load_model(folder: Path, shape: Shape) -> Any:
    """The model in float32. Raises `UsageError` if the folder holds none."""
    import torch
    import transformers

    if not (folder / "model.safetensors").exists():
        raise UsageError(
            f"{folder}: no weights there; run `python -m moesim.traces.demo train {shape.name}`"
        )
    kind = "AutoModelForSeq2SeqLM" if shape.pairs else "AutoModelForCausalLM"
    model: Any = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    return model


def held_batches(work: Path, shape: Shape) -> dict[str, dict[str, Any]]:
    """Each topic's held-out batch, as the model's arguments."""
    import torch

    if shape.pairs:
        held = demo_pairs.load(work / "pairs.safetensors").held
        return {topic: demo_pairs.arguments(_some(some, PAIRS)) for topic, some in held.items()}
    out = {}
    for topic, ids in demo_tokens.load(work / "tokens.safetensors").held.items():
        windows = torch.from_numpy(demo_tokens.held_windows(ids, ROWS, LENGTH))
        out[topic] = {"input_ids": windows, "labels": windows}
    return out


def _held_out(shape: Shape) -> dict[str, int]:
    if shape.pairs:
        return {"pairs_a_topic_at_most": PAIRS, "tokens_a_text": demo_pairs.TEXT_TOKENS}
    return {"windows_a_topic": ROWS, "tokens_a_window": LENGTH}


def _some(pairs: demo_pairs.Pairs, rows: int) -> demo_pairs.Pairs:
    order = np.random.default_rng(0).permutation(len(pairs.texts))[:rows]
    return demo_pairs.Pairs(pairs.texts[order], pairs.summaries[order])


def evaluate(shape: Shape, work: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Measure the model in `folder`, its untrained self and the dense yardstick; write both files.

    Raises
    ------
    UsageError
        If weights or tokens are missing.
    """
    from transformers import AutoTokenizer

    held = held_batches(work, shape)
    model = load_model(folder, shape)
    trained, untrained = measure(model, shape, held), measure(build(shape, seed), shape, held)
    report: dict[str, Any] = {
        "name": shape.name,
        "shape": asdict(shape),
        **_sizes(model, shape),
        "training": json.loads((work / "runs" / shape.name / "summary.json").read_text("utf-8")),
        "held_out": _held_out(shape),
        "loss": _rounded(trained.loss),
        "mean_loss": round(fmean(trained.loss.values()), 4),
        "perplexity": {k: round(math.exp(v), 2) for k, v in trained.loss.items()},
        "dense_loss": _dense_loss(shape, work, held),
        "routing": {"trained": _routing(trained), "untrained": _routing(untrained)},
        "layers": [_rounded(asdict(layer)) for layer in trained.layers],
    }
    report["check_loss"] = _rounded(check_losses(model, AutoTokenizer.from_pretrained(folder)))
    if shape.pairs:
        report["rouge2"] = _rouge(model, build(shape, seed), work)
    report["laws"] = laws(report)
    write_json(folder / REPORT, report)
    (folder / "README.md").write_text(_card(report, work), encoding="utf-8")
    return report


def _rounded(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}


def _sizes(model: Any, shape: Shape) -> dict[str, int]:
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts * (shape.experts - shape.top_k) // shape.experts
    return {"parameters": total, "active_parameters": total - idle, "expert_parameters": experts}


def _routing(measured: Measured) -> dict[str, float]:
    names = [name for name in Layer.__slots__ if name not in ("stack", "dead_experts")]
    out = {name: round(measured.mean(name), 4) for name in names}
    out["worst_load"] = round(max(layer.largest_load for layer in measured.layers), 3)
    out["dead_experts"] = sum(layer.dead_experts for layer in measured.layers)
    return out


def _dense_loss(shape: Shape, work: Path, held: Mapping[str, Any]) -> dict[str, float] | None:
    dense = SHAPES["demo-dense"]
    folder = work / "runs" / dense.name / "model"
    if shape.name != "demo" or not (folder / "model.safetensors").exists():
        return None
    return _rounded(measure(load_model(folder, dense), dense, held).loss)


def laws(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each law of learned routing: what was found, the bound, and whether it holds."""
    trained, untrained = report["routing"]["trained"], report["routing"]["untrained"]
    gain = trained["topic_bits"] / untrained["topic_bits"]
    contrast = trained["between_topics_bits"] / trained["within_topic_bits"]
    out = {
        "topic information, times untrained": _at_least(gain, LEAST_TOPIC_GAIN),
        "divergence between topics, times within one": _at_least(contrast, LEAST_BETWEEN_TO_WITHIN),
        "gate entropy, of untrained": _at_most(
            trained["gate_entropy"] / untrained["gate_entropy"], 1.0
        ),
        "largest load, times mean": _at_most(trained["worst_load"], MOST_LOAD),
        "dead experts": _at_most(trained["dead_experts"], 0),
    }
    if "rouge2" in report:
        gains = [scores["model"] - scores["untrained"] for scores in report["rouge2"].values()]
        out["Rouge-2 above the untrained model's"] = _at_least(fmean(gains), LEAST_ROUGE_GAIN)
    if report["dense_loss"]:
        above = report["mean_loss"] - fmean(report["dense_loss"].values())
        out["loss above the dense model's"] = _at_most(above, 0.0)
    return out


def _at_least(found: float, bound: float) -> dict[str, Any]:
    return {"found": round(found, 3), "at_least": bound, "holds": found >= bound}


def _at_most(found: float, bound: float) -> dict[str, Any]:
    return {"found": round(found, 3), "at_most": bound, "holds": found <= bound}


def _rouge(model: Any, untrained: Any, work: Path) -> dict[str, dict[str, float]]:
    """Rouge-2 by topic of greedy summaries: the model's, the untrained one's, a line of the text
    drawn at random (its expectation), and the text's first line."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    out = {}
    for topic, pairs in demo_pairs.load(work / "pairs.safetensors").held.items():
        some = _some(pairs, ROUGE_PAIRS)
        meant = tokenizer.batch_decode(some.summaries, skip_special_tokens=True)
        texts = tokenizer.batch_decode(some.texts, skip_special_tokens=True)
        lines = [text.strip().split("\n") for text in texts]
        out[topic] = {
            "model": _scored(summarise(model, tokenizer, some), meant),
            "untrained": _scored(summarise(untrained, tokenizer, some), meant),
            "any_line": round(fmean(map(_any_line, lines, meant)), 4),
            "first_line": _scored([one[0] for one in lines], meant),
        }
    return out


def _scored(said: list[str], meant: list[str]) -> float:
    return round(fmean(map(demo_pairs.rouge2, said, meant)), 4)


def _any_line(lines: list[str], meant: str) -> float:
    return fmean(demo_pairs.rouge2(line, meant) for line in lines)


def summarise(model: Any, tokenizer: Any, pairs: demo_pairs.Pairs) -> list[str]:
    """The model's greedy summaries of the pairs' texts."""
    batch = demo_pairs.arguments(pairs)
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=demo_pairs.SUMMARY_TOKENS,
        do_sample=False,
    )
    said: list[str] = tokenizer.batch_decode(out, skip_special_tokens=True)
    return said


# ---- the model card ----------------------------------------------------------------------------

_FAMILY: Final = {
    "olmoe": "`OlmoeForCausalLM`",
    "mixtral": "`MixtralForCausalLM`",
    "qwen2_moe": "`Qwen2MoeForCausalLM`",
    "switch": "`SwitchTransformersForConditionalGeneration`",
}

_REAL: Final = """\
For comparison, public traces of models in production: consecutive tokens share 44 % of their
experts in gpt-oss-20b (chance 12.5 %) and 26 to 29 % in DeepSeek-V2-Lite (chance 9.4 %); the
largest load is 2.5 and 3.5 to 5.6 times the mean; the divergence between domains of
DeepSeek-V2-Lite is 0.10 to 0.20 bit, within one 0.001 to 0.006.
"""


def _card(report: Mapping[str, Any], work: Path) -> str:
    text = json.loads((work / "text.json").read_text(encoding="utf-8"))
    parts = [
        _about(report),
        _data(report, text),
        _losses(report),
        _table(report),
        _REAL,
        _laws_table(report),
        _packages(text),
    ]
    return "\n".join(parts)


def _about(report: Mapping[str, Any]) -> str:
    shape, training = report["shape"], report["training"]
    shared = f" and a shared expert of {shape['shared_d_ff']}" if shape["shared_d_ff"] else ""
    return f"""\
# {report["name"]}

A small mixture of experts, really trained, to record gate traces from without a model hub. It is
no useful language model: absolute hit rates measured on it do not carry over to large models.

- class {_FAMILY[shape["family"]]}: {shape["experts"]} experts of width {shape["d_ff"]}, top-\
{shape["top_k"]}{shared}, model width {shape["d_model"]}, {len(report["layers"])} MoE layers
- {report["parameters"]:,} parameters, {report["active_parameters"]:,} active for a token; bfloat16
- {training["tokens"]:,} tokens in {training["steps"]:,} steps of {training["step_tokens"]:,}, \
{training["seconds"] / 60:.0f} minutes on a shared {training["device"].upper()}
- seed {training["seed"]}, AdamW, peak rate {training["plan"]["rate"]:g}, load balance \
{training["plan"]["balance"]:g} (layer by layer), router z-loss {training["plan"]["z_loss"]:g}
- licence of the weights: Apache-2.0, as moesim; the text is listed below and is not shipped
- made by `python -m moesim.traces.demo train {report["name"]}` and measured by `… evaluate \
{report["name"]}`; all numbers are in `{REPORT}`
"""


def _data(report: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    size = sum(topic["bytes"] for topic in text["topics"].values())
    names = ", ".join(text["topics"])
    if report["shape"]["family"] == "switch":
        return (
            f"## Data\n\nPairs of a text and its summary, of topics {names}, cut from the packages"
            " below.\nA text is a run of sentences, or of lines of code; its summary is the one"
            " that shares most with\nthe others, so the model learns to choose and to copy. In half"
            " of the training it is cut out of the text,\nso it learns to write as well. 5 % of the"
            " documents are held out by their hash.\n"
        )
    return (
        f"## Data\n\n{size / 1e6:.0f} MB of text of {len(text['topics'])} topics, each drawn as"
        f" often as any other: {names}.\n5 % of the documents are held out by their hash.\n"
    )


def _losses(report: Mapping[str, Any]) -> str:
    columns = _columns(report)
    rows = [[t, *(f"{values[t]:.3f}" for values in columns.values())] for t in report["loss"]]
    mean = ["mean", *(f"{fmean(values.values()):.3f}" for values in columns.values())]
    text = "## Held-out text\n\n" + _markdown(["topic", *columns], [*rows, mean])
    if report["dense_loss"]:
        text += (
            "\nThe dense model has one expert as wide as a token's four; it saw the same tokens.\n"
        )
    return text


def _columns(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    out = {"loss, nats a token": report["loss"], "perplexity": report["perplexity"]}
    if report["dense_loss"]:
        out["loss of the dense model"] = report["dense_loss"]
    rouge = report.get("rouge2", {})
    heads = {
        "model": "Rouge-2",
        "untrained": "untrained",
        "any_line": "a line drawn at random",
        "first_line": "the first line",
    }
    for key, head in heads.items() if rouge else ():
        out[head] = {topic: scores[key] for topic, scores in rouge.items()}
    return out


_ROWS: Final = (
    ("gate_entropy", "gate entropy, share of ln(experts)"),
    ("topic_bits", "mutual information of expert and topic, bits"),
    ("overlap", "overlap of consecutive tokens' experts"),
    ("between_topics_bits", "divergence of loads between topics, bits"),
    ("within_topic_bits", "the same between halves of one topic's documents"),
    ("largest_load", "largest load, times mean (mean over layers)"),
    ("worst_load", "largest load, times mean (worst layer)"),
    ("dead_experts", "experts never chosen"),
)


def _table(report: Mapping[str, Any]) -> str:
    shape, routing = report["shape"], report["routing"]
    rows = [
        [label, *(f"{routing[which][key]:g}" for which in ("trained", "untrained"))]
        for key, label in _ROWS
    ]
    chance = shape["top_k"] / shape["experts"]
    return (
        "## Routing on held-out text, means over layers\n\n"
        + _markdown(["", "trained", "untrained"], rows)
        + f"\nBy chance, consecutive tokens would share {chance:.3f} of their experts.\n"
    )


def _laws_table(report: Mapping[str, Any]) -> str:
    rows = []
    for name, law in report["laws"].items():
        bound = f"≥ {law['at_least']:g}" if "at_least" in law else f"≤ {law['at_most']:g}"
        rows.append([name, f"{law['found']:g}", bound, "yes" if law["holds"] else "**no**"])
    text = "## Laws\n\n" + _markdown(["", "found", "bound", "holds"], rows)
    if report["shape"]["family"] == "switch":
        text += (
            "\nAs the class draws them, untrained Switch routers are sure of one expert for every"
            " token; these began\n"
            "with routers of a fiftieth of that size, and the untrained model is that one.\n"
        )
    return text


def _packages(text: Mapping[str, Any]) -> str:
    rows = [[f"`{p['file']}`", p["licence"], f"`{p['sha256'][:16]}`"] for p in text["packages"]]
    return "## Packages read\n\n" + _markdown(["package", "licence of its text", "SHA-256"], rows)
