"""``moesim plan``: how many experts of each layer to hold within a memory budget."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.ask.arguments import add_seed, one_device, path, positive, words
from moesim.cli.quality import add_text, ready, wanted
from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.planning.file import Alternative, Estimate
    from moesim.planning.planner import Answer, Planner
    from moesim.planning.request import Request
    from moesim.traces.schema import TraceMeta

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim plan --trace x.parquet --model olmoe-1b-7b --budget 6GiB --out plan.toml
  moesim plan --trace x.parquet --budget 4GiB --latency 50ms --split 7:3 --allow gate=topk
  moesim replay --plan plan.toml --trace x.parquet --split 7:3
  moesim plan --trace demo --runs real --model demo --dtype fp32 --quality loss --half 1 \\
    --budget 25%,50%,75% --runs-file runs.jsonl --out plan.toml
"""
_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``plan`` command."""
    parser = subparsers.add_parser(
        "plan",
        help="plan how many experts of each layer to hold (SwapMoE)",
        description="Find how many experts of each layer to hold within a memory budget: profile "
        "the experts, sweep the update period, run random allocations, fit models of quality and "
        "latency, and search them. Prints what the models are worth on runs that they were not "
        "fitted on, and every alternative as predicted and as replayed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(parser)
    _add_limits(parser)
    _add_how(parser)
    add_text(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=path, metavar="FILE", help="write the plan, as TOML")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--trace", required=True, help="the profiling trace, or the sample `demo`")
    group.add_argument(
        "--model",
        metavar="NAME|FILE",
        help="model profile of the trace's shape [the trace's own]; with --runs real the model "
        "that is run: a hub id, a folder or a shipped model",
    )
    group.add_argument(
        "--hardware", default="rtx4090", metavar="NAME|FILE", help="hardware profile [rtx4090]"
    )
    group.add_argument("--bandwidth", metavar="RATE", help="link bandwidth instead, e.g. 4GB/s")
    group.add_argument(
        "--policy", default="swapmoe", metavar="NAME", help="what the plan is for [swapmoe]"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="SEAT=NAME", help="as in `moesim replay`"
    )
    group.add_argument(
        "--allow", action="append", default=[], metavar="INPUT=HOW", help="as in `moesim replay`"
    )
    group.add_argument(
        "--split", metavar="HOW", help="plan on the train requests alone, as in `moesim replay`"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N requests")
    group.add_argument(
        "--chunk-tokens", type=positive, metavar="N", help="serve prefills in chunks of N tokens"
    )
    add_seed(group)
    group.add_argument(
        "--threads", type=positive, metavar="N", help="of --runs real, that compute [cores - 1]"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--budget",
        required=True,
        metavar="SIZE",
        help="device memory for weights, experts, KV cache and activations, e.g. 4GiB; or 50%%: "
        "that share of the experts, beside all else. Several, comma-separated, share their runs",
    )
    group.add_argument("--latency", metavar="TIME", help="latency limit, e.g. 50ms [none]")
    group.add_argument(
        "--latency-of",
        choices=("tpot", "ttft", "request"),
        default="tpot",
        help="what the latency is: of an output token, the first one, or a whole request [tpot]",
    )
    group.add_argument(
        "--quality",
        choices=("mass", "agreement", "hits", "loss"),
        help="what is maximised: gate mass kept, agreement with the true top k (both proxies), "
        "hits of a lossless policy, or minus the model's loss, of which perplexity is the "
        "exponential [mass; loss with --runs real]",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "--method",
        choices=("genetic", "uniform", "greedy", "importance", "evolution", "exact"),
        default="genetic",
        help="whose allocation the plan takes; all are compared [genetic]",
    )
    group.add_argument(
        "--configs", type=positive, default=200, metavar="N", help="random allocations to run [200]"
    )
    group.add_argument(
        "--runs",
        choices=("rehearsal", "replay", "real"),
        help="run them without a clock, in one pass, and replay some; or replay all; or run "
        "--model itself on --text [by policy]",
    )
    group.add_argument(
        "--runs-file",
        type=path,
        metavar="FILE",
        help="with --runs real: keep each run there, *.jsonl, and go on from what is there",
    )
    group.add_argument(
        "--checks",
        type=positive,
        default=6,
        metavar="N",
        help="with a rehearsal: so many of them are replayed too [6]",
    )
    group.add_argument(
        "--period", type=positive, metavar="F", help="inputs between updates [by a sweep]"
    )
    group.add_argument(
        "--swaps", type=positive, metavar="S", help="most swaps of a step [as the policy has it]"
    )
    group.add_argument(
        "--spare", choices=("layer", "none"), help="room for an expert on its way in [by policy]"
    )
    group.add_argument(
        "--least", type=positive, metavar="N", help="fewest experts of a layer [the model's top k]"
    )
    group.add_argument(
        "--encoding",
        choices=("uses", "slots"),
        default="uses",
        help="input of the quality net: share of uses, or of experts, not held [uses]",
    )


def run(args: argparse.Namespace) -> int:
    """Plan and print; 0."""
    from moesim.planning.file import save_plan

    if args.out is not None and (not args.out.parent.is_dir() or args.out.is_dir()):
        raise UsageError(f"--out {args.out}: cannot be written there; name a file in a folder")
    with _planner(args) as planner:
        answers: list[Answer] = []
        for budget in planner.budgets:
            answers.append(planner.plan(budget, [one.plan.slots for one in answers]))
    files = _files(args)
    for answer, file in zip(answers, files, strict=True):
        if file is not None:
            save_plan(answer.plan, file)
    if args.json:
        objects = [_object(a, f) for a, f in zip(answers, files, strict=True)]
        print(json.dumps(objects[0] if len(objects) == 1 else {"schema": 1, "plans": objects}))
        return 0
    for answer, file in zip(answers, files, strict=True):
        _print(answer, file)
    return 0


def _files(args: argparse.Namespace) -> list[Path | None]:
    """Where each budget's plan goes: ``plan.toml``, or ``plan-25pct.toml`` where there are more."""
    budgets = words([args.budget], "")
    if args.out is None or len(budgets) == 1:
        return [args.out] * len(budgets)
    names = [re.sub(r"[^0-9A-Za-z.]", "", text.replace("%", "pct")) for text in budgets]
    return [args.out.with_name(f"{args.out.stem}-{name}{args.out.suffix}") for name in names]


