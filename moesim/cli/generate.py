"""``moesim real generate``: text from a model whose experts are offloaded."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from moesim.ask.arguments import (
    add_compute,
    add_one_policy,
    add_past,
    add_seed,
    initial,
    one_device,
    path,
    positive,
    refuse_beside_plan,
    words,
)
from moesim.errors import NotRunError, UsageError

if TYPE_CHECKING:
    from moesim.real.offload_generate import Prompted

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim real generate --model demo --policy next-gate --capacity 10% --prompts "def main():"
  moesim real generate --model demo --plan plan.toml --limit 8
  moesim real generate --model demo --policy finemoe --capacity 10% --limit 64 --check
  moesim real generate --model demo --prompts builtin --limit 8 --batch 4 \\
    --trace-out run.parquet --out runs/
"""


def add_parser(commands: Subparsers) -> None:
    """Add the ``generate`` command to those of ``real``."""
    parser = commands.add_parser(
        "generate",
        help="generate text with a HuggingFace model, its experts offloaded",
        description="Load a Mixture-of-Experts model of transformers with its experts in host "
        "memory, generate, and print the text and what it took. The model's own gates route; with "
        "a lossless policy the text is that of the model as it is. Needs torch and transformers "
        "(`pip install 'moesim[real]'`).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_text(parser)
    _add_policy(parser)
    _add_machine(parser)
    _add_output(parser)
    parser.set_defaults(func=run)


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--model", required=True, metavar="ID|PATH", help="hub id, folder, or a shipped model: demo"
    )
    group.add_argument(
        "--prompts",
        default="builtin",
        metavar="FILE|TEXT",
        help="a .txt, .jsonl, .json, .toml or .parquet file, one prompt as text, or builtin",
    )
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    group.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="at most so many [64]"
    )
    group.add_argument("--batch", type=positive, default=1, metavar="N", help="prompts at once [1]")
    group.add_argument("--tokenizer", metavar="ID|PATH", help="if the model has none of its own")


def _add_policy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("policy")
    group.add_argument("--policy", metavar="NAME", help="one policy [lru]")
    add_one_policy(group)
    group.set_defaults(capacity=None)
    group.add_argument(
        "--plan",
        type=path,
        metavar="FILE",
        help="policy, capacity of each layer and first set as `moesim plan` wrote them",
    )
    add_past(group)
    add_seed(group)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    add_compute(group)
    group.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"),
        default="auto",
        metavar="T",
        help="fp32, bf16, fp16, or as the checkpoint [auto]",
    )
    group.add_argument(
        "--bandwidth",
        metavar="RATE",
        help="let copies take at least the time of such a link, e.g. 4GB/s [as fast as they go]",
    )
    group.add_argument(
        "--hardware",
        default="rtx4090",
        metavar="NAME|FILE",
        help="profile of the link's chunks and latency [rtx4090]",
    )
    group.add_argument(
        "--watchdog",
        type=positive,
        default=120,
        metavar="SECONDS",
        help="give up when a thread or the policy has been silent for so long [120]",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument(
        "--trace-out", type=path, metavar="FILE", help="record the routing in a trace, *.parquet"
    )
    group.add_argument(
        "--out", type=path, metavar="DIR", help="keep the run, with its fact log, in a folder there"
    )
    group.add_argument(
        "--timeline", action="store_true", help="write timeline.json for Perfetto (needs --out)"
    )
    group.add_argument(
        "--check",
        action="store_true",
        help="load the model a second time, as it is, and compare every token",
    )


def run(args: argparse.Namespace) -> int:
    """Generate and print; 0."""
    from moesim.cli.progress import requests_progress

    try:
        from moesim.real.offload_generate import generate, prepare
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("moesim"):
            raise
        raise NotRunError(
            f"not run: generating needs {error.name}, which is not installed; "
            "`pip install 'moesim[real]'` installs it"
        ) from None
    prepare(args.threads)
    asked = _asked(args)
    with requests_progress("generate", "prompts") as progress:
        answer = generate(asked, progress, None if args.json else _say)
    if args.json:
        print(json.dumps(answer))
        return 0
    _print(answer)
    return 0


def _asked(args: argparse.Namespace) -> Prompted:
    from moesim.planning.file import load_plan
    from moesim.real.offload_generate import Prompted
    from moesim.real.offload_options import Options

    if args.timeline and args.out is None:
        raise UsageError("--timeline writes into the run's folder; give --out DIR too")
    kind, experts = initial(args.initial)
    plan = None
    if args.plan is not None:
        refuse_beside_plan(args)
        plan = load_plan(args.plan)
    options = Options(
        policy=_one(args.policy or "lru", "--policy"),
        capacity=_one(args.capacity or "25%", "--capacity"),
        plan=plan,
        settings=tuple(args.set),
        scope=args.scope,
        hardware=one_device(args),
        paced=args.bandwidth is not None,
        calibration=args.calibration,
        initial=kind,
        initial_experts=experts,
        seed=args.seed,
        watchdog_s=float(args.watchdog),
        timeline=args.timeline,
        out=args.out,
    )
    return Prompted(
        model=args.model,
        prompts=args.prompts,
        max_new_tokens=args.max_new_tokens,
        batch=args.batch,
        limit=args.limit,
        device=args.device,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        trace_out=args.trace_out,
        check=args.check,
        options=options,
    )


def _one(text: str, option: str) -> str:
    named = words([text], "")
    if len(named) > 1:
        raise UsageError(f"{option} {text}: a real run has one; start one run for each")
    return named[0]


def _say(number: int, text: str) -> None:
    print(f"--- {number}\n{text}")
    sys.stdout.flush()


def _print(answer: dict[str, Any]) -> None:
    run = answer["runs"][0]
    found = run["hits"] + run["late_hits"]
    share = f"{found / run['accesses']:.1%}" if run["accesses"] else "none"
    print(
        f"---\n{run['policy']} at {run['capacity']} on {answer['device']}: "
        f"{run['tokens_per_s'] or 0:.2f} tokens/s, {run['output_tokens']} tokens of "
        f"{run['requests']} prompts"
    )
    ttft, tpot = run["ttft_ns"]["mean"], run["tpot_ns"]["mean"]
    times = [f"TTFT {ttft / 1e6:.1f} ms"] if ttft is not None else []
    times += [f"TPOT {tpot / 1e6:.1f} ms"] if tpot is not None else []
    stall = f"stall {run['stall_ns'] / max(1, run['time_ns']):.1%} of the time"
    print(", ".join([*times, stall]))
    print(
        f"experts: {run['hits']} hits, {run['late_hits']} late hits, {run['misses']} misses "
        f"({share} were there or under way); {run['bytes_loaded'] / 1e6:.1f} MB loaded"
    )
    if run["device"]["why_pageable"]:
        print(f"host memory is pageable, so copies are slower: {run['device']['why_pageable']}")
    if run["quality"] is not None:
        print(f"lossy: {_quality(run['quality'])}")
    if answer["checked"] is not None:
        print(f"checked: the tokens of {answer['checked']} prompts are those of the model as it is")
    for what, where in (("trace", answer["trace_out"]), ("run", run["run_dir"])):
        if where is not None:
            print(f"{what}: {where}")


def _quality(quality: dict[str, Any]) -> str:
    kept, agreed = quality["gate_mass_kept"], quality["agreement"]
    parts = [] if kept is None else [f"{kept:.1%} of the gate mass kept"]
    parts += [] if agreed is None else [f"{agreed:.1%} of the choices executed"]
    return ", ".join(parts) or "nothing was chosen"
