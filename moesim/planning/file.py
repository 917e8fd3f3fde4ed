"""``plan.toml``: what a planner decided, what that rests on, and what a run takes from it."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.capacity import Capacity
from moesim.errors import UsageError
from moesim.planning.space import SPARES, Slots, Space, capacity_of
from moesim.profile import ModelProfile
from moesim.shape import shaped
from moesim.traces.reader import Columns, TraceReader
from moesim.types import ExpertId

SCHEMA = 1
_HEAD = """\
# How many experts of each layer to hold, made by `moesim plan`.
# Replay it with: moesim replay --plan THIS_FILE --trace TRACE
# Quality in replay is a proxy: later rows of a trace stay as recorded whatever was executed.
"""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one allocation, by the models or by replay."""

    memory_bytes: int
    latency_ns: float
    quality: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to allocate, with what it comes to; or why it was not tried."""

    name: str
    slots: Slots = ()
    predicted: Estimate | None = None
    replayed: Estimate | None = None
    not_run: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan for one model on one machine.

    slots : experts held, by layer. period : inputs (or what ``settings`` say) between updates, 0
    for a policy without one. swaps : most swaps of a step, 0 where the policy has no such limit.
    facts : what it rests on (trace, fit, versions, seed), plain TOML values, by table.
    """

    model: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: tuple[int, ...]
    fixed_bytes: int
    hardware: str
    budget_bytes: int
    policy: str
    settings: tuple[str, ...]
    slots: Slots
    spare: str
    period: int
    swaps: int
    initial: tuple[ExpertId, ...]
    method: str
    predicted: Estimate
    replayed: Estimate
    alternatives: tuple[Alternative, ...] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def space(self) -> Space:
        """The memory model that the plan was made with."""
        return Space(self.expert_bytes, self.experts, 1, self.fixed_bytes, self.spare)

    def run(self, layers: int, experts: int, expert_bytes: Sequence[int]) -> Planned:
        """What a replay or a real run of this shape is given.

        Raises
        ------
        UsageError
            If the plan is for another shape, or for experts of other sizes.
        """
        if (layers, experts) != (self.layers, self.experts):
            raise UsageError(
                f"--plan: made for {self.layers} layers of {self.experts} experts, the trace has "
                f"{layers} of {experts}; plan on a trace of this model"
            )
        if tuple(expert_bytes) != self.expert_bytes:
            raise UsageError(
                f"--plan: made for the expert sizes of {self.model}, which the run does not have; "
                f"name the same --costs {self.model}"
            )
        capacity = capacity_of(self.space, np.array(self.slots, np.int64))
        return Planned(self.policy, self.settings, replace(capacity, starts=self.initial))


@dataclass(frozen=True, slots=True)
class Planned:
    """The part of a plan that determines a run."""

    policy: str
    settings: tuple[str, ...]
    """As ``--set`` takes them, the update period among them."""
    capacity: Capacity
    """With the experts that are there at the start."""


def planned(path: Path, trace: Path, costs: ModelProfile | None) -> Planned:
    """What ``--plan`` stands for, on a trace.

    Raises
    ------
    UsageError
        If it is no plan, or not for this trace.
    """
    with TraceReader(trace, Columns.experts_only()) as reader:
        meta = reader.meta
    sizes = shaped(costs or meta.model, meta).expert_bytes_table()
    return load_plan(path).run(meta.layers, meta.experts, sizes.tolist())


# ---- writing -------------------------------------------------------------------------------------


