"""From a name on the command line to a policy.

A policy is a preset, an entry point of the group ``moesim.policies``, or ``module:Class``. A seat
is a built-in, an entry point of the group ``moesim.seats`` (named ``kind.name``), or
``module:Class``. Nothing is imported that was not asked for.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from moesim.errors import PolicyError, UsageError
from moesim.policies import SEATS
from moesim.policies.presets import PRESETS, Preset
from moesim.protocol import (
    SEAT_KINDS,
    KeepSeat,
    MissSeat,
    Policy,
    PrefetchSeat,
    RouteSeat,
    Seat,
    SeatPolicy,
    lacks,
)


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy that can be built afresh for every run.

    Either ``seats`` (kind -> ``module:Class``) with their parameters, or ``factory``.
    """

    name: str
    seats: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    factory: str = ""
    initial: str = "cold"

    def build(self) -> Policy:
        """A fresh policy.

        Raises
        ------
        PolicyError, UsageError
            If it cannot be imported, or a parameter is unknown or out of range.
        """
        if self.factory:
            return _policy(self.factory)
        made = {kind: _make(kind, ref, self.parameters[kind]) for kind, ref in self.seats.items()}
        return SeatPolicy(
            cast(PrefetchSeat, made["prefetch"]),
            cast(KeepSeat, made["keep"]),
            cast(MissSeat, made["miss"]),
            cast(RouteSeat, made["route"]),
        )

    @property
    def foreign(self) -> bool:
        """Whether any of its code is not moesim's."""
        refs = [self.factory] if self.factory else self.seats.values()
        return not all(ref.startswith("moesim.") for ref in refs)

    def manifest(self) -> dict[str, Any]:
        """What determines its answers: classes, versions and resolved parameters."""
        if self.factory:
            version = getattr(_load(self.factory), "version", 1)
            return {"class": self.factory, "version": version, "source": _source(self.factory)}
        described = {}
        for kind, ref in sorted(self.seats.items()):
            seat = _make(kind, ref, self.parameters[kind])
            values = {f.name: getattr(seat, f.name) for f in _fields(type(seat))}
            described[kind] = {"class": ref, "version": seat.version, "parameters": values}
            if not ref.startswith("moesim."):
                described[kind]["source"] = _source(ref)
        return described


def resolve(names: Sequence[str], settings: Sequence[str] = ()) -> list[PolicySpec]:
    """Policies by name, with ``--set`` applied: ``seat=name`` or ``seat.parameter=value``.

    A parameter goes to every policy whose seat has it.

    Raises
    ------
    UsageError
        For an unknown name (with close matches), or a setting that no policy takes.
    """
    swaps, values = _parse(settings)
    specs = []
    taken: set[str] = set()
    for name in names:
        preset = _preset(name)
        if isinstance(preset, str):
            specs.append(PolicySpec(name, factory=preset))
            continue
        spec, used = _spec(name, preset, swaps, values)
        specs.append(spec)
        taken |= used
    for key in values:
        if key not in taken:
            raise UsageError(_no_parameter(key, specs))
    if swaps and all(spec.factory for spec in specs):
        raise UsageError(f"--set {next(iter(swaps))}: {names[0]} is not made of seats")
    return specs


def policy_names() -> list[str]:
    """Presets and installed policies."""
    return [*PRESETS, *sorted(e.name for e in _others("moesim.policies"))]


def seat_names(kind: str) -> list[str]:
    """Built-in and installed seats of a kind."""
    prefix = f"{kind}."
    known = [n for n in SEATS if n.startswith(prefix)]
    extra = sorted(e.name for e in _others("moesim.seats") if e.name.startswith(prefix))
    return [n.removeprefix(prefix) for n in (*known, *extra)]


def seat_class(kind: str, name: str) -> type[Seat]:
    """The class of a seat by name or ``module:Class``."""
    return cast(type[Seat], _load(_seat_ref(kind, name)))


