"""``moesim real quality``: what a policy costs in quality."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.ask.arguments import (
    add_compute,
    add_one_policy,
    add_seed,
    one_device,
    path,
    positive,
    words,
)
from moesim.errors import NotRunError, UsageError

if TYPE_CHECKING:
    from moesim.real.offload_options import Options
    from moesim.real.quality import Judged
    from moesim.real.quality_text import Wanted

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim real quality --model demo --policy swapmoe,prune-importance --capacity 25%,50% \\
    --scope layer --calibration traces/samples/demo.parquet
  moesim real quality --model demo --plan plan.toml --rivals --calibration x.parquet
  moesim real quality --model demo-switch --task rouge --policy swapmoe --capacity 50%
"""


def add_parser(commands: Subparsers) -> None:
    """Add the ``quality`` command to those of ``real``."""
    parser = commands.add_parser(
        "quality",
        help="measure perplexity or Rouge-2 under a policy, beside the full model",
        description="Run a model with its experts offloaded over held-out text, one input after "
        "the other, and compare it with the same model with nothing bent: perplexity, divergence, "
        "agreement, gate mass kept; or Rouge-2 of summaries. What a policy swaps between inputs is "
        "swapped. Needs torch and transformers (`pip install 'moesim[real]'`; for Rouge-2 "
        "'moesim[quality]').",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, metavar="ID|PATH", help="hub id, folder, or a shipped model: demo"
    )
    parser.add_argument(
        "--task", choices=("perplexity", "rouge"), default="perplexity", help="[perplexity]"
    )
    _add_policy(parser)
    add_text(parser)
    _add_machine(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def _add_policy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("policy")
    group.add_argument(
        "--policy", metavar="NAME", help="policies, comma-separated [swapmoe, or as the plan says]"
    )
    add_one_policy(group)
    group.set_defaults(capacity=None)
    group.add_argument(
        "--plan", type=path, metavar="FILE", help="policy and capacity as `moesim plan` wrote them"
    )
    group.add_argument(
        "--rivals",
        action="store_true",
        help="with --plan and --calibration: also its alternatives, fixed sets and loads on "
        "demand, in the same memory",
    )
    group.add_argument(
        "--calibration", type=path, metavar="TRACE", help="trace that policies learn from"
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    """The text that quality is measured on."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text",
        default="builtin",
        metavar="FILE",
        help="a file of prompts, builtin, or tokens.safetensors (for a summarising model "
        "pairs.safetensors) of `python -m moesim.traces.demo prepare`, of which the held-out part "
        "is read [builtin]",
    )
    group.add_argument(
        "--tokens", type=positive, default=6144, metavar="N", help="about so many in all [6144]"
    )
    group.add_argument(
        "--length", type=positive, default=64, metavar="N", help="most tokens of an input [64]"
    )
    group.add_argument(
        "--half",
        type=int,
        choices=(1, 2),
        help="every other input: 1 to plan on, 2 to measure on [all]",
    )
    group.add_argument(
        "--order", choices=("topics", "shuffled"), default="topics", help="of inputs [topics]"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"),
        default="auto",
        metavar="T",
        help="of the weights: fp32, bf16, fp16, or as the checkpoint [auto]",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    add_compute(group)
    add_seed(group)
    group.add_argument(
        "--free-clock",
        action="store_true",
        help="loads land when they land, instead of at the end of the pass: a little better, and "
        "different each time",
    )
    group.add_argument(
        "--latency-inputs",
        type=positive,
        metavar="N",
        help="also continue N inputs in real time and report what a token takes",
    )
    group.add_argument(
        "--new-tokens", type=positive, default=32, metavar="N", help="of each of those [32]"
    )
    group.add_argument(
        "--bandwidth", metavar="RATE", help="of the link that those copies are paced by, e.g. 4GB/s"
    )
    group.add_argument(
        "--hardware", default="rtx4090", metavar="NAME|FILE", help="that link's profile [rtx4090]"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from moesim.cli.progress import requests_progress

    ready(args.threads)
    from moesim.real.quality import judge

    asked = _asked(args)
    with requests_progress("quality", "inputs") as progress:
        answer = judge(asked, progress)
    if args.json:
        print(json.dumps(answer))
        return 0
    _print(answer)
    return 0


def ready(threads: int | None) -> None:
    """Ready this process to run models. Raises NotRunError without torch or transformers."""
    try:
        from moesim.real.offload_generate import prepare
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("moesim"):
            raise
        raise NotRunError(
            f"not run: measuring quality needs {error.name}, which is not installed; "
            "`pip install 'moesim[real]'` installs it"
        ) from None
    prepare(threads)


def wanted(args: argparse.Namespace) -> Wanted:
    """The text."""
    from moesim.real.quality_text import Wanted

    return Wanted(
        source=args.text,
        tokens=args.tokens,
        length=args.length,
        half=args.half or 0,
        order=args.order,
        seed=args.seed,
    )


def _asked(args: argparse.Namespace) -> Judged:
    from moesim.real.quality import Judged

    if args.plan is not None and (args.policy or args.capacity):
        given = "policy" if args.policy else "capacity"
        raise UsageError(f"--{given}: the plan decides it; leave out --{given} or --plan")
    if args.rivals and (args.plan is None or args.calibration is None):
        raise UsageError(
            "--rivals: needs --plan, whose rivals they are, and --calibration, the trace that it "
            "was made on"
        )
    return Judged(
        model=args.model,
        runs=tuple(_planned(args) if args.plan else _named(args)),
        task=args.task,
        text=wanted(args),
        dtype=args.dtype,
        device=args.device,
        steady=not args.free_clock,
        latency_inputs=args.latency_inputs or 0,
        new_tokens=args.new_tokens,
    )


def _options(args: argparse.Namespace, **more: Any) -> Options:
    from moesim.real.offload_options import Options

    given: dict[str, Any] = {
        "settings": tuple(args.set),
        "scope": args.scope,
        "calibration": args.calibration,
        "hardware": one_device(args),
        "paced": args.bandwidth is not None,
        "seed": args.seed,
    }
    return Options(**{**given, **more})


def _named(args: argparse.Namespace) -> list[tuple[str, Options]]:
    policies = words([args.policy] if args.policy else None, "swapmoe")
    capacities = words([args.capacity] if args.capacity else None, "25%")
    return [
        (f"{policy} {capacity}", _options(args, policy=policy, capacity=capacity))
        for capacity in capacities
        for policy in policies
    ]


def _planned(args: argparse.Namespace) -> list[tuple[str, Options]]:
    from moesim.planning.file import load_plan

    plan = load_plan(args.plan)
    if not args.rivals:
        return [(plan.method, _options(args, plan=plan))]
    from moesim.planning.contest import contestants
    from moesim.planning.survey import survey

    return [
        (
            one.name,
            _options(
                args,
                policy=one.run.policy,
                capacity=one.run.capacity,
                settings=one.run.settings,
            ),
        )
        for one in contestants(plan, _uses(args.calibration, survey))
    ]


def _uses(trace: Path, survey: Any) -> Any:
    return survey(trace).uses


# ---- results -------------------------------------------------------------------------------------


def _print(answer: dict[str, Any]) -> None:
    from moesim.cli.table import console, print_table

    text, rows = answer["text"], answer["rows"]
    head, cells = _columns(answer["task"])
    timed = any("tpot_ns" in row for row in rows)
    more = ("TPOT ms", "stall") if timed else ()
    print_table(
        ("run", *head, "mass kept", "experts", "held MB", "loaded MB", *more),
        [
            (row["name"], *cells(row), *_shared(row), *(_times(row) if timed else ()))
            for row in rows
        ],
    )
    out = console()
    out.print(
        f"{answer['model']} ({answer['dtype']}) on {text['inputs']} inputs, {text['tokens']} "
        f"tokens of {text['source']}, {len(text['topics'])} topics, order {answer['order']}; "
        f"held out: {text['held_out'] or 'unknown'}"
    )
    if not answer["steady"]:
        out.print("loads landed when they landed: another time the numbers differ a little")


def _columns(task: str) -> tuple[tuple[str, ...], Any]:
    if task == "rouge":
        return ("Rouge-2", "to the full model's", "same"), lambda row: (
            f"{row['rouge2']:.4f}",
            f"{row['rouge2_to_full']:.4f}",
            f"{row['same_summaries']:.1%}",
        )
    return ("perplexity", "KL nats", "top 1", "top 5"), lambda row: (
        f"{math.exp(row['loss_nats']):.2f}",
        f"{row['kl_nats']:.4f}",
        f"{row['top1_agreement']:.1%}",
        f"{row['top5_agreement']:.1%}",
    )


def _shared(row: dict[str, Any]) -> tuple[str, ...]:
    mass, experts = row["gate_mass_kept"], row["experts_agreement"]
    return (
        "-" if mass is None else f"{mass:.1%}",
        "-" if experts is None else f"{experts:.1%}",
        f"{row['peak_bytes'] / 1e6:.2f}",
        f"{row['bytes_loaded'] / 1e6:.1f}",
    )


def _times(row: dict[str, Any]) -> tuple[str, str]:
    tpot = row["tpot_ns"]
    return ("-" if tpot is None else f"{tpot / 1e6:.2f}", f"{row['stall_share']:.1%}")