def save_plan(plan: Plan, path: Path) -> None:
    """Write beside, then rename. Raises UsageError naming the file."""
    if not path.name or path.is_dir():
        raise UsageError(f"--out {path}: is a folder; name a file to write, such as plan.toml")
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        beside.write_text(plan_text(plan), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written ({error.strerror})") from None
    finally:
        beside.unlink(missing_ok=True)


def plan_text(plan: Plan) -> str:
    """The file's text. Equal plans give equal bytes."""
    parts = [_HEAD, _table("", {"schema": SCHEMA}), _table("model", _model(plan))]
    parts.append(_table("plan", _decided(plan)))
    parts.append(_table("predicted", _estimate(plan.predicted)))
    parts.append(_table("replayed", _estimate(plan.replayed)))
    parts += [_table(name, values) for name, values in plan.facts.items()]
    for one in plan.alternatives:
        parts.append(_table("alternatives", _alternative(one), many=True))
    return "\n".join(parts)


def _model(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.model,
        "layers": plan.layers,
        "experts": plan.experts,
        "top_k": plan.top_k,
        "expert_bytes": list(plan.expert_bytes),
        "fixed_bytes": plan.fixed_bytes,
        "hardware": plan.hardware,
    }


def _decided(plan: Plan) -> dict[str, Any]:
    initial = [[] for _ in range(plan.layers)]  # type: list[list[int]]
    for expert in plan.initial:
        initial[expert // plan.experts].append(expert % plan.experts)
    return {
        "budget_bytes": plan.budget_bytes,
        "policy": plan.policy,
        "settings": list(plan.settings),
        "slots": list(plan.slots),
        "spare": plan.spare,
        "period": plan.period,
        "swaps_per_step": plan.swaps,
        "method": plan.method,
        "initial": initial,
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "memory_bytes": estimate.memory_bytes,
        "latency_ns": estimate.latency_ns,
        "quality": estimate.quality,
    }


def _alternative(one: Alternative) -> dict[str, Any]:
    if one.not_run or one.predicted is None or one.replayed is None:
        return {"name": one.name, "not_run": one.not_run}
    pairs = (("predicted", one.predicted), ("replayed", one.replayed))
    values = {f"{how}_{key}": v for how, e in pairs for key, v in _estimate(e).items()}
    return {"name": one.name, "slots": list(one.slots), **values}


def _table(name: str, values: Mapping[str, Any], *, many: bool = False) -> str:
    head = "" if not name else f"[[{name}]]\n" if many else f"[{name}]\n"
    return head + "".join(f"{key} = {_value(value)}\n" for key, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; only DEL must be escaped in addition.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], list | tuple):
            return "[\n" + "".join(f"  {_value(v)},\n" for v in value) + "]"
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value)