@contextmanager
def _planner(args: argparse.Namespace) -> Iterator[Planner]:
    """A planner; with ``--runs real`` the model is there meanwhile."""
    from moesim.cli.progress import requests_progress
    from moesim.planning.planner import Planner

    request = _request(args)
    if args.runs != "real":
        if args.runs_file is not None:
            raise UsageError("--runs-file: only --runs real keeps its runs; leave it out")
        yield Planner(request, lambda what: requests_progress(f"plan: {what}"))
        return
    if args.model is None:
        raise UsageError("--runs real: name the model that is run with --model")
    ready(args.threads)
    from moesim.real.quality import Bench
    from moesim.real.quality_runs import Losses

    with (
        Bench(args.model, wanted(args), args.dtype) as bench,
        requests_progress("plan: real runs", "runs") as progress,
    ):
        planner = Planner(
            request,
            lambda what: requests_progress(f"plan: {what}"),
            measure=Losses(bench, args.runs_file, progress),
        )
        _refuse_other(bench.handle.meta, planner, args)
        yield planner


def _refuse_other(meta: TraceMeta, planner: Planner, args: argparse.Namespace) -> None:
    """UsageError unless the model is the one that the trace was recorded from, as far as seen."""
    mine = (meta.layers, meta.experts, tuple(meta.model.expert_bytes_table().tolist()))
    space = planner.space
    if mine != (space.layers, space.experts, space.expert_bytes):
        raise UsageError(
            f"--model {args.model}: has {mine[0]} layers of {mine[1]} experts of {mine[2][0]} "
            f"bytes, and the trace {space.layers} of {space.experts} of {space.expert_bytes[0]}; "
            "give a trace of this model, or the --dtype that it was recorded in"
        )


def _request(args: argparse.Namespace) -> Request:
    from moesim.degrade import parse_allowed
    from moesim.past import TRAIN, Share, parse_split
    from moesim.planning.request import Request
    from moesim.profile import load_model
    from moesim.traces.samples import trace_path

    sizes, shares = _budgets(args.budget)
    real = args.runs == "real"
    return Request(
        trace=trace_path(args.trace),
        hardware=one_device(args),
        budget_bytes=sizes[0] if sizes else 0,
        more_budgets=sizes[1:],
        shares=shares,
        model=None if args.model is None or real else load_model(args.model),
        policy=args.policy,
        settings=tuple(args.set),
        latency_limit_ns=math.inf if args.latency is None else _time(args.latency),
        latency_of=args.latency_of,
        quality=args.quality or ("loss" if real else "mass"),
        spare=args.spare or "",
        least=args.least or 0,
        period=args.period or 0,
        swaps=args.swaps or 0,
        runs=args.runs or "",
        configs=args.configs,
        checks=args.checks,
        encoding=args.encoding,
        method=args.method,
        share=None if args.split is None else Share(parse_split(args.split), TRAIN),
        allowed=parse_allowed(args.allow),
        limit=args.limit,
        chunk_tokens=args.chunk_tokens or 0,
        seed=args.seed,
    )


def _budgets(text: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(sizes in bytes, shares): one of the two is empty."""
    from moesim.capacity import parse_bytes

    given = words([text], "")
    shares = [re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", one) for one in given]
    if not any(shares):
        return tuple(parse_bytes(one, "--budget") for one in given), ()
    found = [float(match[1]) / 100 for match in shares if match]
    if len(found) < len(given) or max(found) > 1:
        raise UsageError(f"--budget {text}: write sizes, or shares of at most 100%")
    return (), tuple(found)


def _time(text: str) -> float:
    """``50ms`` as ns."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(ns|us|ms|s)", text)
    if not match or not float(match[1]):
        raise UsageError(f"--latency {text}: write a time such as 50ms or 1.5s")
    return float(match[1]) * _NS[match[2]]


