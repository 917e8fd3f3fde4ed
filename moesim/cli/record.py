"""``moesim record``: a trace from a HuggingFace Mixture-of-Experts model."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.progress import EVERY_S
from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.traces.record import Recording
    from moesim.traces.schema import TraceMeta

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLE = """examples:
  moesim record --model demo
  moesim record --model allenai/OLMoE-1B-7B-0924 --prompts openai/gsm8k@main:test \\
    --limit 500 --split 7:3 --norms --embeddings iteration --out olmoe.parquet
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``record`` command."""
    parser = subparsers.add_parser(
        "record",
        help="record a trace from a HuggingFace MoE model",
        description="Run prompts through a Mixture-of-Experts model of transformers and record what"
        " its gates chose, token by token and layer by layer.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, metavar="ID|PATH", help="hub id, folder, or a shipped model: demo"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="trace to write (MODEL.parquet)")
    _add_prompts(parser)
    _add_columns(parser)
    _add_generation(parser)
    _add_machine(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts",
        default="builtin",
        metavar="SOURCE",
        help="builtin (default), a .parquet, .jsonl, .json or .txt file, or a HuggingFace dataset"
        " as NAME[@CONFIG][:SPLIT]",
    )
    group.add_argument("--column", metavar="NAME", help="column of the prompt; else it is found")
    group.add_argument("--topic-column", metavar="NAME", help="column of the topic")
    group.add_argument("--limit", type=int, metavar="N", help="at most N prompts")
    group.add_argument("--split", metavar="A:B", help="mark requests as train and test, as 7:3")
    group.add_argument("--keep-text", action="store_true", help="keep the prompts in the trace")


def _add_columns(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to record")
    group.add_argument(
        "--gate",
        choices=("full", "topk"),
        default="full",
        help="full: the logits over all experts (default); topk: chosen experts and weights only",
    )
    group.add_argument(
        "--ahead",
        default="1,2,3",
        metavar="D,D",
        help="predict the experts of so many layers on, from this layer's input (1,2,3); none",
    )
    group.add_argument("--norms", action="store_true", help="norm of each MoE layer's input")
    group.add_argument(
        "--embeddings",
        choices=("prompt", "iteration", "none"),
        default="none",
        help="the model's input embedding of the prompt, or of each iteration (none)",
    )


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(64)")
    group.add_argument("--sample", action="store_true", help="sample; without it, greedy")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(1)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(1)")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="(0)")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--tokenizer", metavar="ID|PATH", help="if the model has none of its own")
    group.add_argument("--batch-size", type=int, default=8, metavar="B", help="(8)")
    group.add_argument("--device", choices=("cuda", "cpu", "auto"), default="auto", help="(auto)")
    group.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"),
        default="auto",
        metavar="T",
        help="fp32, bf16, fp16, or auto (default): as the checkpoint",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with a recording that was stopped"
    )


def run(args: argparse.Namespace) -> int:
    """Record. Raises `UsageError`, `TraceError`."""
    try:
        from moesim.traces.record import record
    except ModuleNotFoundError as error:
        raise UsageError(
            f"recording needs {error.name}, which is not installed; `pip install '.[record]'` in "
            "the checkout installs what it needs"
        ) from None
    options = _options(args)
    _quiet()
    try:
        with _watching() as watch:
            meta = record(options, watch=watch)
    except KeyboardInterrupt:
        parts = options.out.with_suffix(".parts")
        if parts.exists():
            print(f"{parts}: finished requests are kept; go on with --resume", file=sys.stderr)
        raise
    _report(args, options.out, meta)
    return 0


def _options(args: argparse.Namespace) -> Recording:
    from moesim.traces.batches import Generation
    from moesim.traces.record import Recording

    name = args.model.rstrip("/").rpartition("/")[2] or "trace"
    return Recording(
        model=args.model,
        out=args.out if args.out is not None else Path(f"{name}.parquet"),
        prompts=args.prompts,
        gate=args.gate,
        ahead=_distances(args.ahead),
        norms=args.norms,
        embeddings=args.embeddings,
        generation=Generation(
            max_new_tokens=args.max_new_tokens,
            sample=args.sample,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        ),
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        limit=args.limit,
        resume=args.resume,
        split=_split(args.split),
        keep_text=args.keep_text,
        tokenizer=args.tokenizer,
        column=args.column,
        topic_column=args.topic_column,
    )


def _distances(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise UsageError(f"--ahead {text}: must be distances such as 1,2, or none") from None


def _split(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        train, test = map(int, text.split(":"))
    except ValueError:
        raise UsageError(f"--split {text}: must be two numbers, such as 7:3") from None
    return train, test


def _report(args: argparse.Namespace, out: Path, meta: TraceMeta) -> None:
    if args.json:
        names = ("requests", "tokens", "rows", "digest", "score", "dtype", "device")
        plain: dict[str, Any] = {name: getattr(meta, name) for name in names}
        model = {k: getattr(meta.model, k) for k in ("name", "layers", "experts", "top_k")}
        told = {"schema": 1, "path": str(out), "model": model, "phases": list(meta.phases)}
        print(json.dumps({**told, **plain}))
        return
    print(
        f"{out}: {meta.requests:,} requests, {meta.tokens:,} tokens, {meta.rows:,} rows of "
        f"{meta.model.name} (top {meta.top_k} of {meta.experts} in {meta.layers} layers), digest "
        f"{meta.digest[:12]}"
    )


def _quiet() -> None:
    """Keep the libraries' own bars and advice from the terminal; what matters is told by us."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("huggingface_hub", "datasets", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---- progress ------------------------------------------------------------------------------------


