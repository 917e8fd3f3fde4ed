"""Simulated and measured runs, read from their folders and matched.

A run is matched by all that determines it except the machine: trace, policy with its seats and
parameters, capacity, model, batch, limit and the rest of ``KEYS``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moesim.errors import UsageError
from moesim.result import HOST, MANIFEST, REQUESTS, SCHEMA, TIMELINE, canonical, read_run

SIMULATED, MEASURED = "simulated", "measured"

PARTS = ("initial", "dense", "experts", "sync", "plan", "stall", "cpu_wait", "idle")
"""Where the compute lane's time goes."""

KEYS = (
    "trace",
    "policy",
    "capacity",
    "model",
    "batch",
    "chunk_tokens",
    "arrivals",
    "limit",
    "seed",
    "allowed",
    "initial",
    "initial_experts",
    "calibration",
    "split",
    "flat",
    "order",
    "kv",
    "write_back",
)
"""Of a manifest: what a simulation and its measurement must share; where experts differ in size
also how a bank has room for them."""

_TOLD = {"capacity", "policy"}
_NAMED = 3
"""So many runs of a list are named."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder."""

    folder: Path
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    host: Mapping[str, Any]

    @property
    def real(self) -> bool:
        """Whether it was measured."""
        return self.manifest.get("engine") == "real"

    @property
    def key(self) -> str:
        """What it is matched by."""
        return canonical([self.manifest.get(name) for name in self.keys])

    @property
    def keys(self) -> tuple[str, ...]:
        """Which of its facts that is."""
        return KEYS if self.summary["sizes_equal"] else (*KEYS, "allocator")

    @property
    def name(self) -> str:
        """Policy, with what was set, and capacity as typed."""
        return f"{self.policy} at {self.summary['capacity']}"

    @property
    def policy(self) -> str:
        """The policy, with what was set."""
        return " ".join([str(self.summary["policy"]), *self.summary["set"]])


@dataclass(frozen=True, slots=True)
class Data:
    """What is compared; every table is tidy, and CSV files hold them.

    runs : one row a run; ``configuration`` numbers those that were simulated and measured.
    requests : one row a request of a run, times in ns. layers : one row a layer of a run.
    facts : trace, model, machine.
    """

    runs: pd.DataFrame
    requests: pd.DataFrame
    layers: pd.DataFrame
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Matched:
    """One configuration: its simulation and its measurements, in order of repeat."""

    simulated: Run
    measured: tuple[Run, ...]

    def with_timeline(self) -> tuple[Path, Path] | None:
        """A timeline of each, where both kept one."""
        sim = self.simulated.folder / TIMELINE
        real = (run.folder / TIMELINE for run in self.measured)
        found = next((path for path in real if path.is_file()), None)
        return (sim, found) if found is not None and sim.is_file() else None


def matched(simulated: Path, measured: Sequence[Path]) -> list[Matched]:
    """Read the folders (of a run, or of run folders) and pair their runs.

    Raises
    ------
    UsageError
        Naming folders, and what does not fit: no finished run, a simulation where a measurement
        belongs or the reverse, mixed traces, models, schemas, links or machines, two simulations of
        one configuration, a policy with other settings, runs without a partner.
    """
    sims = list(_read([simulated]))
    reals = list(_read(measured))
    _refuse_kind(sims, reals)
    _refuse_mixed(sims, reals)
    by_key = {run.key: run for run in sims}
    _refuse_twice(sims)
    _refuse_unmatched(sims, reals)
    groups: dict[str, list[Run]] = {}
    for run in reals:
        groups.setdefault(run.key, []).append(run)
    ordered = sorted(by_key, key=lambda key: _rank(by_key[key]))
    return [Matched(by_key[key], tuple(sorted(groups[key], key=_repeat))) for key in ordered]