# ---- reading -------------------------------------------------------------------------------------


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises
    ------
    UsageError
        Naming the file and the key: no such file, not TOML, of a newer moesim, or a value that is
        missing, unknown to fit its type, or at odds with another.
    """
    return _Reader(path).plan()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"--plan {path}: {error.strerror}; name a file that `moesim plan --out` wrote"
            ) from None
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"--plan {path}: not TOML ({reason})") from None

    def plan(self) -> Plan:
        schema = self.whole("", "schema", 1)
        if schema > SCHEMA:
            raise self.fail("schema", f"is {schema}, of a newer moesim; this one reads {SCHEMA}")
        layers = self.whole("model", "layers", 1)
        experts = self.whole("model", "experts", 1)
        slots = self.wholes("plan", "slots", layers, 1, experts)
        spare = self.text("plan", "spare")
        if spare not in SPARES:
            raise self.fail("plan.spare", f"must be one of {', '.join(SPARES)}, got {spare!r}")
        return Plan(
            model=self.text("model", "name"),
            layers=layers,
            experts=experts,
            top_k=self.whole("model", "top_k", 1),
            expert_bytes=self.wholes("model", "expert_bytes", layers, 1),
            fixed_bytes=self.whole("model", "fixed_bytes", 0),
            hardware=self.text("model", "hardware"),
            budget_bytes=self.whole("plan", "budget_bytes", 1),
            policy=self.text("plan", "policy"),
            settings=self.texts("plan", "settings"),
            slots=slots,
            spare=spare,
            period=self.whole("plan", "period", 0),
            swaps=self.whole("plan", "swaps_per_step", 0),
            initial=self.initial(slots, experts),
            method=self.text("plan", "method"),
            predicted=self.estimate("predicted"),
            replayed=self.estimate("replayed"),
            alternatives=self.alternatives(layers),
            facts=self.facts(),
        )

    def fail(self, key: str, what: str) -> UsageError:
        return UsageError(f"--plan {self.path}: {key}: {what}")

    def get(self, table: str, key: str) -> Any:
        data = self.data.get(table) if table else self.data
        name = f"{table}.{key}" if table else key
        if not isinstance(data, dict) or key not in data:
            raise self.fail(name, "missing; make the plan anew with `moesim plan`")
        return data[key]

    def whole(self, table: str, key: str, least: int, most: int | None = None) -> int:
        return self._whole(f"{table}.{key}" if table else key, self.get(table, key), least, most)

    def wholes(
        self, table: str, key: str, count: int, least: int, most: int | None = None
    ) -> tuple[int, ...]:
        values, name = self.get(table, key), f"{table}.{key}"
        if not isinstance(values, list) or len(values) != count:
            raise self.fail(name, f"must hold one number for each of {count} layers")
        return tuple(self._whole(f"{name}[{i}]", v, least, most) for i, v in enumerate(values))

    def _whole(self, name: str, value: Any, least: int, most: int | None) -> int:
        if type(value) is not int or value < least or (most is not None and value > most):
            limit = f"at least {least}" if most is None else f"from {least} to {most}"
            raise self.fail(name, f"must be a whole number {limit}, got {value!r}")
        return value

    def text(self, table: str, key: str) -> str:
        value = self.get(table, key)
        if not isinstance(value, str):
            raise self.fail(f"{table}.{key}", f"must be text, got {value!r}")
        return value

    def texts(self, table: str, key: str) -> tuple[str, ...]:
        values = self.get(table, key)
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise self.fail(f"{table}.{key}", "must be a list of texts")
        return tuple(values)

    def number(self, table: str, key: str) -> float:
        value = self.get(table, key)
        if type(value) not in (int, float):
            raise self.fail(f"{table}.{key}", f"must be a number, got {value!r}")
        return float(value)

    def estimate(self, table: str) -> Estimate:
        return Estimate(
            self.whole(table, "memory_bytes", 0),
            self.number(table, "latency_ns"),
            self.number(table, "quality"),
        )

    def initial(self, slots: Slots, experts: int) -> tuple[ExpertId, ...]:
        rows = self.get("plan", "initial")
        if not isinstance(rows, list) or len(rows) != len(slots):
            raise self.fail("plan.initial", f"must hold one list for each of {len(slots)} layers")
        ids = []
        for layer, row in enumerate(rows):
            name = f"plan.initial[{layer}]"
            if not isinstance(row, list) or len(row) > slots[layer]:
                raise self.fail(name, f"must list at most {slots[layer]} experts, its slots")
            local = [self._whole(name, expert, 0, experts - 1) for expert in row]
            if len(set(local)) < len(local):
                raise self.fail(name, "lists an expert twice")
            ids += [layer * experts + expert for expert in local]
        return tuple(ids)

    def alternatives(self, layers: int) -> tuple[Alternative, ...]:
        rows = self.data.get("alternatives", [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self.fail("alternatives", "must be tables")
        return tuple(_Row(self, row, i).read(layers) for i, row in enumerate(rows))

    def facts(self) -> dict[str, dict[str, Any]]:
        known = ("schema", "model", "plan", "predicted", "replayed", "alternatives")
        rest = {name: value for name, value in self.data.items() if name not in known}
        for name, value in rest.items():
            if not isinstance(value, dict):
                raise self.fail(name, "unknown key")
        return rest


class _Row(_Reader):
    """One of the alternatives, read as a table of its own."""

    def __init__(self, whole: _Reader, row: dict[str, Any], number: int) -> None:
        self.path = whole.path
        self.name = f"alternatives[{number}]"
        self.data = {self.name: row}

    def read(self, layers: int) -> Alternative:
        name = self.text(self.name, "name")
        if "not_run" in self.data[self.name]:
            return Alternative(name, not_run=self.text(self.name, "not_run"))
        slots = self.wholes(self.name, "slots", layers, 0)
        return Alternative(name, slots, self._estimate("predicted"), self._estimate("replayed"))

    def _estimate(self, how: str) -> Estimate:
        return Estimate(
            self.whole(self.name, f"{how}_memory_bytes", 0),
            self.number(self.name, f"{how}_latency_ns"),
            self.number(self.name, f"{how}_quality"),
        )
