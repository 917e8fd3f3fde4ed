"""The report of a validation as Markdown: tables fit for a README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd

from moesim.analysis.validate import (
    LEAST_ERROR,
    LEAST_PAIRS,
    SPREADS,
    STALL_SHARE,
    Report,
)
from moesim.analysis.validate_runs import PARTS

ERROR_COLUMNS = (
    "metric",
    "demand / capacity",
    "pairs",
    "mean error",
    "P50",
    "P90",
    "P99",
    "spread",
)
ORDER_COLUMNS = ("capacity", "policies", "Kendall's tau-b", "pairs", "clear", "swapped", "tied")
RUN_COLUMNS = ("policy", "capacity", "repeats", "measured", "spread", "simulated", "error", "stall")
PARTS_TITLE = "simulated too long, of the measured time of the run"
PART_COLUMNS = ("policy", "capacity", "whole run", *PARTS)


def markdown(report: Report) -> str:
    """The whole text, ending in a newline."""
    parts = [
        heading(report),
        _table(ERROR_COLUMNS, error_rows(report), 2),
        "Error: simulated / measured - 1, the measured number being the median of the repeats; "
        "mean error with its sign, percentiles without. Spread: half of the range of the repeats "
        "over their median, the mean over pairs. Demand: bytes that a forward pass asks for.",
        _table(ORDER_COLUMNS, order_rows(report), 1),
        "Clear: pairs of policies whose measured mean TPOT differs by more than both half ranges "
        "together. Swapped, tied: those of them that the simulator orders the other way, or not.",
        _table(RUN_COLUMNS, run_rows(report), 2),
        "Mean TPOT in ms; stall over the time of the run, measured.",
        _table(PART_COLUMNS, part_rows(report), 2),
        "What is simulated too long (below 0: too short), as a share of the measured time of the "
        "run; the parts sum to the whole.",
        "\n".join(f"- {line}" for line in claim_lines(report)),
    ]
    return "\n\n".join(parts) + "\n"


def heading(report: Report) -> str:
    """What was compared, where."""
    facts = report.facts
    link = f"{facts['link_bytes_per_s'] / 1e9:.3g} GB/s" if facts["paced"] else "as fast as it goes"
    cores = f", {facts['cores']} cores" if facts["cores"] else ""
    return (
        f"{facts['processor']}{cores}, torch {facts['torch']}, device {facts['device']}; experts "
        f"of {facts['model']}, link {link}; profile {facts['hardware']} "
        f"({facts['hardware_source']}); {len(report.configurations)} configurations, at least "
        f"{report.claim['least_repeats']} repeats of each; trace {facts['trace'][:12]}"
    )


def error_rows(report: Report) -> Iterator[list[str]]:
    """One row a metric and regime."""
    for row in report.errors.to_dict("records"):
        sizes = [_percent(row[name]) for name in ("p50", "p90", "p99")]
        yield [
            row["metric"],
            row["regime"],
            str(row["pairs"]),
            _signed(row["mean_error"]),
            *sizes,
            _percent(row["mean_spread"]),
        ]


def order_rows(report: Report) -> Iterator[list[str]]:
    """One row a group of policies that ran under like conditions."""
    for row in report.orders.to_dict("records"):
        counts = [str(row[name]) for name in ("pairs", "clear", "swapped", "tied")]
        tau = "-" if pd.isna(row["tau_b"]) else f"{row['tau_b']:.3f}"
        yield [row["group"], str(row["policies"]), tau, *counts]


def run_rows(report: Report) -> Iterator[list[str]]:
    """One row a configuration."""
    for row in report.configurations.to_dict("records"):
        where = [row["capacity"], row["variant"]]
        yield [
            row["policy"] + (" (bound)" if row["oracle"] else ""),
            ", ".join(text for text in where if text),
            str(row["repeats"]),
            _ms(row["tpot_measured"]),
            _percent(row["tpot_spread"]),
            _ms(row["tpot_simulated"]),
            _signed(row["tpot_error"]),
            _percent(row["stall_share"]),
        ]


def part_rows(report: Report) -> Iterator[list[str]]:
    """One row a configuration: where its error comes from."""
    for row in report.parts.to_dict("records"):
        where = ", ".join(text for text in (row["capacity"], row["variant"]) if text)
        yield [row["policy"], where, *(_signed(row[name]) for name in ("time", *PARTS))]


def claim_lines(report: Report) -> Iterator[str]:
    """What is claimed, whether it holds, and what weakens it."""
    claim = report.claim
    yield (
        f"mean TPOT is off by {_signed(claim['mean_tpot_error'])}; claimed: at most "
        f"{_percent(claim['bound'])} (the larger of {LEAST_ERROR:.0%} and {SPREADS:g} spreads): "
        f"{_kept(claim['error_kept'])}. One by one, {claim['configurations_in_bound']} of "
        f"{claim['configurations']} configurations keep it; the worst is off by "
        f"{_signed(claim['worst_tpot_error'])}"
    )
    yield (
        f"{claim['clear_pairs']} of {claim['policy_pairs']} pairs of policies differ clearly, and "
        f"{claim['clear_pairs_not_in_order']} of them are swapped or tied; claimed: at least "
        f"{LEAST_PAIRS}, and none: {_kept(claim['order_kept'])}"
    )
    yield from _wrong(report.policies)
    low, high = claim["stall_share"]
    yield (
        f"stall takes {_percent(low)} to {_percent(high)} of the time; "
        f"{claim['stall_in_range']} of {claim['configurations']} configurations lie between "
        f"{STALL_SHARE[0]:.0%} and {STALL_SHARE[1]:.0%}"
    )
    yield from report.notes


def _wrong(policies: pd.DataFrame) -> Iterator[str]:
    wrong = policies[policies["clear"] & (policies["simulated_order"] != "same")]
    for row in wrong.to_dict("records"):
        yield (
            f"{row['simulated_order']} at {row['group']}: {row['a']} {_ms(row['measured_a'])} and "
            f"{row['b']} {_ms(row['measured_b'])} ms measured, {_ms(row['simulated_a'])} and "
            f"{_ms(row['simulated_b'])} ms simulated"
        )


def _kept(kept: bool) -> str:
    return "kept" if kept else "NOT KEPT"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    rule = ["---"] * left + ["--:"] * (len(columns) - left)
    lines = [columns, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _signed(value: Any) -> str:
    return "-" if pd.isna(value) else f"{value:+.1%}"


def _percent(value: Any) -> str:
    return "-" if pd.isna(value) else f"{value:.1%}"


def _ms(value: Any) -> str:
    return "-" if pd.isna(value) else f"{value / 1e6:.1f}"
