"""How far simulated times and counts lie from measured ones.

Every number is computed from the three tables of ``Data``, so that raw CSV files give the same
report again. A *pair* sets one simulated number beside the median of the same number over the
repeats of the measurement: TTFT and TPOT of each request, the stall of each layer, and of each
configuration its mean TPOT, its hits and late hits together, and its bytes. Its error is
simulated / measured - 1; its spread is half of the range of the repeats over their median.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import kendalltau

from moesim.analysis.validate_runs import MEASURED, PARTS, SIMULATED, Data
from moesim.errors import UsageError

ENOUGH_REPEATS = 3
"""With fewer, a spread says little, and the answer says so."""

REGIMES = ((0.5, "below 1/2"), (1.0, "1/2 to 1"), (2.0, "1 to 2"), (float("inf"), "2 and more"))
"""Bytes that a forward pass demands over the capacity: (below what, name)."""
ALL = "all"

MEAN_TPOT = "mean TPOT"
METRICS = ("TTFT", "TPOT", MEAN_TPOT, "stall per layer", "hits + late hits", "bytes")

STALL_SHARE = (0.3, 0.7)
"""Where the validation claims something: stall over the time of the run, measured."""
LEAST_ERROR, SPREADS, LEAST_PAIRS = 0.10, 2.0, 10
"""The claim: |mean TPOT error| is at most the larger of 10 % and twice the spread; of at least ten
pairs of policies that differ by more than their spreads, none is ordered otherwise."""

_IDS = ["configuration"]
_TABLES = ("runs", "requests", "layers")
_FACTS = "facts.json"
_TEXTS = ("origin", "variant", "policy", "capacity", "scope", "decision_digest", "run")
_TIMES = ("ttft_ns", "tpot_ns")
"""A request may lack them. What is neither is a whole number."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is published.

    configurations : one row each, with what was measured and simulated of its mean TPOT.
    pairs : one row a pair. errors : one row a metric and regime.
    policies : one row a pair of policies that ran under like conditions.
    orders : one row a group of such policies, with Kendall's tau-b.
    parts : of each configuration, how much of the measured time of the run each part of the compute
        lane's time is simulated too long (or, below 0, too short): together the error of that time.
    claim : what is claimed, and whether it holds. notes : what weakens it.
    """

    facts: Mapping[str, Any]
    configurations: pd.DataFrame
    pairs: pd.DataFrame
    errors: pd.DataFrame
    policies: pd.DataFrame
    orders: pd.DataFrame
    parts: pd.DataFrame
    claim: Mapping[str, Any]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            "schema": 1,
            "facts": dict(self.facts),
            "errors": _rows(self.errors),
            "orders": _rows(self.orders),
            "clear_pairs": _rows(self.policies[self.policies["clear"]]),
            "configurations": _rows(self.configurations),
            "parts": _rows(self.parts),
            "claim": {name: _known(value) for name, value in self.claim.items()},
            "notes": list(self.notes),
        }


def report(data: Data) -> Report:
    """Everything that is said of ``data``."""
    configurations = _configurations(data)
    pairs = _pairs(data, configurations)
    configurations = _with_tpot(configurations, pairs)
    policies = _policies(configurations)
    errors = _errors(pairs)
    return Report(
        data.facts,
        configurations,
        pairs,
        errors,
        policies,
        _orders(configurations, policies),
        _parts(data, configurations),
        _claim(configurations, errors, policies),
        tuple(_notes(configurations, pairs)),
    )


# ---- one configuration ---------------------------------------------------------------------------


def _configurations(data: Data) -> pd.DataFrame:
    measured = data.runs[data.runs["origin"] == MEASURED]
    grouped = measured.assign(
        stall_share=measured["stall_ns"] / measured["time_ns"],
        demand_over_capacity=measured["access_bytes"]
        / measured["steps"]
        / measured["capacity_bytes"],
    ).groupby("configuration", sort=True)
    first = grouped[["policy", "capacity", "capacity_bytes", "scope", "variant", "oracle"]].first()
    middle = grouped[["stall_share", "demand_over_capacity"]].median()
    table = first.join(middle).assign(repeats=grouped.size())
    table["regime"] = [_regime(value) for value in table["demand_over_capacity"]]
    return table.reset_index()


def _regime(demand_over_capacity: float) -> str:
    return next(name for below, name in REGIMES if demand_over_capacity < below)


def _with_tpot(configurations: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """With the mean TPOT of each: simulated, measured, and the measured extremes."""
    means = pairs[pairs["metric"] == MEAN_TPOT].set_index("configuration")
    told = means[["simulated", "measured", "least", "most", "error", "spread"]].add_prefix("tpot_")
    return configurations.join(told, on="configuration")


# ---- pairs ---------------------------------------------------------------------------------------


def _pairs(data: Data, configurations: pd.DataFrame) -> pd.DataFrame:
    runs = data.runs.assign(found=data.runs["hits"] + data.runs["late_hits"], unit=-1)
    means = data.requests.groupby([*_IDS, "origin", "repeat"], sort=True)["tpot_ns"].mean()
    whole = means.reset_index().assign(unit=-1)
    sources = (
        (data.requests.assign(unit=data.requests["request"]), "ttft_ns"),
        (data.requests.assign(unit=data.requests["request"]), "tpot_ns"),
        (whole, "tpot_ns"),
        (data.layers.assign(unit=data.layers["layer"]), "stall_ns"),
        (runs, "found"),
        (runs, "bytes_loaded"),
    )
    made = [
        _paired(table, value).assign(metric=metric)
        for metric, (table, value) in zip(METRICS, sources, strict=True)
    ]
    told = configurations[["configuration", "policy", "capacity", "variant", "regime"]]
    pairs = pd.concat(made, ignore_index=True).merge(told, on="configuration")
    order = ["metric", "configuration", "policy", "capacity", "variant", "regime", "unit"]
    return pairs[[*order, "simulated", "measured", "least", "most", "error", "spread"]]


def _paired(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Simulated beside the median of the repeats; without what was never measured or is 0."""
    ids = [*_IDS, "unit"]
    known = table.dropna(subset=[value])
    simulated = known[known["origin"] == SIMULATED].set_index(ids)[value].rename("simulated")
    repeats = known[known["origin"] == MEASURED].groupby(ids, sort=True)[value]
    found = pd.DataFrame(
        {"measured": repeats.median(), "least": repeats.min(), "most": repeats.max()}
    )
    both = found.join(simulated, how="inner").astype("float64")
    both = both[both["measured"] > 0]
    both["error"] = both["simulated"] / both["measured"] - 1
    both["spread"] = (both["most"] - both["least"]) / 2 / both["measured"]
    return both.reset_index()


