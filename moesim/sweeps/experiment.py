"""Experiment files: TOML, with the options of ``moesim replay`` as keys.

``[defaults]`` holds for every ``[[grid]]``; in a grid a list is crossed with every other list.
``[smoke]``, and ``smoke`` inside a grid, replace values when a small version is asked for. Mistakes
are gathered, each with its line, before anything runs.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from moesim.ask.replays import option_names, problems, request_of
from moesim.errors import MoesimError, UsageError
from moesim.policies.presets import PRESETS
from moesim.registry import resolve

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
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except UnicodeDecodeError:
        raise ExperimentError([f"{path}: not TOML: must be UTF-8"]) from None
    except tomllib.TOMLDecodeError as error:
        raise ExperimentError([f"{path}: not TOML: {error}"]) from None
    return _Reader(path, _lines_of(text), data, smoke, instead or {}).read()


Place = tuple[str, int, str]
"""Table, which of the tables of that name, and key; "" is the table itself."""
WITH = "--with"
"""The table of what replaces everything."""


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
        self.unusable: set[Place] = set()
        """Options that are wrong by themselves; the others are checked without them."""

    def read(self) -> Experiment:
        self._check_top()
        grids = self._grids()
        self._check_names(grids)
        for table, number, values in self._tables(grids):
            self._check_table(table, number, values)
        found = [one for at, grid in enumerate(grids) for one in self._spelled_out(at, grid)]
        if not any(key == "trace" for *_, key in self.unusable):
            self._check_meaning(found)
        if self.wrong:
            raise ExperimentError([self._told(*one) for one in dict.fromkeys(sorted(self.wrong))])
        name = self.data.get("name", self.path.stem)
        return Experiment(name, self.data.get("note", ""), self.path, tuple(found))

    def _told(self, line: int, text: str) -> str:
        return f"{self.path}:{line}: {text}" if line else f"{WITH} {text}"

    def _say(self, place: Place, text: str) -> None:
        table, number, _ = place
        whole = (table, number, "")
        inline = (table.partition(".")[0], number, table.partition(".")[2])
        line = next((self.lines[p] for p in (place, whole, inline) if p in self.lines), 1)
        self.wrong.append((0 if table == WITH else line, text))

    # ---- shape -----------------------------------------------------------------------------------

    def _check_top(self) -> None:
        for key in self.data:
            if key not in TABLES:
                self._say(("", 0, key), f"{key}: no such key; {_near(key, TABLES)}")
        for key in ("name", "note"):
            if not isinstance(self.data.get(key, ""), str):
                self._say(("", 0, key), f"{key}: must be a text")

    def _tables(self, grids: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, Any]]:
        for name in ("defaults", "smoke"):
            yield name, 0, self.data.get(name, {})
        yield WITH, 0, self.instead
        for number, grid in enumerate(grids):
            yield "grid", number, grid
            yield "grid.smoke", number, grid.get("smoke", {})

    def _grids(self) -> list[Mapping[str, Any]]:
        grids = self.data.get("grid", [])
        if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
            self._say(("grid", 0, ""), "grid: write each as a table of its own, [[grid]]")
            return []
        if not grids:
            self._say(("", 0, "grid"), "no [[grid]]: give at least one")
        return grids

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

    # ---- options ---------------------------------------------------------------------------------

    def _check_table(self, table: str, number: int, values: Any) -> None:
        """Whether every option of a table is right by itself."""
        if not isinstance(values, dict):
            name = table.rpartition(".")[2]
            self._say((table, number, ""), f"{name}: must be a table, [{table}]")
            return
        for key, value in values.items():
            if table != "grid" or key not in ("name", "smoke"):
                for text in _mistakes(key.replace("_", "-"), value):
                    self._say((table, number, key), text)
                    self.unusable.add((table, number, key))

    def _spelled_out(self, number: int, grid: Mapping[str, Any]) -> Iterator[Configuration]:
        values = self._values(number, grid)
        lists = [_each(value) for value in values.values()]
        line = self.lines.get(("grid", number, ""), 1)
        for point in product(*lists):
            name = str(grid.get("name", ""))
            yield Configuration(name, dict(zip(values, point, strict=True)), line)

    def _values(self, at: int, grid: Mapping[str, Any]) -> dict[str, Any]:
        """Option, spelled with dashes -> value or list of values."""
        own = {k: v for k, v in grid.items() if k not in ("name", "smoke")}
        layers = [("defaults", 0, self.data.get("defaults", {})), ("grid", at, own)]
        if self.smoke:
            layers.append(("smoke", 0, self.data.get("smoke", {})))
            layers.append(("grid.smoke", at, grid.get("smoke", {})))
        merged: dict[str, Any] = {}
        for table, number, values in (*layers, (WITH, 0, self.instead)):
            for key, value in values.items() if isinstance(values, dict) else ():
                if (table, number, key) not in self.unusable:
                    merged[key.replace("_", "-")] = value
        merged = {**BASE, **merged}
        return {**merged, **{name: _listed(merged[name]) for name in SHARED}}

    # ---- meaning ---------------------------------------------------------------------------------

    def _check_meaning(self, found: Sequence[Configuration]) -> None:
        """What only all options together, or the trace, can show."""
        known: dict[object, str] = {}
        for one in found:
            policy, capacity = str(one.options["policy"]), str(one.options["capacity"])
            checks = (
                ((one.rest, capacity), lambda o=one, c=capacity: _check_options(o, c)),
                ((one.options.get("set"), policy), lambda o=one, p=policy: _check_policy(o, p)),
            )
            for key, check in checks:
                if key not in known:
                    known[key] = _complaint(check)
                if known[key]:
                    self.wrong.append((one.line, f"grid {one.grid}: {known[key]}"))


def _check_options(one: Configuration, capacity: str) -> None:
    from moesim.replays import check

    options = options_of(dict(one.rest))
    # Where it will be kept does not matter yet, only that it will.
    check(request_of({**options, "policy": "lru", "capacity": capacity, "out": "."}))


def _check_policy(one: Configuration, policy: str) -> None:
    resolve([policy], settings_of(one.options))


def _complaint(check: Callable[[], None]) -> str:
    try:
        check()
    except MoesimError as error:
        return " ".join(str(error).split())
    return ""


def settings_of(options: Mapping[str, Option]) -> list[str]:
    """Several settings stand in one text, with commas."""
    return [one.strip() for one in str(options["set"]).split(",")] if options.get("set") else []


def options_of(options: Mapping[str, Option]) -> dict[str, object]:
    """As ``request_of`` takes them."""
    several = {"set": settings_of(options)} if options.get("set") else {}
    return {**{k: v for k, v in options.items() if k != "set"}, **several}


def _each(value: Any) -> list[Any]:
    """The values of a list, each once; what is no list is one value."""
    return list(dict.fromkeys(value)) if isinstance(value, list) else [value]


def _listed(values: Any) -> list[Any]:
    """Policies or capacities as the command line would take them, each by itself and as text."""
    texts: list[str] = []
    for value in _each(values):
        if isinstance(value, float):
            texts.append(f"{100 * value:.10g}%")
        else:
            texts += [word.strip() for word in str(value).split(",")]
    return list(PRESETS) if texts == ["all"] else list(dict.fromkeys(texts))


def _mistakes(name: str, value: Any) -> Iterator[str]:
    """What is wrong with an option whatever the others are."""
    if name in BY_SWEEP:
        yield f"{name}: not in an experiment; {BY_SWEEP[name]}"
    elif name not in _names():
        yield f"{name}: no such option; {_near(name, [n for n in _names() if n not in BY_SWEEP])}"
    elif value == []:
        yield f"{name}: an empty list makes an empty grid; give a value"
    else:
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Option):
                yield from _alone(name, one)
            else:
                yield f"{name} {one!r}: must be a text, a number or true or false"


@cache
def _names() -> tuple[str, ...]:
    return tuple(option_names())


@lru_cache(maxsize=None, typed=True)
def _alone(name: str, value: Option) -> tuple[str, ...]:
    one = options_of({name: value})
    found = {k: v for k, v in problems({"trace": "demo", **one}).items() if k == name}
    return tuple(found.values())


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


_TABLE = re.compile(r"\s*\[\[?\s*([\w-]+(?:\s*\.\s*[\w-]+)*)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"\s*(?:\"([\w-]+)\"|([\w-]+))\s*=")


def _lines_of(text: str) -> dict[Place, int]:
    """The line of each table and key; the parser keeps none."""
    places: dict[Place, int] = {}
    table, numbers = "", {"": 0}
    quoted = False
    for line, content in enumerate(text.split("\n"), 1):
        if quoted:
            pass
        elif match := _TABLE.fullmatch(content):
            table = "".join(match[1].split())
            # A table in a grid is numbered as the grid is.
            inside = numbers.get(table.partition(".")[0]) if "." in table else None
            numbers[table] = numbers.get(table, -1) + 1 if inside is None else inside
            places[table, numbers[table], ""] = line
        elif match := _KEY.match(content):
            places.setdefault((table, numbers[table], match[1] or match[2]), line)
        quoted ^= (content.count('"""') + content.count("'''")) % 2 == 1
    return places