class _Rate:
    """Tokens a second and time left.

    The clock starts with the first forward pass. Requests that were there before, as after
    --resume, take no time and do not count.
    """

    def __init__(self) -> None:
        self.done = self.count = 0
        self.total: int | None = None
        self._before = 0
        self._begun: float | None = None

    def requests(self, done: int, total: int | None) -> None:
        """Take how many requests are finished."""
        if self._begun is None:
            self._before = done
        self.done, self.total = done, total

    def tokens(self, count: int) -> None:
        """Take how many tokens went through the model."""
        if self._begun is None:
            self._begun = time.monotonic()
        else:
            self.count += count

    def in_words(self) -> str:
        """Return one line."""
        of = "" if self.total is None else f"/{self.total}"
        words = f"{self.done}{of} requests"
        if self._begun is None or not self.count:
            return words
        elapsed = time.monotonic() - self._begun
        words += f", {self.count / elapsed:,.0f} tokens/s"
        if self.total is not None and self.done > self._before:
            left = elapsed * (self.total - self.done) / (self.done - self._before)
            words += f", {left:,.0f} s left"
        return words


class _Lines(_Rate):
    """A line on stderr now and then."""

    every_s = EVERY_S

    def __init__(self) -> None:
        super().__init__()
        self._told = time.monotonic()

    def tokens(self, count: int) -> None:
        """Take how many tokens went through the model."""
        super().tokens(count)
        if self._is_time():
            self.show(f"recording: {self.in_words()}")

    def merged(self, done: int, total: int) -> None:
        """Take how many finished requests are in the trace."""
        if self._is_time():
            self.show(f"writing: {done}/{total} requests")

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now - self._told < self.every_s:
            return False
        self._told = now
        return True

    def show(self, line: str) -> None:
        """Show how far it is."""
        self.say(line)

    def say(self, line: str) -> None:
        """Print a line."""
        print(f"moesim: {line}", file=sys.stderr, flush=True)


class _Bar(_Lines):
    """A line on a terminal that changes in place."""

    every_s = 0.2

    def __init__(self, status: Any) -> None:
        super().__init__()
        self._status = status

    def show(self, line: str) -> None:
        """Change the line."""
        self._status.update(line)

    def say(self, line: str) -> None:
        """Print a line above."""
        self._status.console.print(f"moesim: {line}", highlight=False, markup=False)


@contextmanager
def _watching() -> Iterator[_Lines]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console

    with Console(stderr=True).status("recording") as status:
        yield _Bar(status)