def close_matches(word: str, known: Iterable[str]) -> str:
    """The end of an error line: what may have been meant, or all there is."""
    known = list(known)
    near = difflib.get_close_matches(word.lower(), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


# ---- inside --------------------------------------------------------------------------------------


def _preset(name: str) -> Preset | str:
    """A preset, or the ``module:Class`` of a policy."""
    if name in PRESETS:
        _refuse_double(name, "moesim.policies", PRESETS)
        return PRESETS[name]
    if ":" in name:
        return name
    for entry in _others("moesim.policies"):
        if entry.name == name:
            loaded = entry.load()
            return loaded if isinstance(loaded, Preset) else entry.value
    raise UsageError(f"--policy {name}: unknown; {close_matches(name, policy_names())}")


def _spec(
    name: str, preset: Preset, swaps: Mapping[str, str], values: Mapping[str, str]
) -> tuple[PolicySpec, set[str]]:
    seats = {k: _seat_ref(k, swaps.get(k, getattr(preset, k))) for k in SEAT_KINDS}
    parameters: dict[str, dict[str, object]] = {kind: {} for kind in SEAT_KINDS}
    for key, value in preset.parameters.items():
        kind, _, parameter = key.partition(".")
        if kind not in swaps:
            parameters[kind][parameter] = value
    used = set()
    for key, text in values.items():
        kind, _, parameter = key.partition(".")
        known = {f.name: f for f in _fields(cast(type, _load(seats[kind])))}
        if parameter in known:
            parameters[kind][parameter] = _typed(key, text, known[parameter].type)
            used.add(key)
    return PolicySpec(name, seats, parameters, initial=preset.initial), used


def _parse(settings: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    swaps: dict[str, str] = {}
    values: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        kind, dot, _ = key.partition(".")
        if not equals or not value or kind not in SEAT_KINDS:
            raise UsageError(
                f"--set {setting}: write seat=name or seat.parameter=value; "
                f"seats: {', '.join(SEAT_KINDS)}"
            )
        (values if dot else swaps)[key] = value
    return swaps, values


def _seat_ref(kind: str, name: str) -> str:
    if ":" in name:
        return name
    full = f"{kind}.{name}"
    if full in SEATS:
        _refuse_double(full, "moesim.seats", SEATS)
        return SEATS[full]
    for entry in _others("moesim.seats"):
        if entry.name == full:
            return entry.value
    raise UsageError(f"--set {kind}={name}: unknown; {close_matches(name, seat_names(kind))}")


@cache
def _others(group: str) -> tuple[EntryPoint, ...]:
    """Entry points that other packages registered."""
    return tuple(e for e in entry_points(group=group) if not e.value.startswith("moesim."))


def _refuse_double(name: str, group: str, builtin: Mapping[str, object]) -> None:
    for entry in _others(group):
        if entry.name == name:
            owner = entry.dist.name if entry.dist else entry.value
            raise UsageError(
                f"{name} is provided by moesim and by {owner}; uninstall one, or name "
                f"{entry.value} in full"
            )


def _load(ref: str) -> Any:
    name, _, attribute = ref.partition(":")
    if not name or not attribute:
        raise UsageError(f"{ref}: write module:Class")
    module = _imported(ref, name)
    if not hasattr(module, attribute):
        raise UsageError(f"{ref}: {name} has no {attribute}; write module:Class")
    return getattr(module, attribute)


def _imported(ref: str, name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{ref}: no module {error.name}; check the spelling or install it"
        ) from None
    except Exception as error:
        if name.startswith("moesim."):
            raise
        raise UsageError(f"{ref}: cannot be imported: {type(error).__name__}: {error}") from None


def _source(ref: str) -> str | None:
    """SHA-256 (hex) of the file that defines a class from outside; None if it has none."""
    path = getattr(_imported(ref, ref.partition(":")[0]), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


def _call(ref: str, parameters: Mapping[str, object]) -> Any:
    try:
        return _load(ref)(**parameters)
    except TypeError as error:
        raise PolicyError(f"{ref} cannot be made: {error}") from None


def _policy(ref: str) -> Policy:
    made = _call(ref, {})
    lacking = lacks(made)
    if lacking:
        raise PolicyError(
            f"{ref} is no policy: it has no {lacking}; derive it from moesim.policy.PlainPolicy"
        )
    return cast(Policy, made)


def _make(kind: str, ref: str, parameters: Mapping[str, object]) -> Seat:
    made = _call(ref, parameters)
    if getattr(made, "kind", None) != kind:
        raise PolicyError(f"{ref} is no {kind} seat; derive it from moesim.policy's seat classes")
    return cast(Seat, made)


def _fields(cls: type) -> list[Any]:
    return [f for f in fields(cls) if f.init] if is_dataclass(cls) else []


def _typed(key: str, text: str, kind: object) -> object:
    # A type, or its name where the module postpones annotations.
    kind = getattr(kind, "__name__", kind)
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    except (KeyError, ValueError):
        raise UsageError(f"--set {key}={text}: must be {_spelled(kind)}") from None
    return text


def _spelled(kind: object) -> str:
    return {"bool": "true or false", "int": "a whole number", "float": "a number"}[str(kind)]


def _no_parameter(key: str, specs: Sequence[PolicySpec]) -> str:
    kind, _, parameter = key.partition(".")
    known = sorted(
        {f.name for s in specs if s.seats for f in _fields(cast(type, _load(s.seats[kind])))}
    )
    told = close_matches(parameter, known) if known else "they have no parameters"
    return f"--set {key}: no such parameter of the {kind} seats asked for; {told}"