def data_of(pairs: Sequence[Matched]) -> Data:
    """The tables of matched runs."""
    runs: list[dict[str, Any]] = []
    requests: list[pd.DataFrame] = []
    layers: list[dict[str, Any]] = []
    variants = _variants(pairs)
    for number, pair in enumerate(pairs):
        told = [(SIMULATED, 0, pair.simulated)]
        told += [(MEASURED, repeat, run) for repeat, run in enumerate(pair.measured)]
        for origin, repeat, run in told:
            where = {"configuration": number, "origin": origin, "repeat": repeat}
            runs.append({**where, "variant": variants[number], **_run_row(run)})
            requests.append(_requests(run).assign(**where))
            layers += [
                {**where, "layer": layer, "stall_ns": stall_ns}
                for layer, stall_ns in enumerate(run.summary["layer_stall_ns"])
            ]
    ids = ["configuration", "origin", "repeat"]
    columns = [*ids, "request", "ttft_ns", "tpot_ns", "stall_ns"]
    return Data(
        pd.DataFrame(runs),
        pd.concat(requests, ignore_index=True)[columns],
        pd.DataFrame(layers),
        _facts(pairs),
    )


# ---- reading -------------------------------------------------------------------------------------


def _read(paths: Iterable[Path]) -> Iterator[Run]:
    seen: set[Path] = set()
    for path in paths:
        for folder in _folders(path):
            if (where := folder.resolve()) not in seen:
                seen.add(where)
                yield _run(folder)


def _folders(path: Path) -> list[Path]:
    if (path / MANIFEST).exists():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; name a run folder, or a folder of run folders")
    found = sorted(child for child in path.iterdir() if (child / MANIFEST).exists())
    found = [child for child in found if not child.name.startswith(".")]
    if not found:
        raise UsageError(
            f"{path}: holds no finished run; name what `moesim replay --out` or `moesim real run "
            "--out` wrote"
        )
    return found


def _run(folder: Path) -> Run:
    manifest, summary = read_run(folder)
    if manifest.get("schema") != SCHEMA:
        raise UsageError(
            f"{folder}: has schema {manifest.get('schema')}, this moesim compares {SCHEMA}; make "
            "the run again"
        )
    try:
        host = json.loads((folder / HOST).read_text())
    except (OSError, ValueError):
        raise UsageError(f"{folder}: {HOST} is missing or damaged; make the run again") from None
    return Run(folder, manifest, summary, host)


def _requests(run: Run) -> pd.DataFrame:
    path = run.folder / REQUESTS
    try:
        return pd.read_parquet(path, columns=["request", "ttft_ns", "tpot_ns", "stall_ns"])
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot be read ({type(error).__name__}); make the run again"
        ) from None


def _run_row(run: Run) -> dict[str, Any]:
    summary = run.summary
    names = ("capacity", "capacity_bytes", "scope", "oracle", "accesses", "hits", "late_hits")
    more = ("misses", "loads", "bytes_loaded", "access_bytes", "steps", "time_ns")
    return {
        "policy": run.policy,
        **{name: summary[name] for name in (*names, *more)},
        **{f"{part}_ns": summary["times_ns"][part] for part in PARTS},
        "decision_digest": summary["decision_digest"],
        "run": run.folder.name,
    }


def _facts(pairs: Sequence[Matched]) -> dict[str, Any]:
    sim, real = pairs[0].simulated, pairs[0].measured[0]
    hardware, device = sim.manifest["hardware"], real.host.get("device_name")
    return {
        **({} if device is None else {"device_name": device}),
        "trace": sim.manifest["trace"],
        "model": sim.manifest["model"]["name"],
        "limit": sim.manifest["limit"],
        "hardware": hardware["name"],
        "hardware_source": hardware["source"],
        "link_bytes_per_s": hardware["link"]["bytes_per_s"],
        "paced": real.manifest["paced"],
        "device": real.manifest["device"]["kind"],
        "processor": real.host.get("processor_name", real.host.get("processor")),
        "cores": real.host.get("cores"),
        "threads": real.host.get("threads"),
        "torch": real.host.get("torch"),
        "moesim": real.host.get("moesim"),
    }


def _variants(pairs: Sequence[Matched]) -> list[str]:
    """What tells configurations of one policy and capacity apart, where anything does."""
    manifests = [pair.simulated.manifest for pair in pairs]
    varying = [
        name
        for name in KEYS
        if name not in _TOLD and len({canonical(m.get(name)) for m in manifests}) > 1
    ]
    # Where a policy starts is its own affair, unless it was asked for.
    if len({(p.simulated.policy, canonical(p.simulated.manifest["capacity"])) for p in pairs}) == (
        len(pairs)
    ):
        varying = [name for name in varying if name not in ("initial", "initial_experts")]
    return [", ".join(f"{name} {m.get(name)}" for name in varying) for m in manifests]


