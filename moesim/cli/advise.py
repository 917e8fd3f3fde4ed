"""``moesim advise``: what should I set?"""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.ask.arguments import hardware as _hardware
from moesim.ask.arguments import path as _path
from moesim.ask.arguments import positive as _positive
from moesim.ask.arguments import seed as _seed
from moesim.ask.arguments import words as _words
from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.advice import Question
    from moesim.cli.progress import Progress
    from moesim.replays import Request

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

COLUMNS = (
    "memory GB",
    "of experts",
    "policy",
    "TPOT ms",
    "from",
    "to",
    "TTFT ms",
    "tokens/s",
    "stall %",
    "",
)
_EXAMPLES = """examples:
  moesim advise --trace demo --model olmoe-1b-7b --hardware rtx4090 --budget 2GB
  moesim advise --trace x.parquet --hardware h100 --slo tpot=50ms,ttft.p99=2s --json
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``advise`` command."""
    parser = subparsers.add_parser(
        "advise",
        help="what should I set? policy and memory for a model on a machine",
        description="Replay a trace under every policy that could be used, follow the quickest "
        "along a curve of memory, and recommend one setting, with how sure that is. Where a "
        "target cannot be met, say what is short.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(parser)
    _add_how(parser)
    parser.set_defaults(func=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--trace", required=True, help="a trace file, or a shipped sample (demo)")
    group.add_argument("--model", help="bytes and times of this model [the one recorded]")
    group.add_argument(
        "--hardware", default="rtx4090", metavar="NAME|FILE", help="hardware profile [rtx4090]"
    )
    group.add_argument("--bandwidth", metavar="RATE", help="link bandwidth instead, e.g. 4GB/s")
    group.add_argument(
        "--slo",
        metavar="TARGETS",
        help="what must be met: tpot=50ms, ttft.p99=2s; of 9 requests in 10 where no statistic is "
        "named",
    )
    group.add_argument(
        "--budget",
        metavar="SIZE",
        help="device memory that experts may have [what model and KV cache leave]",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "--policy", action="append", metavar="NAME", help="candidates, with commas [all]"
    )
    group.add_argument("--batch", type=_positive, default=1, help="requests in a static batch [1]")
    group.add_argument(
        "--devices",
        type=_positive,
        metavar="N",
        help="devices that share the experts out [as --hardware says]",
    )
    group.add_argument(
        "--limit", type=_positive, default=32, metavar="N", help="only the first N requests [32]"
    )
    group.add_argument(
        "--split", metavar="HOW", help="as in replay: policies learn from the train requests"
    )
    group.add_argument(
        "--allow", action="append", default=[], metavar="INPUT=HOW", help="as in replay"
    )
    group.add_argument(
        "--validation",
        type=_path,
        metavar="DIR",
        help="how far simulated times are off, from a folder of `moesim real campaign` [shipped]",
    )
    group.add_argument("--seed", type=_seed, default=0, help="of every random choice [0]")
    group.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Advise and print; 0."""
    from moesim.advice import advise
    from moesim.cli.progress import requests_progress

    def stage(name: str) -> AbstractContextManager[Progress]:
        return requests_progress(name)

    answer = advise(_question(args), stage)
    if args.json:
        print(json.dumps(answer))
    else:
        _print(answer)
    return 0


def _question(args: argparse.Namespace) -> Question:
    from moesim.advice import Question, parse_slo
    from moesim.capacity import parse_bytes

    budget = None if args.budget is None else parse_bytes(args.budget, "--budget")
    if budget == 0:
        raise UsageError("--budget 0: must be more than nothing")
    policies = _words(args.policy, "all")
    return Question(
        request=_request(args),
        targets=() if args.slo is None else parse_slo(args.slo),
        budget_bytes=budget,
        policies=() if policies == ("all",) else policies,
        validation=args.validation,
    )


def _request(args: argparse.Namespace) -> Request:
    from moesim.degrade import parse_allowed
    from moesim.past import Share, parse_split
    from moesim.profile import load_model
    from moesim.replays import Request
    from moesim.traces.samples import trace_path

    return Request(
        trace=trace_path(args.trace),
        hardware=_hardware(args),
        costs=None if args.model is None else load_model(args.model),
        batch=args.batch,
        devices=args.devices or 0,
        share=None if args.split is None else Share(parse_split(args.split)),
        allowed=parse_allowed(args.allow),
        limit=args.limit,
        seed=args.seed,
    )


# ---- text ----------------------------------------------------------------------------------------


def _print(answer: dict[str, Any]) -> None:
    from moesim.cli.table import console, print_table

    out = console()
    for line in _head(answer):
        out.print(line)
    print_table(
        COLUMNS,
        [_row(point, answer) for point in answer["curve"]],
        left=0,
    )
    for line in (*_verdict(answer), *_caveats(answer)):
        out.print(line)


def _head(answer: dict[str, Any]) -> list[str]:
    memory = answer["memory"]
    return [
        f"{answer['model']} on {answer['hardware']} ({answer['hardware_source']}), routing of "
        f"{Path(answer['trace']).name}",
        f"device memory {_gb(memory['device_bytes'])}{_each(memory)}: reserved "
        f"{_gb(memory['reserved_bytes'])}, weights beside experts "
        f"{_gb(memory['weights_bytes'])}, KV cache of "
        f"{answer['context_tokens']} tokens {_gb(memory['kv_bytes'])}; experts "
        f"{_gb(memory['expert_bytes'])}, and may have {_gb(memory['most_bytes'])}",
    ]


def _each(memory: dict[str, Any]) -> str:
    return f" on each of {memory['devices']} devices" if memory["devices"] > 1 else ""


def _row(point: dict[str, Any], answer: dict[str, Any]) -> list[str]:
    best = answer["recommended"]
    is_best = best is not None and best["capacity"] == point["capacity"]
    marks = ["recommended"] * is_best + ["knee"] * (answer["knee"] == point["capacity"])
    ties = f" = {', '.join(point['ties'])}" if point["ties"] else ""
    rate = point["tokens_per_s"]
    return [
        f"{point['capacity_bytes'] / 1e9:.2f}",
        f"{point['share']:.1%}",
        point["policy"] + ties,
        *(_ms(point["tpot"][side]["mean"]) for side in ("expected", "low", "high")),
        _ms(point["ttft"]["expected"]["mean"]),
        "-" if rate is None else f"{rate:.1f}",
        f"{point['stall_share']:.1%}",
        ", ".join(marks),
    ]


def _verdict(answer: dict[str, Any]) -> list[str]:
    best, lines = answer["recommended"], []
    if best is None:
        lines.append(f"No setting meets {_targets(answer)}.")
        lines += [f"- {short['text']}" for short in answer["shortages"]]
    else:
        lines.append(
            f"Set --policy {best['policy']} --capacity {best['capacity']} "
            f"({_gb(best['capacity_bytes'])} for experts): {_ms(best['tpot']['expected']['mean'])} "
            f"ms a token expected, {_ms(best['tpot']['low']['mean'])} to "
            f"{_ms(best['tpot']['high']['mean'])} likely{_why(answer)}."
        )
    return [*lines, f"Break-even of {answer['break_even']['of']}: {_even(answer['break_even'])}"]


def _even(even: dict[str, Any]) -> str:
    if even["factor"] is None:
        return "no link makes it as quick as all resident."
    if even["bytes_per_s"] is None:
        return "a link without limit makes it as quick as all resident."
    return (
        f"{even['bytes_per_s'] / 1e9:.0f} GB/s ({even['factor']:.1f} times this link) would bring "
        "it within a tenth of all resident."
    )


def _why(answer: dict[str, Any]) -> str:
    best, memory = answer["recommended"], answer["memory"]
    if answer["targets"]:
        sure = "also at the far end of what is likely" if answer["surely"] else "as expected"
        return f"; the least memory that meets {_targets(answer)}, {sure}"
    if best["capacity_bytes"] >= memory["expert_bytes"]:
        return "; every expert fits, and nothing need be loaded twice"
    if best["capacity"] == answer["curve"][-1]["capacity"]:
        return "; all that experts may have, for more memory still helps"
    return "; the rest of what experts may have would gain less than 5 %"


def _targets(answer: dict[str, Any]) -> str:
    return " and ".join(
        f"{t['statistic']} {t['metric'].upper()} <= {t['most_ns'] / 1e6:g} ms"
        for t in answer["targets"]
    )


def _caveats(answer: dict[str, Any]) -> list[str]:
    trust = answer["trust"]
    lines = [
        f"from, to: simulated means were off by up to {trust['tpot']:.1%} in 9 of 10 of "
        f"{trust['configurations']} configurations on {trust['machine']}"
        + (
            ""
            if answer["hardware_source"] == "measured"
            else "; and nobody measured this machine: its rates times 0.8 or 1.25, by assumption"
        )
        + _beyond(answer),
        "= cannot be told from the policy before it (95 % bootstrap over requests)",
    ]
    refused = sorted({run["policy"] for run in answer["not_run"]})
    if refused:
        lines.append(f"not run (`moesim replay --policy NAME` says why): {', '.join(refused)}")
    return lines


def _beyond(answer: dict[str, Any]) -> str:
    """What the band takes for granted."""
    named = sorted({t["statistic"] for t in answer["targets"]} - {"mean"})
    return f"; {' and '.join(named)} are taken to be off by as much" if named else ""


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _ms(ns: float | None) -> str:
    return "-" if ns is None else f"{ns / 1e6:.2f}"