# ---- results -------------------------------------------------------------------------------------


def _object(answer: Answer, file: Path | None) -> dict[str, Any]:
    from dataclasses import asdict

    plan = asdict(answer.plan)
    return {
        "schema": 1,
        "plan": plan,
        "file": None if file is None else str(file),
        "profile": [asdict(one) for one in answer.profile],
        "sweep": [asdict(one) for one in answer.swept],
        "fit": answer.models.report,
        "seconds": dict(answer.seconds),
        "notes": list(answer.notes),
    }


def _print(answer: Answer, file: Path | None) -> None:
    from moesim.cli.table import console, print_table

    out, plan = console(), answer.plan
    first = answer.profile[0]
    out.print(
        f"plan for {plan.policy} on {plan.model}, {plan.layers} layers x {plan.experts} experts, "
        f"top {plan.top_k}; {plan.hardware}; budget {_gb(plan.budget_bytes)} GB, of which "
        f"{_gb(plan.fixed_bytes)} fixed; an expert: {first.expert_bytes / 1e6:.1f} MB, computes in "
        f"{first.compute_ns / 1e3:.1f} us, loads in {first.load_ns / 1e6:.3f} ms"
    )
    if answer.swept:
        rows = [(str(t.period), _ms(t.latency_ns), f"{t.quality:.4f}") for t in answer.swept]
        print_table(("inputs between updates", "latency ms", "quality"), rows)
    for line in _models(answer):
        out.print(line)
    seen = "measured" if plan.facts["quality"]["kind"] == "loss" else "replayed"
    print_table(
        ("method", "pred. quality", seen, "pred. ms", "replayed", "memory GB", "slots"),
        [_row(one, plan.method) for one in plan.alternatives],
    )
    out.print(f"quality: {plan.facts['quality']['meaning']}; slots: least-most (mean) of a layer")
    period = f", an update every {plan.period} inputs" if plan.period else ""
    out.print(f"slots by layer: {' '.join(map(str, plan.slots))}{period}")
    if seen == "measured":
        out.print(
            "the proxy (gate mass kept, without the model) ranks the same runs with "
            f"{_figure(answer.models.report['proxy'])}, of those at a budget "
            f"{_figure(answer.models.report['proxy_at_budget'])}"
        )
    for note in answer.notes:
        out.print(f"note: {note}", style="yellow")
    out.print(_times(answer))
    if file is not None:
        out.print(f"written to {file}")


def _models(answer: Answer) -> tuple[str, ...]:
    report = answer.models.report
    net, near, line = report["net"], report["net_at_budget"], report["linear"]
    latency, memory, apart = report["latency"], report["memory"], report["net_against_replay"]
    return (
        f"quality net, on {report['held_out']} of {report['configurations']} allocations held out "
        f"(by {report['runs']}): rank correlation {_figure(net['spearman'])}, error "
        f"{_figure(net['mean_error'])}; linear {_figure(line['spearman'])}, "
        f"{_figure(line['mean_error'])}; "
        f"memory alone {_figure(report['memory_alone'])}; of those at the budget "
        f"{_figure(near['spearman'])}, linear {_figure(report['linear_at_budget']['spearman'])}",
        f"against {report['replayed']} replays: quality net {_figure(apart['spearman'])}, error "
        f"{_figure(apart['mean_error'])}; latency (each from the others) "
        f"{_figure(latency['spearman'])}, error {_figure(latency['mean_error_share'])} of it; "
        f"experts' memory up to {memory['most_over_bytes']} bytes above what was held, "
        f"{memory['most_under_bytes']} below",
    )


def _row(one: Alternative, chosen: str) -> tuple[str, ...]:
    name = one.name + " <-" * (one.name == chosen)
    if one.predicted is None or one.replayed is None:
        return (name, *("-",) * 5, one.not_run)
    few, most, mean = min(one.slots), max(one.slots), sum(one.slots) / len(one.slots)
    return (
        name,
        *_both(one.predicted, one.replayed),
        _gb(one.predicted.memory_bytes),
        f"{few}-{most} ({mean:.1f})",
    )


def _both(predicted: Estimate, replayed: Estimate) -> tuple[str, str, str, str]:
    return (
        f"{predicted.quality:.4f}",
        f"{replayed.quality:.4f}",
        _ms(predicted.latency_ns),
        _ms(replayed.latency_ns),
    )


def _times(answer: Answer) -> str:
    seconds = answer.seconds
    searched = sum(s for name, s in seconds.items() if name.startswith("search"))
    others = [f"{n} {s:.1f}" for n, s in seconds.items() if not n.startswith("search")]
    return (
        f"took {sum(seconds.values()):.1f} s: {', '.join(others)}, search {searched:.1f} "
        f"(genetic {seconds['search: genetic']:.2f})"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f}"


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.3f}"
