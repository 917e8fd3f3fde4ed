"""How the compiled core reads its arrays, and calls what few runs need."""

from __future__ import annotations

import operator
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
from numba.core.registry import cpu_target

from moesim import compiled
from moesim.compiled import address, call_with, entry, held_at, kernel, load, outside
from moesim.compiler import COMMON, from_zero
from moesim.engine import fast
from moesim.engine.machine import KIND
from tests.harness import setup_of, spec_of
from tests.test_laws import mixed_case

config: Any = numba.config
compiles = pytest.mark.skipif(
    bool(config.DISABLE_JIT), reason="NUMBA_DISABLE_JIT: nothing is compiled"
)
types: Any = numba.types


class Row(IntEnum):
    FIRST = 0
    SUM = 1
    LENGTH = 2


@from_zero
class Desk(NamedTuple):
    numbers: Any
    table: Any
    small: Any


DESK = types.NamedTuple([types.int64[::1], types.int64[:, ::1], types.uint8[::1]], Desk)
NUMBER = types.int64


def desk() -> Desk:
    table = np.arange(12).reshape(3, 4).astype(np.int64)
    return Desk(np.arange(5, dtype=np.int64), table, np.zeros(4, np.uint8))


@kernel
def double(d: Desk, at: int) -> int:
    return int(2 * d.table[Row.LENGTH, at])


@entry
def work(d: Desk, other: int, at: int) -> int:
    """Elements, rows, slices, lengths, in place; and a call by address."""
    d.numbers[Row.FIRST] += double(d, at)
    d.table[Row.SUM, at] = d.table[Row.SUM].sum() + d.numbers[1:at].sum()
    d.table[at - 1, np.uint32(at)] -= len(d.table)
    d.small[at] = d.numbers[Row.FIRST] > 9
    return int(call_with(other, d, np.int64(at), d.numbers[np.int64(Row.LENGTH)]))


@outside
def elsewhere(where: int, what: int, about: int) -> int:
    """Sees what its caller wrote, and writes for it."""
    d = held_at(where, DESK)
    d.numbers[4] = d.numbers[0] + what
    for row in range(len(d.table)):
        d.table[row, 3] += about + row
    return int(d.table[2, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled code is kept."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> int:
    """The address of what is elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_folder", lambda module: folder)
        load((work, (DESK, NUMBER, NUMBER)))
        return address(elsewhere)


def expected(at: int) -> tuple[int, list[list[int]]]:
    """The same by NumPy alone."""
    d = desk()
    d.numbers[0] += 2 * d.table[2, at]
    d.table[1, at] = d.table[1].sum() + d.numbers[1:at].sum()
    d.table[at - 1, at] -= 3
    d.small[at] = d.numbers[0] > 9
    d.numbers[4] = d.numbers[0] + at
    d.table[:, 3] += d.numbers[2] + np.arange(3)
    return int(d.table[2, 3]), [array.reshape(-1).tolist() for array in d]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_held_tuple_is_read_and_written_as_any_other(loaded: int, at: int) -> None:
    mine = desk()
    answer = work(mine, loaded, at)
    assert (answer, [array.reshape(-1).tolist() for array in mine]) == expected(at)


@compiles
def test_what_is_elsewhere_is_kept_apart(loaded: int, folder: Path) -> None:
    """Each has files of its own, so that one is there without the other."""
    kept = {path.name.split("-")[0].split(".")[-1] for path in folder.rglob("*.nbc")}
    assert kept == {"work", "elsewhere"}


@compiles
def test_numba_is_left_as_it_was(loaded: int) -> None:
    """Other code of the process is typed by numba's own ways."""
    context: Any = cpu_target.typing_context
    for one in (*COMMON, operator.getitem):
        assert "get_call_type" not in vars(context.resolve_value_type(one))


def test_the_machine_has_the_type_that_forecasts_are_compiled_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast, "load", lambda *calls: None)
    monkeypatch.setattr(fast, "address", lambda function: 0)
    case = mixed_case(np.random.default_rng(3))
    engine = fast.FastEngine(setup_of(case, spec_of("finemoe").build()))
    typeof: Any = numba.typeof
    assert typeof(engine._machine) == KIND