# ---- refusing ------------------------------------------------------------------------------------


def _refuse_kind(sims: Sequence[Run], reals: Sequence[Run]) -> None:
    for run in sims:
        if run.real:
            raise UsageError(
                f"{run.folder}: was measured, and stands where the simulation belongs; the order "
                "is `moesim validate SIM REAL...`"
            )
    for run in reals:
        if not run.real:
            raise UsageError(
                f"{run.folder}: was simulated, and stands where a measurement belongs; the order "
                "is `moesim validate SIM REAL...`"
            )


def _refuse_mixed(sims: Sequence[Run], reals: Sequence[Run]) -> None:
    both = [*sims, *reals]
    _refuse_unlike(both, "trace", lambda run: str(run.manifest["trace"])[:12])
    _refuse_unlike(both, "model", lambda run: _model(run))
    _refuse_unlike(sims, "hardware profile", lambda run: run.manifest["hardware"])
    _refuse_unlike(reals, "machine", lambda run: [run.host.get("processor_name"), _device(run)])
    _refuse_unlike(reals, "use of --bandwidth", lambda run: run.manifest["paced"])
    if reals[0].manifest["paced"]:
        _refuse_unlike(both, "link", _link)


def _model(run: Run) -> list[Any]:
    return [run.manifest["model"]["name"], run.manifest["model"]]


def _device(run: Run) -> str:
    return str(run.manifest["device"]["kind"])


def _link(run: Run) -> dict[str, Any]:
    """What a paced copy waits for."""
    link = run.manifest["hardware"]["link"]
    return {name: link[name] for name in ("bytes_per_s", "latency_ns", "chunk_bytes", "curve")}


def _refuse_unlike(runs: Sequence[Run], what: str, of: Callable[[Run], Any]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if canonical(of(run)) != canonical(of(first)):
            raise UsageError(
                f"{run.folder}: another {what} than {first.folder}; compare runs that share it"
            )


def _refuse_twice(sims: Sequence[Run]) -> None:
    found: dict[str, Run] = {}
    for run in sims:
        if run.key in found:
            raise UsageError(
                f"{run.folder} and {found[run.key].folder}: both simulate {run.name}; keep one"
            )
        found[run.key] = run


def _refuse_unmatched(sims: Sequence[Run], reals: Sequence[Run]) -> None:
    simulated, real = {run.key for run in sims}, {run.key for run in reals}
    lone_sims = [run for run in sims if run.key not in real]
    lone_reals = [run for run in reals if run.key not in simulated]
    _refuse_other_settings(lone_sims, lone_reals)
    told = [
        f"{state}: {_list(run.name for run in lone)}"
        for state, lone in (("not measured", lone_sims), ("not simulated", lone_reals))
        if lone
    ]
    if told:
        raise UsageError(f"{'; '.join(told)}; make the runs that lack, or leave those folders out")


def _refuse_other_settings(sims: Sequence[Run], reals: Sequence[Run]) -> None:
    """The same policy at the same capacity, and yet no pair."""
    for run in reals:
        for other in sims:
            same = all(_named(run, name) == _named(other, name) for name in ("policy", "capacity"))
            if same:
                key = next(k for k in run.keys if run.manifest.get(k) != other.manifest.get(k))
                what = "settings" if key == "policy" else key
                raise UsageError(
                    f"{run.folder}: {run.name} was measured with {what} {_short(run, key)}, and "
                    f"simulated with {_short(other, key)} in {other.folder}; make one of them "
                    "again"
                )


def _named(run: Run, name: str) -> Any:
    found = run.manifest[name]
    return found["name"] if name == "policy" else found


def _short(run: Run, key: str) -> str:
    if key == "policy":
        return " ".join(run.summary["set"]) or "(as it is)"
    text = canonical(run.manifest.get(key))
    return text if len(text) <= 40 else f"{text[:37]}..."


def _list(names: Iterable[str]) -> str:
    counted = list(Counter(names))
    more = len(counted) - _NAMED
    return ", ".join(counted[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _rank(run: Run) -> tuple[Any, ...]:
    return sum(run.manifest["capacity"]["bytes"]), run.policy, run.key


def _repeat(run: Run) -> tuple[int, str]:
    return int(run.manifest.get("repeat", 0)), run.folder.name
