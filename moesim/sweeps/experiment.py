"""Experiment files: TOML, with the options of ``moesim replay`` as keys.

``[defaults]`` holds for every ``[[grid]]``; in a grid a list is crossed with every other list.
``[smoke]``, and ``smoke`` inside a grid, replace values when a small version is asked for. Mistakes
are gathered, each with its line, before anything runs.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from moesim.ask.replays import option_names, problems, request_of
from moesim.capacity import parse_capacity
from moesim.errors import MoesimError, UsageError
from moesim.policies.presets import PRESETS
from moesim.registry import resolve
from moesim.shape import shaped
from moesim.traces.reader import Columns, TraceReader

Option = str | int | float | bool
TABLES = ("name", "note", "defaults", "smoke", "grid")
BY_SWEEP = {
    "out": "the sweep says where runs are kept",
    "ladder": "list its rungs as policies: static, min-bypass, min, hindsight",
    "plan": "a plan decides policy and capacity; replay it by itself",
}
"""Options of a replay that an experiment cannot have, and why."""
BASE: Mapping[str, Any] = {"trace": "demo", "policy": "lru", "capacity": "25%"}
SHARED = ("policy", "capacity")
"""What configurations of one pass may differ in."""
SHIPPED = Path(__file__).parent.parent / "analysis" / "experiments"


class ExperimentError(UsageError):
    """Everything that is wrong with an experiment file, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One point of a grid: option -> value, in the order of the file."""

    grid: str
    options: Mapping[str, Option]
    line: int = field(default=0, compare=False)
    """Where its grid begins in the file."""

    @property
    def rest(self) -> tuple[tuple[str, Option], ...]:
        """All but policy and capacity: equal for those that one pass can serve."""
        apart = {k: v for k, v in self.options.items() if k not in SHARED}
        return tuple(sorted(apart.items()))


@dataclass(frozen=True, slots=True)
class Experiment:
    """A named list of configurations. note : what it is for."""

    name: str
    note: str
    path: Path
    configurations: tuple[Configuration, ...]


def experiment_path(name_or_path: str) -> Path:
    """The file of a shipped experiment, or the path itself.

    Raises
    ------
    UsageError
        If there is no such file.
    """
    shipped = SHIPPED / f"{name_or_path}.toml"
    path = shipped if shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.toml")))
        raise UsageError(f"{path}: no such file; name an experiment file or a shipped one: {known}")
    return path


def read_experiment(
    path: Path, *, smoke: bool = False, instead: Mapping[str, Any] | None = None
) -> Experiment:
    """Read an experiment and check every configuration.

    Parameters
    ----------
    smoke : the small version. instead : option -> value, which replaces it in every grid.

    Raises
    ------
    ExperimentError
        With all that is wrong.
    """
    text = path.read_text(encoding="utf-8")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ExperimentError([f"{path}: not TOML: {error}"]) from None
    return _Reader(path, _lines_of(text), data, smoke, instead or {}).read()


Place = tuple[str, int, str]
"""Table, which of the tables of that name, and key; "" is the table itself."""


class _Reader:
    def __init__(
        self,
        path: Path,
        lines: Mapping[Place, int],
        data: Mapping[str, Any],
        smoke: bool,
        instead: Mapping[str, Any],
    ) -> None:
        self.path, self.lines, self.data = path, lines, data
        self.smoke, self.instead = smoke, instead
        self.wrong: list[tuple[int, str]] = []

    def read(self) -> Experiment:
        self._check_shape()
        self._stop_if_wrong()
        grids = list(enumerate(self.data["grid"]))
        found = [c for number, grid in grids for c in self._spelled_out(number, grid)]
        self._stop_if_wrong()
        for configuration in found:
            self._check_meaning(configuration)
        self._stop_if_wrong()
        name = self.data.get("name", self.path.stem)
        return Experiment(name, self.data.get("note", ""), self.path, tuple(found))

    def _stop_if_wrong(self) -> None:
        if self.wrong:
            told = dict.fromkeys(sorted(self.wrong))
            raise ExperimentError([f"{self.path}:{line}: {text}" for line, text in told])

    def _say(self, place: Place, text: str) -> None:
        table, number, _ = place
        line = self.lines.get(place, self.lines.get((table, number, ""), 1))
        self.wrong.append((line, text))

    # ---- shape -----------------------------------------------------------------------------------

    def _check_shape(self) -> None:
        for key in self.data:
            if key not in TABLES:
                self._say(("", 0, key), f"{key}: no such key; {_near(key, TABLES)}")
        for key in ("name", "note"):
            if not isinstance(self.data.get(key, ""), str):
                self._say(("", 0, key), f"{key}: must be a text")
        for key in ("defaults", "smoke"):
            if not isinstance(self.data.get(key, {}), dict):
                self._say(("", 0, key), f"{key}: must be a table, [{key}]")
        grids = self.data.get("grid", [])
        if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
            self._say(("grid", 0, ""), "grid: write each as a table of its own, [[grid]]")
        elif not grids:
            self._say(("", 0, ""), "no [[grid]]: give at least one")
        else:
            self._check_names(grids)

    def _check_names(self, grids: Sequence[Mapping[str, Any]]) -> None:
        seen: set[str] = set()
        for number, grid in enumerate(grids):
            name = grid.get("name")
            if not isinstance(name, str) or not name:
                self._say(("grid", number, "name"), "name: give each grid a name")
            elif name in seen:
                self._say(("grid", number, "name"), f"name: two grids are called {name}")
            else:
                seen.add(name)

    # ---- configurations --------------------------------------------------------------------------

    def _spelled_out(self, number: int, grid: Mapping[str, Any]) -> Iterator[Configuration]:
        values = self._values(number, grid)
        self._check_values(number, values)
        lists = [value if isinstance(value, list) else [value] for value in values.values()]
        line = self.lines.get(("grid", number, ""), 1)
        for point in product(*lists):
            yield Configuration(grid["name"], dict(zip(values, point, strict=True)), line)

    def _values(self, number: int, grid: Mapping[str, Any]) -> dict[str, Any]:
        """Option, spelled with dashes -> value or list of values."""
        own = {k: v for k, v in grid.items() if k not in ("name", "smoke")}
        layers = [self.data.get("defaults", {}), own]
        if self.smoke:
            small = grid.get("smoke", {})
            if not isinstance(small, dict):
                self._say(("grid", number, "smoke"), "smoke: must be a table")
                small = {}
            layers += [self.data.get("smoke", {}), small]
        merged: dict[str, Any] = {}
        for layer in (*layers, self.instead):
            merged |= {key.replace("_", "-"): value for key, value in layer.items()}
        merged = {**BASE, **merged}
        return {**merged, **{name: _listed(merged[name]) for name in SHARED}}

    def _check_values(self, number: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            where = self._place(number, name)
            if name in BY_SWEEP:
                self._say(where, f"{name}: not in an experiment; {BY_SWEEP[name]}")
            elif value == []:
                self._say(where, f"{name}: an empty list makes an empty grid; give a value")
            for one in value if isinstance(value, list) else [value]:
                self._check_one(where, name, one)

    def _check_one(self, where: Place, name: str, value: Any) -> None:
        if name in BY_SWEEP:
            return
        if name not in option_names():
            self._say(where, f"{name}: no such option; {_near(name, option_names())}")
        elif not isinstance(value, Option):
            self._say(where, f"{name} {value!r}: must be a text, a number or true or false")
        else:
            for text in _alone(name, value):
                self._say(where, text)

    def _place(self, number: int, name: str) -> Place:
        """Where an option of a grid is given."""
        spelled = (name, name.replace("-", "_"))
        places = [("grid", number, s) for s in spelled] + [("defaults", 0, s) for s in spelled]
        return next((place for place in places if place in self.lines), ("grid", number, ""))

    def _check_meaning(self, configuration: Configuration) -> None:
        """What only all options together, or the trace, can show."""
        try:
            request = request_of(options_of(configuration.options))
            resolve(request.policies, request.settings)
            for capacity in request.capacities:
                if isinstance(capacity, str):
                    _check_capacity(request.trace, request.costs, request.scope, capacity)
        except MoesimError as error:
            text = " ".join(str(error).split())
            self.wrong.append((configuration.line, f"grid {configuration.grid}: {text}"))


def options_of(options: Mapping[str, Option]) -> dict[str, object]:
    """As ``request_of`` takes them: several settings stand in one text, with commas."""
    several = {"set": str(options["set"]).split(",")} if options.get("set") else {}
    return {**{k: v for k, v in options.items() if k != "set"}, **several}


def _listed(values: Any) -> list[Any]:
    """Policies or capacities as the command line would take them, each by itself and as text."""
    given = values if isinstance(values, list) else [values]
    texts: list[Any] = []
    for value in given:
        if isinstance(value, float) and 0 < value <= 1:
            texts.append(f"{100 * value:.10g}%")
        elif isinstance(value, str):
            texts += [word.strip() for word in value.split(",")]
        else:
            texts.append(str(value) if type(value) is int else value)
    return list(PRESETS) if texts == ["all"] else list(dict.fromkeys(texts))


@cache
def _alone(name: str, value: Option) -> tuple[str, ...]:
    """What is wrong with a value whatever the others are."""
    one = options_of({name: value})
    found = {k: v for k, v in problems({"trace": "demo", **one}).items() if k == name}
    return tuple(found.values())


@cache
def _check_capacity(trace: Path, costs: Any, scope: str, capacity: str) -> None:
    with TraceReader(trace, Columns.experts_only()) as reader:
        meta = reader.meta
    sizes = shaped(costs or meta.model, meta).expert_bytes_table()
    parse_capacity(capacity, scope, sizes, meta.experts)


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


_TABLE = re.compile(r"\s*\[(\[)?\s*([A-Za-z0-9_-]+)[^\]]*\]")
_KEY = re.compile(r"\s*\"?([A-Za-z0-9_-]+)\"?\s*=")


def _lines_of(text: str) -> dict[Place, int]:
    """The line of each table and key; the parser keeps none."""
    places: dict[Place, int] = {}
    table, numbers = "", {"": 0}
    for line, content in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(content):
            table = match[2]
            numbers[table] = numbers.get(table, -1) + 1
            places[table, numbers[table], ""] = line
        elif match := _KEY.match(content):
            places.setdefault((table, numbers[table], match[1]), line)
    return places