def _errors(pairs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    present = [name for _, name in REGIMES if name in set(pairs["regime"])]
    for metric in METRICS:
        of_metric = pairs[pairs["metric"] == metric]
        for regime in (ALL, *present):
            some = of_metric if regime == ALL else of_metric[of_metric["regime"] == regime]
            if len(some):
                rows.append({"metric": metric, "regime": regime, **_error(some)})
    return pd.DataFrame(rows)


def _error(pairs: pd.DataFrame) -> dict[str, float]:
    sizes = pairs["error"].abs()
    p50, p90, p99 = (float(sizes.quantile(q)) for q in (0.5, 0.9, 0.99))
    return {
        "pairs": len(pairs),
        "mean_error": float(pairs["error"].mean()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "mean_spread": float(pairs["spread"].mean()),
        "mean_simulated": float(pairs["simulated"].mean()),
        "mean_measured": float(pairs["measured"].mean()),
    }


def _parts(data: Data, configurations: pd.DataFrame) -> pd.DataFrame:
    """Means of the repeats, so that the parts of a run sum to its time."""
    columns = [f"{part}_ns" for part in PARTS]
    means = data.runs.groupby(["configuration", "origin"])[[*columns, "time_ns"]].mean()
    simulated, measured = (means.xs(origin, level="origin") for origin in (SIMULATED, MEASURED))
    shares = (simulated - measured).div(measured["time_ns"], axis=0)
    named = shares.rename(columns={f"{part}_ns": part for part in PARTS} | {"time_ns": "time"})
    told = configurations[["configuration", "policy", "capacity", "variant"]]
    return told.merge(named.reset_index(), on="configuration")


# ---- policies against each other -----------------------------------------------------------------


def _groups(configurations: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Policies that ran under like conditions."""
    known = configurations.dropna(subset=["tpot_measured", "tpot_simulated"])
    keys = ["capacity_bytes", "scope", "variant", "capacity"]
    for (_, scope, variant, capacity), some in known.groupby(keys, sort=True):
        more = [text for text in (scope if scope != "global" else "", variant) if text]
        yield ", ".join([str(capacity), *more]), some


def _policies(configurations: pd.DataFrame) -> pd.DataFrame:
    columns = ["group", "a", "b", "measured_a", "measured_b", "simulated_a", "simulated_b"]
    rows = []
    for group, some in _groups(configurations):
        for (_, a), (_, b) in combinations(some.iterrows(), 2):
            rows.append({"group": group, **_against(a, b)})
    table = pd.DataFrame(rows, columns=[*columns, "spreads", "clear", "simulated_order"])
    return table.astype({"clear": bool})


def _against(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """``clear``: the means differ by more than both half ranges together."""
    spreads = sum(float(one["tpot_most"] - one["tpot_least"]) / 2 for one in (a, b))
    measured = float(a["tpot_measured"] - b["tpot_measured"])
    simulated = float(a["tpot_simulated"] - b["tpot_simulated"])
    order = "tied" if not simulated else "same" if simulated * measured > 0 else "swapped"
    return {
        "a": a["policy"],
        "b": b["policy"],
        "measured_a": float(a["tpot_measured"]),
        "measured_b": float(b["tpot_measured"]),
        "simulated_a": float(a["tpot_simulated"]),
        "simulated_b": float(b["tpot_simulated"]),
        "spreads": spreads,
        "clear": abs(measured) > spreads,
        "simulated_order": order,
    }


def _orders(configurations: pd.DataFrame, policies: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for group, some in _groups(configurations):
        of_group = policies[policies["group"] == group]
        clear = of_group[of_group["clear"]]
        told = some["tpot_simulated"], some["tpot_measured"]
        tau = float(kendalltau(*told, variant="b").statistic) if len(some) > 1 else float("nan")
        rows.append(
            {
                "group": group,
                "policies": len(some),
                "tau_b": tau,
                "pairs": len(of_group),
                "clear": len(clear),
                "swapped": int((clear["simulated_order"] == "swapped").sum()),
                "tied": int((clear["simulated_order"] == "tied").sum()),
            }
        )
    columns = ["group", "policies", "tau_b", "pairs", "clear", "swapped", "tied"]
    return pd.DataFrame(rows, columns=columns)


# ---- what is claimed -----------------------------------------------------------------------------


def _claim(
    configurations: pd.DataFrame, errors: pd.DataFrame, policies: pd.DataFrame
) -> dict[str, Any]:
    """Over all configurations together, and of how many each alone keeps the bound."""
    of_tpot = errors[(errors["metric"] == MEAN_TPOT) & (errors["regime"] == ALL)]
    error = float(of_tpot["mean_error"].iloc[0]) if len(of_tpot) else float("nan")
    spread = float(of_tpot["mean_spread"].iloc[0]) if len(of_tpot) else float("nan")
    bound = max(LEAST_ERROR, SPREADS * spread)
    each = configurations["tpot_error"].abs() <= (
        (SPREADS * configurations["tpot_spread"]).clip(lower=LEAST_ERROR)
    )
    clear = policies[policies["clear"]]
    wrong = int((clear["simulated_order"] != "same").sum())
    low, high = STALL_SHARE
    shares = configurations["stall_share"]
    return {
        "mean_tpot_error": error,
        "mean_tpot_spread": spread,
        "bound": bound,
        "error_kept": abs(error) <= bound,
        "configurations": len(configurations),
        "configurations_in_bound": int(each.sum()),
        "worst_tpot_error": float(max(configurations["tpot_error"], key=abs)),
        "policy_pairs": len(policies),
        "clear_pairs": len(clear),
        "clear_pairs_not_in_order": wrong,
        "order_kept": len(clear) >= LEAST_PAIRS and not wrong,
        "least_repeats": int(configurations["repeats"].min()),
        "stall_share": [float(shares.min()), float(shares.max())],
        "stall_in_range": int(((shares >= low) & (shares <= high)).sum()),
    }


def _notes(configurations: pd.DataFrame, pairs: pd.DataFrame) -> Iterator[str]:
    few = configurations[configurations["repeats"] < ENOUGH_REPEATS]
    if len(few):
        names = ", ".join(f"{row.policy} at {row.capacity}" for row in few.itertuples())
        yield (
            f"fewer than {ENOUGH_REPEATS} repeats, so the spread says little: {names}; measure "
            "them again"
        )
    for metric in METRICS:
        if not (pairs["metric"] == metric).any():
            yield f"{metric}: nothing to compare, for nothing of it was measured"


# ---- tables in and out ---------------------------------------------------------------------------


def write_data(data: Data, folder: Path) -> None:
    """The tables as CSV files and the facts as JSON; ``read_data`` reads them to the last bit."""
    for name in _TABLES:
        getattr(data, name).to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    text = json.dumps(data.facts, indent=1, sort_keys=True)
    (folder / _FACTS).write_text(text + "\n", encoding="utf-8")


def read_data(folder: Path) -> Data:
    """What ``write_data`` wrote.

    Raises
    ------
    UsageError
        Naming the file that is missing or damaged.
    """
    tables = []
    for name in _TABLES:
        path = folder / f"{name}.csv"
        try:
            # As texts first: what reads numbers quickly may lose the last bit.
            found = pd.read_csv(path, dtype=str, keep_default_na=False)
            tables.append(_typed(found))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read ({error})") from None
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / _FACTS}: cannot be read ({error})") from None
    runs, requests, layers = tables
    return Data(runs, requests, layers, facts)


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    for name in table:
        if name in _TIMES:
            table[name] = [float(text or "nan") for text in table[name]]
        elif name == "oracle":
            table[name] = table[name] == "True"
        elif name not in _TEXTS:
            table[name] = [int(text) for text in table[name]]
    return table


def _known(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Plain JSON values; null where there is none."""
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return rows
